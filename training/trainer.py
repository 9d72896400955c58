"""VJepaQwenTrainer: transformers' Trainer whose checkpoints hold what was trained, and nothing of the frozen 27B.

A checkpoint is `projector.safetensors` (names as in the model), with LoRA also PEFT's `adapter_model.safetensors` and
`adapter_config.json`, the processor, and the Trainer's own files. `load_trained(model, folder)` puts it into a model.
"""

import os

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME

PROJECTOR_FILE = "projector.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
# What PEFT puts before the names of the model that it wraps.
ADAPTER_PREFIX = "base_model.model."
ADAPTER_NAME = "default"


class VJepaQwenTrainer(Trainer):
    """As [`Trainer`], on one process or many; only `requires_grad` parameters are saved, loaded and resumed."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        output_dir = output_dir or self.args.output_dir
        if self.is_deepspeed_enabled:
            state_dict = self.accelerator.get_state_dict(self.deepspeed)
        else:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            state_dict = get_model_state_dict(self.model, options=options)
        if self.args.should_save:
            trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            state_dict = {name: tensor for name, tensor in state_dict.items() if name in trained}
            save_trained(self.accelerator.unwrap_model(self.model), output_dir, state_dict)
            self.processing_class.save_pretrained(output_dir)
            torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str):
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # The base class would save the whole model once more, frozen parts included.
        from accelerate.utils import save_fsdp_optimizer

        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None):
        _set_trained(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        _set_trained(self.model, self.state.best_model_checkpoint)


def save_trained(model, folder: str, state_dict: dict[str, torch.Tensor]):
    """Writes the trained tensors of `model`, given by their names in the model, into a folder."""
    os.makedirs(folder, exist_ok=True)
    metadata = {"format": "pt", "base_model": str(model.name_or_path)}
    projector = {name: tensor.contiguous() for name, tensor in state_dict.items() if ".multi_modal_projector." in name}
    if projector:
        save_file(projector, os.path.join(folder, PROJECTOR_FILE), metadata=metadata)
    rest = {name: tensor for name, tensor in state_dict.items() if name not in projector}
    if rest:
        adapter = get_peft_model_state_dict(model, state_dict=rest, adapter_name=ADAPTER_NAME)
        adapter = {ADAPTER_PREFIX + name: tensor.contiguous() for name, tensor in adapter.items()}
        if len(adapter) != len(rest):
            raise ValueError(f"{len(rest) - len(adapter)} trained tensors belong to neither projector nor adapter")
        save_file(adapter, os.path.join(folder, ADAPTER_FILE), metadata=metadata)
        config = model.peft_config[ADAPTER_NAME]
        is_inference, config.inference_mode = config.inference_mode, True
        config.save_pretrained(folder)
        config.inference_mode = is_inference


def _set_trained(model, folder: str):
    """Puts what a checkpoint holds over exactly the parameters that are being trained, sharded or not."""
    state_dict = {}
    if os.path.isfile(projector := os.path.join(folder, PROJECTOR_FILE)):
        state_dict.update(load_file(projector))
    if os.path.isfile(adapter := os.path.join(folder, ADAPTER_FILE)):
        for name, tensor in load_file(adapter).items():
            module, _, weight = name.removeprefix(ADAPTER_PREFIX).rpartition(".")
            state_dict[f"{module}.{ADAPTER_NAME}.{weight}"] = tensor
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained != state_dict.keys():
        raise ValueError(
            f"checkpoint ({folder}, {len(state_dict)} tensors) must hold the {len(trained)} tensors that are trained; "
            f"{sorted(trained ^ state_dict.keys())[0]} is on one side only: was it made by another --stage?"
        )
    set_model_state_dict(model, state_dict, options=StateDictOptions(full_state_dict=True, strict=False))


def load_trained(model, folder: str):
    """
    Puts what a checkpoint of the training holds into a model: the projector, and the adapter if there is one.

    Args:
        model (`VJepaQwenForConditionalGeneration`): The model that the training started from.
        folder (`str`): A checkpoint, or the output folder of the training.

    Returns:
        The same model, in evaluation mode, the adapter active.

    Raises:
        ValueError: when the folder holds nothing that was trained, or something of another model.
    """
    projector, adapter = os.path.join(folder, PROJECTOR_FILE), os.path.join(folder, ADAPTER_FILE)
    if not os.path.isfile(projector) and not os.path.isfile(adapter):
        raise ValueError(
            f"folder ({folder}) must hold {PROJECTOR_FILE} or {ADAPTER_FILE}, as `vjepa-qwen train` writes"
        )
    if os.path.isfile(projector):
        tensors, own = load_file(projector), dict(model.named_parameters())
        for name, tensor in tensors.items():
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(f"{name} {tuple(tensor.shape)} of {projector} must be a parameter of the model")
        model.load_state_dict(tensors, strict=False)
    if os.path.isfile(adapter):
        model.load_adapter(folder)
    return model.eval()


def base_model_of(folder: str) -> str:
    """Name or folder of the checkpoint that a training started from."""
    for name in (PROJECTOR_FILE, ADAPTER_FILE):
        if os.path.isfile(path := os.path.join(folder, name)):
            with safe_open(path, framework="pt") as file:
                return file.metadata()["base_model"]
    raise ValueError(f"folder ({folder}) must hold {PROJECTOR_FILE} or {ADAPTER_FILE}, as `vjepa-qwen train` writes")
