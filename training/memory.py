"""The memory of one device that trains, line by line: `vjepa-qwen memory --stage projector|lora`.

As for inference nothing is loaded: one whole training step, forward and backward through all layers, runs on PyTorch's
meta device, and the largest sum of results that are alive at the same time is counted. What is assumed is what
`vjepa-qwen train` does: frozen weights in bfloat16, trained ones, their gradients and AdamW's two moments in float32,
mixed precision, every layer of language model and tower computed again for its backward pass.
"""

import copy

import torch
from torch import nn

from ..configuration_vjepa_qwen import VJepaQwenConfig
from ..memory_budget import CONTEXT_BYTES, NO_SCORES, BudgetLine, PeakTracker
from ..modeling_vjepa_qwen import VJepaQwenForConditionalGeneration
from .train import VJepaQwenArguments, prepare_model

# At most, in one window of the tower (`EventSegmenter.max_events`).
EVENTS_PER_VIDEO = 15


def estimate_training_memory(
    config: VJepaQwenConfig,
    *,
    stage: str,
    context: int = 1024,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> list[BudgetLine]:
    """
    The memory of one device that trains on videos of one window each.

    Args:
        config (`VJepaQwenConfig`): The model.
        stage (`str`): `"projector"`, from cached features, or `"lora"`, from frames.
        context (`int`, *optional*, defaults to 1024): Tokens of each sample, prompt, events and answer.
        batch_size (`int`, *optional*, defaults to 1): Samples at a time (`--per_device_train_batch_size`).
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Of the frozen weights and of the computation.

    Returns:
        `list[BudgetLine]`: Weights by module, gradients, optimiser, activations, context.

    Raises:
        ValueError: when `context` leaves no place for the events.
    """
    if context <= EVENTS_PER_VIDEO:
        raise ValueError(f"context ({context}) must be more than the {EVENTS_PER_VIDEO} events of a video; try 1024")
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = VJepaQwenForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=NO_SCORES)
        prepare_model(model, VJepaQwenArguments(dataset="", stage=stage))
    lines, num_trained = [], 0
    for part, title in (
        ("vision_tower.", "vision tower"),
        ("multi_modal_projector.", "projector"),
        ("language_model.", "language model"),
        ("lm_head.", "lm_head"),
    ):
        parameters = [parameter for name, parameter in model.named_parameters() if part in name]
        frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        num_trained += trained
        if frozen:
            lines.append(
                BudgetLine(title, frozen * dtype.itemsize, f"{frozen:,} frozen parameters x {dtype.itemsize} bytes")
            )
        if trained:
            # Autocast casts what is trained for each step and keeps the copy until the step's end.
            size = 4 + (dtype.itemsize if dtype != torch.float32 else 0)
            how = f"{trained:,} trained parameters x {size} bytes: float32, and autocast's copies in the compute dtype"
            lines.append(BudgetLine(f"{title}, trained", trained * size, how))
    lines += [
        BudgetLine("gradients", num_trained * 4, f"{num_trained:,} trained parameters x 4 bytes"),
        BudgetLine("optimizer", num_trained * 8, f"{num_trained:,} trained parameters x 2 moments of AdamW x 4 bytes"),
        BudgetLine(
            "activations",
            _run_training_step(model.to(dtype), stage, context, batch_size),
            f"peak of a training step of {batch_size} samples of {context} tokens, forward and backward through all "
            "layers with activation checkpointing, on the meta device",
        ),
        BudgetLine("device context", CONTEXT_BYTES, "assumed: libraries, kernels and their workspaces"),
    ]
    return lines


def _run_training_step(model: nn.Module, stage: str, context: int, batch_size: int) -> int:
    """Bytes at the peak of a step. The copies of the trained weights are counted elsewhere, so all weights have the
    dtype of the computation here, and gradients, counted as well, are dropped where they would be accumulated."""
    vision, dtype = model.config.vision_config, model.dtype
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    model.train()
    model.activation_checkpointing_enable()
    num_steps = vision.frames_per_clip // vision.tubelet_size
    with torch.device("meta"):
        features = torch.zeros(batch_size, num_steps, vision.hidden_size)
        frames = torch.zeros(batch_size, vision.frames_per_clip, 3, vision.crop_size, vision.crop_size, dtype=dtype)
        text_ids = torch.zeros(batch_size, context - EVENTS_PER_VIDEO, dtype=torch.long)
        labels = torch.zeros(batch_size, context, dtype=torch.long)
    with PeakTracker(model) as tracker:
        if stage == "lora":  # one video after the other, as `VJepaQwenModel` encodes them
            encoded = [model.model.vision_tower(window.unsqueeze(0)).pooler_output for window in frames]
            features = torch.cat(encoded)
        # The meta device has no values to compare, so events are put in front instead of over their placeholders.
        steps = features[:, :EVENTS_PER_VIDEO]
        if steps.shape[1] < EVENTS_PER_VIDEO:  # a tower with few steps in a window
            steps = steps[:, :1].expand(-1, EVENTS_PER_VIDEO, -1)
        events = model.model.multi_modal_projector(steps)
        embeddings = torch.cat([events, model.get_input_embeddings()(text_ids).to(events.dtype)], dim=1)
        model(inputs_embeds=embeddings, labels=labels, use_cache=False).loss.backward()
    return tracker.peak
