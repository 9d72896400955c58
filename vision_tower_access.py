"""The vision tower as the processor needs it: read alone from a checkpoint, and with its adapters switched off."""

import json
import os
from contextlib import contextmanager

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, is_peft_available

from .configuration_vjepa_qwen import VJepaQwenConfig
from .interrupted_downloads import explain_interrupted_download
from .modeling_vjepa_qwen import VJepaQwenVisionTower

TOWER_PREFIX = "model.vision_tower."


def load_vision_tower(
    checkpoint: str | os.PathLike, download_kwargs: dict, dtype: str | torch.dtype = "auto"
) -> VJepaQwenVisionTower:
    """Reads the tower, and nothing else, from a checkpoint: only the files that hold its tensors are fetched.

    It goes to the accelerator if there is one. `dtype`: see [`VJepaQwenProcessor.from_pretrained`].
    """
    config = VJepaQwenConfig.from_pretrained(checkpoint, **download_kwargs)
    index_file = cached_file(
        checkpoint, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **download_kwargs
    )
    if index_file is None:
        file_names = {SAFE_WEIGHTS_NAME}
    else:
        with open(index_file, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        file_names = {file_name for name, file_name in weight_map.items() if name.startswith(TOWER_PREFIX)}
    state_dict = {}
    for file_name in sorted(file_names):
        with explain_interrupted_download(checkpoint, **download_kwargs):
            path = cached_file(checkpoint, file_name, **download_kwargs)
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():
                if name.startswith(TOWER_PREFIX):
                    state_dict[name.removeprefix(TOWER_PREFIX)] = tensors.get_tensor(name)
    if not state_dict:
        raise ValueError(
            f"checkpoint ({checkpoint}) must hold the vision tower ({TOWER_PREFIX}*) in safetensors files; save the "
            "model with `save_pretrained` into the processor's folder, or call `processor.bind(model)`"
        )
    tower = VJepaQwenVisionTower._from_config(config.vision_config)
    tower.load_state_dict(state_dict, strict=True, assign=True)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if dtype == "auto":
        dtype = config.dtype or tower.dtype
        if dtype == torch.bfloat16 and not _has_bfloat16(device):
            dtype = torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return tower.to(device, dtype).eval()


def _has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed by the hardware; CPUs without it take several times as long as in float32."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def find_adapted_layers(tower) -> list[torch.nn.Module]:
    """The layers of the tower that carry a PEFT adapter."""
    if is_peft_available():
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [module for module in tower.modules() if isinstance(module, BaseTunerLayer)]
    return []


@contextmanager
def without_adapters(layers: list[torch.nn.Module]):
    """The tower as it was before the adapters, for as long as the context lasts."""
    # PEFT's switch also changes which parameters are trained: that is put back as it was.
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
