"""Configuration of VJepaQwen: a V-JEPA 2 tower, an event projector and a causal language model.

`VJepaQwenConfig()` describes the real model, V-JEPA 2 ViT-L and Qwen3.5-27B:

    >>> from vjepa_qwen import VJepaQwenConfig
    >>> config = VJepaQwenConfig()
    >>> config.vision_config.hidden_size, config.projector_hidden_size, config.text_config.hidden_size
    (1024, 10240, 5120)
"""

import copy
import os

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.dynamic_module_utils import custom_object_save

# Qwen3.5-27B's text configuration. The class defaults of `qwen3_5_text` are the 9B's.
QWEN3_5_27B_TEXT_CONFIG = {
    "vocab_size": 248320,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 64,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "eos_token_id": 248044,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}

# `register_for_auto_class` remembers one auto class; the whole map is written whenever a configuration is saved.
AUTO_MAP = {
    "AutoConfig": "configuration_vjepa_qwen.VJepaQwenConfig",
    "AutoModel": "modeling_vjepa_qwen.VJepaQwenForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_vjepa_qwen.VJepaQwenForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_vjepa_qwen.VJepaQwenForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_vjepa_qwen.VJepaQwenForConditionalGeneration",
    "AutoProcessor": "processing_vjepa_qwen.VJepaQwenProcessor",
    "AutoVideoProcessor": "video_processing_vjepa_qwen.VJepaQwenVideoProcessor",
}

# The same for `pipeline(model=repo)`, which then needs no task: what `Pipeline.save_pretrained` would write.
CUSTOM_PIPELINES = {"video-text-to-text": {"impl": "pipeline_vjepa_qwen.VJepaQwenPipeline", "pt": ["AutoModel"]}}


@strict
class VJepaQwenConfig(PreTrainedConfig):
    r"""
    Configuration of [`VJepaQwenForConditionalGeneration`].

    Args:
        vision_config (`VJEPA2Config` or `dict`, *optional*):
            The tower. Defaults to `facebook/vjepa2-vitl-fpc64-256`, the class defaults of `VJEPA2Config`.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Any text model that `AutoModelForCausalLM` knows; a `dict` needs its `model_type`. Defaults to the text
            model of Qwen3.5-27B.
        projector_hidden_size (`int`, *optional*, defaults to 10240):
            Width of the projector's two hidden layers (the research release's: 1024 > 10240 > 10240 > 5120).
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the projector's layers, a name of `transformers.activations.ACT2FN`.
        video_token_id (`int`, *optional*, defaults to 248057):
            Vocabulary id of the placeholder that stands for one event.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether `lm_head` shares its weight with the input embeddings. `True` as well when `text_config` says so.
        language_model_name_or_path (`str`, *optional*):
            Of a light checkpoint, which holds the tower and the projector only: the repository, folder or GGUF file
            (`owner/name:file.gguf`) that the language model is taken from when loading.
        language_model_revision (`str`, *optional*):
            Commit (or branch or tag) of that repository.

    Raises:
        ValueError: when `video_token_id` is not an id of the text model's vocabulary.
    """

    model_type = "vjepa_qwen"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vjepa2"),
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="qwen3_5_text", init_kwargs=QWEN3_5_27B_TEXT_CONFIG
        ),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_hidden_size: int = 10240
    projector_hidden_act: str = "gelu"
    video_token_id: int = 248057
    tie_word_embeddings: bool = False
    language_model_name_or_path: str | None = None
    language_model_revision: str | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Text models keep this flag in their own configuration; the loaders look for it here.
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        if not 0 <= self.video_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"video_token_id ({self.video_token_id}) must be an id of the text model's vocabulary "
                f"(0 to {self.text_config.vocab_size - 1}); take it from the tokenizer: "
                "`tokenizer.convert_tokens_to_ids('<|video_pad|>')`"
            )

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """
        Saves as every configuration does, with the maps that let the Auto classes and `pipeline` find all of the
        remote code, and with the pipeline's code, which no other file needs.
        """
        from .pipeline_vjepa_qwen import VJepaQwenPipeline

        self.auto_map = dict(AUTO_MAP)
        self.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        super().save_pretrained(save_directory, **kwargs)
        custom_object_save(VJepaQwenPipeline, save_directory)


VJepaQwenConfig.register_for_auto_class()

__all__ = ["VJepaQwenConfig"]
