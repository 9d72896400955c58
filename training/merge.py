"""Puts what was trained into the model it was trained from and writes an ordinary checkpoint.

    vjepa-qwen merge TRAINED OUT [--model REPO]

TRAINED is a checkpoint or the output folder of `vjepa-qwen train`. The LoRA is folded into the tower, the projector
takes its place, and OUT loads like any other checkpoint, without PEFT.
"""

import argparse

from peft.tuners.tuners_utils import BaseTunerLayer

from ..modeling_vjepa_qwen import VJepaQwenForConditionalGeneration
from ..processing_vjepa_qwen import VJepaQwenProcessor
from .trainer import base_model_of, load_trained


def merge_adapter(model):
    """
    Folds the LoRA of the tower into its weights, in place; the model is an ordinary one then.

    Args:
        model (`VJepaQwenForConditionalGeneration`): With an adapter, as [`load_trained`] returns it.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model._hf_peft_config_loaded = False
    del model.peft_config
    return model


def merge(trained: str, out: str, *, model: str | None = None, revision: str = "main", event_tower: str | None = None):
    """
    Args:
        trained (`str`): Folder with what was trained.
        out (`str`): Folder to write.
        model (`str`, *optional*): The checkpoint the training started from, where it is not found any more.
        revision (`str`): Its branch, tag or commit.
        event_tower (`str`, *optional*): `"adapted"` changes the rule of an adapter trained with `"base"`.

    Raises:
        ValueError: when videos are cut by the tower without the LoRA, which is lost by merging.
    """
    base = model or base_model_of(trained)
    processor = VJepaQwenProcessor.from_pretrained(trained)
    merged = VJepaQwenForConditionalGeneration.from_pretrained(base, revision=revision, dtype="auto")
    load_trained(merged, trained)
    if merged._hf_peft_config_loaded:
        processor.event_tower = event_tower or processor.event_tower
        if processor.event_tower == "base":
            raise ValueError(
                f"event_tower ('base') of {trained} must be 'adapted' to be merged: its videos are cut by the tower "
                "without the LoRA, which a merged checkpoint does not have; keep the adapter (`load_trained`), train "
                "with --event_tower adapted, or accept other cuts than in training with --event-tower adapted"
            )
        merge_adapter(merged)
    merged.save_pretrained(out)
    processor.save_pretrained(out)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="vjepa-qwen merge", description="Write an ordinary checkpoint.")
    parser.add_argument("trained", help="checkpoint or output folder of `vjepa-qwen train`")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--model", help="the checkpoint the training started from; by default as noted in TRAINED")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model")
    parser.add_argument("--event-tower", choices=["adapted"], help="change the rule that cuts the videos")
    arguments = parser.parse_args(argv)
    merge(
        arguments.trained,
        arguments.out,
        model=arguments.model,
        revision=arguments.revision,
        event_tower=arguments.event_tower,
    )


if __name__ == "__main__":
    main()
