"""vjepa_qwen: few-token, event-based video understanding.

V-JEPA 2 sees, event segmentation cuts, a small projector translates, Qwen3.5-27B speaks. Names are imported when they
are first used: `vjepa-qwen --help` must not wait for torch.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# A small trained model that is installed with the package; what it is and is not stands in the README.
TOY_CHECKPOINT = str(Path(__file__).parent / "toy" / "checkpoint")

_MODULES = {
    "EventSegmenter": "event_segmentation",
    "EventSegmentation": "event_segmentation",
    "VJepaQwenConfig": "configuration_vjepa_qwen",
    "VJepaQwenForConditionalGeneration": "modeling_vjepa_qwen",
    "VJepaQwenModel": "modeling_vjepa_qwen",
    "VJepaQwenPipeline": "pipeline_vjepa_qwen",
    "VJepaQwenProcessor": "processing_vjepa_qwen",
    "VJepaQwenVideoProcessor": "video_processing_vjepa_qwen",
    "VideoDecodingError": "video_decoding",
    "VideoEvents": "processing_vjepa_qwen",
}

__all__ = ["TOY_CHECKPOINT", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
