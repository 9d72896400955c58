"""Where a language model comes from, and how it is made to fit: names, renames, quantisation, GGUF files.

What `linked_checkpoint.py` builds on. A source is written `folder`, `owner/name`, `owner/name@revision`,
`folder/file.gguf` or `owner/name@revision:file.gguf`.
"""

import copy
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import CONFIG_NAME, logging
from transformers.utils.hub import cached_files, extract_commit_hash

logger = logging.get_logger(__name__)

# What no quantiser touches.
UNQUANTIZED_MODULES = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
# The names under which quantisation configurations list the modules to leave alone.
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")


@dataclass(frozen=True)
class LanguageModelSource:
    """
    Where a language model's weights are.

    Attributes:
        name (`str`): Repository on the Hub, or folder.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        gguf_file (`str`, *optional*): Name of a GGUF file in it, instead of safetensors files.
    """

    name: str
    revision: str | None = None
    gguf_file: str | None = None

    @classmethod
    def parse(cls, text: str | os.PathLike) -> "LanguageModelSource":
        """Of `folder`, `folder/file.gguf`, `owner/name`, `owner/name@revision` or `owner/name@revision:file.gguf`."""
        text = os.fspath(text)
        if os.path.isfile(text) and text.endswith(".gguf"):
            return cls(os.path.dirname(os.path.abspath(text)), None, os.path.basename(text))
        if os.path.isdir(text):
            return cls(text)
        match = re.fullmatch(r"([^@:]+)(?:@([^:]+))?(?::(.+\.gguf))?", text)
        if match is None or text.endswith(".gguf") and match[3] is None:
            raise ValueError(
                f"language_model ({text!r}) must be a folder, a GGUF file, or a repository on the Hub; write "
                "'owner/name', 'owner/name@revision' or 'owner/name@revision:file.gguf'"
            )
        return cls(*match.groups())

    def fetch(self, light_name: str, file_names: Iterable[str], **fetch_options) -> list[str] | None:
        """The paths of files of the language model, None when one is not there; says who wanted it when that fails."""
        try:
            return cached_files(
                self.name,
                list(file_names),
                revision=self.revision,
                _raise_exceptions_for_missing_entries=False,
                **fetch_options,
            )
        except OSError as error:
            raise OSError(
                f"language_model ({self.name!r}, revision {self.revision or 'main'!r}), to which {light_name!r} is "
                f"linked, could not be fetched: {error}\nCheck its name and your access to it, or pass another one "
                "with `language_model=`"
            ) from error


def find_language_model(config: PreTrainedConfig) -> LanguageModelSource | None:
    """The language model that a light repository's configuration names, None when the checkpoint is whole."""
    if config.language_model_name_or_path is None:
        return None
    source = LanguageModelSource.parse(config.language_model_name_or_path)
    return LanguageModelSource(source.name, config.language_model_revision or source.revision, source.gguf_file)


def swap_language_model(config: PreTrainedConfig, source: LanguageModelSource, light_name: str, fetch_options: dict):
    """
    Rewrites `config` for another language model than the one that it was made for.

    Raises:
        ValueError: when the projector, made for another width, does not fit it.
        OSError: when it cannot be fetched.
    """
    config_file = source.fetch(light_name, [source.gguf_file or CONFIG_NAME], **fetch_options)
    if config_file is None:
        raise OSError(
            f"language_model ({source.name!r}) must be a repository or folder with {source.gguf_file or CONFIG_NAME}; "
            "check its name, your access and, offline, that it is in the cache"
        )
    folder = os.path.dirname(config_file[0])
    gguf_options = {"gguf_file": os.path.basename(source.gguf_file)} if source.gguf_file is not None else {}
    if PreTrainedConfig.get_config_dict(folder, **gguf_options)[0].get("model_type") == config.model_type:
        whole_config = type(config).from_pretrained(folder)  # the language model of another VJepaQwen
    else:
        whole_config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **gguf_options)
    text_config = whole_config.get_text_config(decoder=True)
    if text_config.hidden_size != config.text_config.hidden_size:
        raise ValueError(
            f"language_model ({source.name!r}, hidden_size {text_config.hidden_size}) must have the width that the "
            f"projector of {light_name!r} was trained for ({config.text_config.hidden_size}); use another language "
            "model, or train a projector for this one"
        )
    if text_config.vocab_size != config.text_config.vocab_size:
        logger.warning(
            f"language_model ({source.name!r}) has {text_config.vocab_size} token ids, the one of {light_name!r} "
            f"{config.text_config.vocab_size}: make sure that its tokenizer is the one of the processor"
        )
    # A checkpoint that is quantised already says so in its own configuration, in its own names.
    quantization_config = getattr(whole_config, "quantization_config", None)
    text_config.__dict__.pop("quantization_config", None)
    config.text_config = text_config
    if quantization_config is not None and source.gguf_file is None:
        config.quantization_config = keep_unquantized(quantization_config, text_config)
    config.tie_word_embeddings = text_config.tie_word_embeddings or whole_config.tie_word_embeddings
    config.language_model_name_or_path = source.name + (f":{source.gguf_file}" if source.gguf_file else "")
    # The commit pins what was loaded, whatever the branch points at later.
    config.language_model_revision = extract_commit_hash(config_file[0], None) or source.revision


