"""Linked checkpoints: a light repository holds the tower and the projector, another one the language model.

    light repository                     its language model, where it lies (Hub cache or folder)
      config.json  -- names it -->         model.safetensors.index.json, model-0000N-of-....safetensors
      model.safetensors                    or one GGUF file
      (model.vision_tower.*, model.multi_modal_projector.*)

A temporary index points at the safetensors files of both, so transformers loads them as one checkpoint, with all that
it can do (`device_map`, dtype, offload, quantisation), and nothing is copied. A GGUF file is loaded by transformers'
own reader, as the language model alone. `LinkedCheckpointMixin`, at the end, is how models get all of this.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import cached_files

from .interrupted_downloads import explain_interrupted_download
from .language_model_source import (
    LanguageModelSource,
    find_language_model,
    keep_unquantized,
    load_gguf_language_model,
    make_renames,
    parse_dtype,
    rename,
    swap_language_model,
)

logger = logging.get_logger(__name__)

# What a light repository holds.
LIGHT_PREFIXES = ("model.vision_tower.", "model.multi_modal_projector.")
# What a Qwen3.5 checkpoint holds beside its language model; a file with nothing else is not fetched.
UNUSED_PREFIXES = ("model.visual.", "mtp.")
# The arguments of `from_pretrained` that say how files are fetched, from whichever repository.
FETCH_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


@contextmanager
def link_checkpoint(
    light_name: str, config: PreTrainedConfig, source: LanguageModelSource, light_options: dict, fetch_options: dict
) -> Iterator[tuple[str, dict[str, str]]]:
    """
    A temporary folder that loads as one checkpoint, of nothing but an index and configurations, and the renames
    (`key_mapping`) to load it with.

    Args:
        light_name (`str`): Repository or folder of the tower and the projector; it may hold a language model as well.
        config (`PreTrainedConfig`): What the linked model is to be.
        source (`LanguageModelSource`): Where its language model is.
        light_options, fetch_options (`dict`): How files of the light repository, and of any other, are fetched.

    Raises:
        OSError: when a file of either cannot be fetched, or is damaged.
        ValueError: when both hold a tensor of the same name.
    """
    light_tensors = find_light_tensors(light_name, light_options)
    language_tensors = find_tensors(
        source.name,
        lambda file_names: source.fetch(light_name, file_names, **fetch_options),
        is_language_tensor,
    )
    renames = make_renames(config.text_config, language_tensors)
    for name in language_tensors:
        if rename(name, renames) in light_tensors:
            raise ValueError(
                f"language_model ({source.name!r}) must not hold {name}, which {light_name!r} holds, beside its own "
                "weights in one file; save its language model alone and name that"
            )
    with TemporaryDirectory(prefix="vjepa_qwen_linked_") as folder:
        index = {"metadata": {}, "weight_map": {**light_tensors, **language_tensors}}
        with open(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME), "w", encoding="utf-8") as file:
            json.dump(index, file)
        config.to_json_file(os.path.join(folder, CONFIG_NAME), use_diff=False)
        generation_config = cached_file(
            light_name, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **light_options
        )
        if generation_config is not None:
            shutil.copy(generation_config, folder)
        yield folder, renames


def find_light_tensors(light_name: str, light_options: dict) -> dict[str, str]:
    """Path of the file of each tensor, for the files of a repository that hold the tower and the projector."""

    def fetch(file_names):
        return cached_files(light_name, file_names, _raise_exceptions_for_missing_entries=False, **light_options)

    return find_tensors(light_name, fetch, lambda name: name.startswith(LIGHT_PREFIXES))


def is_language_tensor(name: str) -> bool:
    return not name.startswith((*LIGHT_PREFIXES, *UNUSED_PREFIXES))


def find_tensors(checkpoint: str, fetch, is_needed) -> dict[str, str]:
    """Path of the file of each tensor, for all tensors of the safetensors files that hold one that is needed."""
    paths = fetch([SAFE_WEIGHTS_NAME])
    if paths is None:
        index_files = fetch([SAFE_WEIGHTS_INDEX_NAME])
        if index_files is None:
            raise OSError(
                f"checkpoint ({checkpoint!r}) must hold {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}; there is "
                "neither: check its name"
            )
        with open(index_files[0], encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        file_names = sorted({file_name for name, file_name in weight_map.items() if is_needed(name)})
        paths = fetch(file_names)
        if paths is None or len(paths) < len(file_names):
            raise OSError(
                f"checkpoint ({checkpoint!r}) must hold all files of its index ({', '.join(file_names)}): "
                "some are missing"
            )
    tensors = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update(dict.fromkeys(file.keys(), os.path.abspath(path)))
        except SafetensorError as error:
            raise OSError(
                f"{path} of checkpoint ({checkpoint!r}) must be a whole safetensors file ({error}): its download was "
                "interrupted; delete the file and try again"
            ) from error
    return tensors


def find_changed_tensor(state_dict: dict[str, torch.Tensor], config: PreTrainedConfig) -> str | None:
    """Name of the first tensor that is not what the linked language model has, None when all are. It reads them all.

    What is not comparable is passed over: packed by a quantiser, offloaded, from a GGUF file.
    """
    source = find_language_model(config)
    if source.gguf_file is not None:
        return None
    tensors = find_tensors(
        source.name,
        lambda file_names: source.fetch(config.name_or_path, file_names),
        is_language_tensor,
    )
    renames = make_renames(config.text_config, tensors)
    for path in sorted(set(tensors.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = state_dict.get(rename(name, renames))
                if tensor is None or tensor.is_meta or not tensor.is_floating_point():
                    continue
                linked = file.get_tensor(name).to(tensor.device, tensor.dtype)
                if linked.shape == tensor.shape and not torch.equal(linked, tensor):
                    return rename(name, renames)
    return None


class LinkedCheckpointMixin:
    """`from_pretrained` and `save_pretrained` of models whose language model may lie in another repository."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, language_model=None, **kwargs):
        """
        As every model's, and:

        Args:
            language_model (`str` or `os.PathLike`, *optional*):
                Takes the language model from there instead of where the checkpoint has it: `folder`, `owner/name`,
                `owner/name@revision`, or a GGUF file, `folder/file.gguf` or `owner/name[@revision]:file.gguf`.
            quantization_config (`QuantizationConfigMixin` or `dict`, *optional*):
                Reaches the language model only: tower, projector and `lm_head` stay as they are.

        Raises:
            ValueError: when the language model does not fit the projector, or tensors are missing.
            OSError: when a repository or a file cannot be fetched, or is damaged.
        """
        with explain_interrupted_download(pretrained_model_name_or_path, language_model, **kwargs):
            return cls._from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, language_model=language_model, **kwargs
            )

    @classmethod
    def _from_pretrained(cls, pretrained_model_name_or_path, *model_args, config, language_model, **kwargs):
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = keep_unquantized(kwargs["quantization_config"])
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)

        name = os.fspath(pretrained_model_name_or_path)
        fetch_options = {option: kwargs[option] for option in FETCH_OPTIONS if option in kwargs}
        light_options = {option: kwargs[option] for option in ("revision", "subfolder") if option in kwargs}
        light_options |= fetch_options
        linked_config = copy.deepcopy(config)
        if not isinstance(config, PreTrainedConfig):
            linked_config = cls.config_class.from_pretrained(config or name, **light_options)
        if language_model is not None:
            swap_language_model(linked_config, LanguageModelSource.parse(language_model), name, fetch_options)
        source = find_language_model(linked_config)
        if source is None:
            return super().from_pretrained(name, *model_args, config=config, **kwargs)

        linked_config.name_or_path = name
        for option in ("revision", "subfolder", "force_download"):  # the links lie in a temporary folder
            kwargs.pop(option, None)
        if source.gguf_file is not None:
            return cls._from_gguf(linked_config, source, light_options, fetch_options, *model_args, **kwargs)
        wants_loading_info = kwargs.pop("output_loading_info", False)
        key_mapping = kwargs.pop("key_mapping", None) or {}
        with link_checkpoint(name, linked_config, source, light_options, fetch_options) as (folder, renames):
            model, loading_info = super().from_pretrained(
                folder,
                *model_args,
                # Without one, `config.json` in the folder is read, and arguments meant for it are applied to it.
                config=linked_config if isinstance(config, PreTrainedConfig) else None,
                key_mapping={**renames, **key_mapping},
                output_loading_info=True,
                **kwargs,
            )
        if loading_info["missing_keys"]:
            raise ValueError(
                f"{name!r} and its language_model ({source.name!r}) must together hold every tensor of the model; "
                f"missing: {', '.join(sorted(loading_info['missing_keys'])[:5])}"
            )
        model.name_or_path = model.config.name_or_path = name
        return (model, loading_info) if wants_loading_info else model

    @classmethod
    def _from_gguf(cls, config, source, light_options, fetch_options, *model_args, **kwargs):
        """Puts the language model of a GGUF file where the checkpoint's own would be."""
        dtype = parse_dtype(kwargs.get("dtype"))
        language_model = load_gguf_language_model(source, config.name_or_path, fetch_options, **kwargs)
        # The model is not to be taken for one that was quantised as a whole.
        language_model.config.__dict__.pop("quantization_config", None)
        config.text_config = language_model.config
        with torch.device("meta"):
            model = cls(config, *model_args)
        model.base_model.language_model = language_model.base_model
        if model.get_output_embeddings() is not None:
            model.set_output_embeddings(language_model.get_output_embeddings())
        if any(parameter.dtype == torch.uint8 for parameter in language_model.parameters()):
            model.hf_quantizer = language_model.hf_quantizer  # which refuses to save packed blocks

        state_dicts = {"vision_tower": {}, "multi_modal_projector": {}}
        for tensor_name, path in find_light_tensors(config.name_or_path, light_options).items():
            if tensor_name.startswith(LIGHT_PREFIXES):
                _, module_name, name = tensor_name.split(".", 2)
                with safe_open(path, framework="pt") as file:
                    state_dicts[module_name][name] = file.get_tensor(tensor_name).to(language_model.device, dtype)
        for module_name, state_dict in state_dicts.items():
            model.base_model.get_submodule(module_name).load_state_dict(state_dict, strict=True, assign=True)
        generation_config = cached_file(
            config.name_or_path,
            GENERATION_CONFIG_NAME,
            _raise_exceptions_for_missing_entries=False,
            **light_options,
        )
        if generation_config is not None:
            model.generation_config = GenerationConfig.from_pretrained(os.path.dirname(generation_config))
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *,
        light: bool = False,
        save_original_format: bool = False,
        **kwargs,
    ):
        """
        As every model's: everything is written, the language model too, and loads again without its repository.

        Args:
            light (`bool`, *optional*, defaults to `False`):
                Write the tower and the projector only, with a link to the language model: the configuration's
                `language_model_name_or_path`.
            save_original_format (`bool`, *optional*, defaults to `False`):
                Left to the default, tensors are written under this model's names, wherever they were loaded from.

        Raises:
            ValueError: for `light=True`, when there is no link, or the language model was changed since it was loaded.
        """
        config = self.config
        link = (config.language_model_name_or_path, config.language_model_revision)
        quantizer = getattr(self, "hf_quantizer", None)
        quantization_config = None
        if light:
            state_dict = self._light_state_dict(self.state_dict() if state_dict is None else state_dict)
            if quantizer is not None:
                self.hf_quantizer = None  # it would write all of its weights
                if not quantizer.pre_quantized:
                    # The linked weights are not quantised; whoever loads them decides.
                    quantization_config = config.__dict__.pop("quantization_config")
                    logger.warning("light=True: the quantisation is not saved, pass quantization_config= when loading")
        else:
            config.language_model_name_or_path = config.language_model_revision = None
        try:
            super().save_pretrained(
                save_directory, is_main_process, state_dict, save_original_format=save_original_format, **kwargs
            )
        finally:
            config.language_model_name_or_path, config.language_model_revision = link
            if quantizer is not None:
                self.hf_quantizer = quantizer
            if quantization_config is not None:
                config.quantization_config = quantization_config

    def _light_state_dict(self, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What a light repository holds, once it is certain that nothing else would be lost."""
        linked = self.config.language_model_name_or_path
        if linked is None:
            raise ValueError(
                "language_model_name_or_path of the configuration (None) must name the language model for light=True; "
                "set it, or save everything with light=False"
            )
        changed = find_changed_tensor(state_dict, self.config)
        if changed is not None:
            raise ValueError(
                f"light (True) must not lose anything, but {changed} is not what {linked!r} holds; save everything "
                "with light=False"
            )
        return {name: tensor for name, tensor in state_dict.items() if name.startswith(LIGHT_PREFIXES)}