def keep_unquantized(quantization_config, text_config: PreTrainedConfig | None = None):
    """
    A copy of a quantisation configuration (object or `dict`) that leaves the tower, the projector and `lm_head` as
    they are, whatever else it leaves alone.

    Args:
        quantization_config (`QuantizationConfigMixin` or `dict`): Of any method that can leave modules alone.
        text_config (`PreTrainedConfig`, *optional*): Given when the modules that are listed already are named as in
            the language model's own checkpoint.

    Raises:
        ValueError: when the method has no list of modules to leave alone.
    """
    quantization_config = copy.deepcopy(quantization_config)
    is_dict = isinstance(quantization_config, dict)
    fields = quantization_config if is_dict else vars(quantization_config)
    names = [name for name in SKIP_LISTS if name in fields]
    if not names and is_dict:
        # A `dict` may leave it out; its method's name tells which one is meant.
        method = str(fields.get("quant_method", ""))
        is_bitsandbytes = method.startswith("bitsandbytes") or any(name.startswith("load_in_") for name in fields)
        names = ["llm_int8_skip_modules" if is_bitsandbytes else "modules_to_not_convert"]
    if not names:
        raise ValueError(
            f"quantization_config ({type(quantization_config).__name__}) must have a list of modules to leave alone "
            f"({', '.join(SKIP_LISTS)}): tower and projector are not quantised; use bitsandbytes, torchao or a GGUF "
            "file"
        )
    for name in names:
        listed = list(fields.get(name) or [])
        if text_config is not None:
            renames = make_renames(text_config, [module for module in listed if ".language_model." in module])
            listed = [rename(module, renames) for module in listed]
        fields[name] = listed + [module for module in UNQUANTIZED_MODULES if module not in listed]
    return quantization_config


def make_renames(text_config: PreTrainedConfig, names: Iterable[str]) -> dict[str, str]:
    """Patterns, and what to put for them, that turn a language model's own names into this model's."""
    if any(name.startswith("model.language_model.") for name in names):
        return {}  # a checkpoint with towers of its own, as Qwen3.5's: the names are these already
    prefix = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)].base_model_prefix
    # The light repository's own names go through the same renames.
    renames = {rf"^{prefix}\.(?!vision_tower\.|multi_modal_projector\.)": "model.language_model."}
    # The head is what stands beside the model, whatever its name ("embed_out" in GPT-NeoX).
    heads = {name.split(".")[0] for name in names} - {prefix, "mtp"}
    if len(heads) == 1 and heads != {"lm_head"}:
        renames[rf"^{heads.pop()}\."] = "lm_head."
    return renames


def rename(name: str, renames: dict[str, str]) -> str:
    for pattern, replacement in renames.items():
        name = re.sub(pattern, replacement, name)
    return name


def load_gguf_language_model(source: LanguageModelSource, light_name: str, fetch_options: dict, **kwargs):
    """
    Loads a language model from a GGUF file: packed where transformers has kernels for it, else unpacked, with a
    warning that names the memory it takes.

    Args:
        source (`LanguageModelSource`): With a `gguf_file`.
        light_name (`str`): Who wants it, for errors.
        fetch_options (`dict`): How files are fetched.
        kwargs: To `AutoModelForCausalLM.from_pretrained`.

    Returns:
        `PreTrainedModel`: The causal language model.
    """
    # Not at the top: only here does anything depend on these internals.
    from transformers.integrations.gguf.kernels import get_gguf_kernel
    from transformers.integrations.gguf.reader import read_gguf_metadata
    from transformers.integrations.gguf.utils import is_gguf_arch_supported

    paths = source.fetch(light_name, [source.gguf_file], **fetch_options)
    if paths is None:
        raise OSError(f"language_model ({source.name!r}) must have the file {source.gguf_file!r}; check its name")
    folder, gguf_file = os.path.split(paths[0])
    config = AutoConfig.from_pretrained(folder, gguf_file=gguf_file)
    metadata, _ = read_gguf_metadata(paths[0])
    if not (is_gguf_arch_supported(metadata["general.architecture"]) and get_gguf_kernel()):
        with torch.device("meta"):
            num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
        dtype = kwargs.get("dtype", "auto")
        dtype = (
            torch.float32 if dtype in (None, "auto") else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        )
        file_gigabytes = os.path.getsize(paths[0]) / 1e9
        gigabytes = num_parameters * dtype.itemsize / 1e9
        if gigabytes > 1.1 * file_gigabytes:
            logger.warning(
                f"{gguf_file} will be unpacked: its {file_gigabytes:.3g} GB take {gigabytes:.3g} GB of memory in "
                f"{dtype}. transformers keeps it packed on a GPU, for the architecture qwen35, with the package "
                "`kernels`; `dtype=torch.bfloat16` halves the memory"
            )
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, **kwargs)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """None stands for "as it is saved"."""
    if dtype in (None, "auto"):
        return None
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
