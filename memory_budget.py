"""The memory that inference or training needs, line by line, and how each line is computed: `vjepa-qwen memory`.

    vjepa-qwen memory                                    # the real model, in bfloat16
    vjepa-qwen memory --quantization Q4_K_M              # its language model as a GGUF file
    vjepa-qwen memory --model REPO --quantization nf4 --context 32768
    vjepa-qwen memory --stage lora --batch-size 4        # training instead (`training/memory.py`)

Nothing is loaded or downloaded but `config.json`: the model is built on PyTorch's meta device, whose tensors have
shapes and no values, and the largest sum of intermediate results is counted while it runs there.
"""

import argparse
import copy
import json
import os
import weakref
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModel

from .configuration_vjepa_qwen import VJepaQwenConfig
from .modeling_vjepa_qwen import VJepaQwenForConditionalGeneration, VJepaQwenVisionTower

# Bits for each parameter in GGUF files of Qwen3.5-27B: size of the file on the Hub / 26.9 billion. A file holds
# matrices of several kinds, so this is the mean of a whole file.
GGUF_BITS = {
    "Q2_K": 3.12,
    "Q3_K_S": 3.93,
    "IQ4_XS": 4.37,
    "Q4_K_M": 4.91,
    "Q5_K_M": 5.77,
    "Q6_K": 6.57,
    "Q8_0": 8.60,
}
# Bits for each parameter of the linear layers, with their scales: one float32 for 64 weights, or for a row.
LINEAR_BITS = {"nf4": 4.5, "int8": 8.0}
# Libraries, kernels and their workspaces on one GPU; measured on none in particular.
CONTEXT_BYTES = 600e6


@dataclass(frozen=True)
class BudgetLine:
    """One item of the budget: its name, its bytes and how they were computed."""

    name: str
    num_bytes: float
    how: str


def estimate_memory(
    config: VJepaQwenConfig,
    *,
    quantization: str | None = None,
    context: int = 8192,
    batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> list[BudgetLine]:
    """
    The memory of one device that runs inference.

    Args:
        config (`VJepaQwenConfig`): The model.
        quantization (`str`, *optional*):
            Of the language model: a name of `GGUF_BITS` or `LINEAR_BITS`, or the path of a GGUF file.
        context (`int`, *optional*, defaults to 8192): Tokens of prompt and answer; all are taken as one prompt.
        batch_size (`int`, *optional*, defaults to 1): Prompts at a time.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): Of what is not quantised.

    Returns:
        `list[BudgetLine]`: Weights by module, cache, states, activations, context.

    Raises:
        ValueError: for a quantisation that is not known.
    """
    is_file = quantization is not None and os.path.isfile(quantization)
    if quantization is not None and not is_file and quantization not in (*GGUF_BITS, *LINEAR_BITS):
        raise ValueError(
            f"quantization ({quantization}) must be the path of a GGUF file or one of "
            f"{', '.join((*GGUF_BITS, *LINEAR_BITS))}"
        )
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = VJepaQwenForConditionalGeneration(config)
    lines = _count_weights(model, quantization, is_file, dtype)
    lines += _count_cache(config.text_config, context, batch_size, dtype)
    activations = max(
        _run_language_model(config.text_config, context, batch_size, dtype),
        _run_tower(config.vision_config, dtype),
        key=lambda line: line.num_bytes,
    )
    lines.append(activations)
    if is_file or quantization in GGUF_BITS:
        matrices = [module.weight.numel() for module in model.model.language_model.modules() if _is_linear(module)]
        lines.append(
            BudgetLine(
                "matrix being unpacked",
                max(matrices) * dtype.itemsize,
                f"{max(matrices):,} parameters x {dtype.itemsize} bytes: a prompt is multiplied by one at a time",
            )
        )
    lines.append(BudgetLine("device context", CONTEXT_BYTES, "assumed: libraries, kernels and their workspaces"))
    return lines


def _count_weights(model, quantization: str | None, is_file: bool, dtype: torch.dtype) -> list[BudgetLine]:
    def line(name, num_parameters, bits=dtype.itemsize * 8, what=None):
        how = f"{num_parameters:,} parameters x {bits:g} bits ({what or str(dtype).removeprefix('torch.')})"
        return BudgetLine(name, num_parameters * bits / 8, how)

    lines = [
        line("vision tower", model.model.vision_tower.num_parameters()),
        line("projector", sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())),
    ]
    embeddings = model.get_input_embeddings().weight.numel()
    head = 0 if model.config.tie_word_embeddings else model.lm_head.weight.numel()
    rest = model.model.language_model.num_parameters() - embeddings
    if is_file:
        how = f"size of {os.path.basename(quantization)}"
        return [*lines, BudgetLine("language model", os.path.getsize(quantization), how)]
    if quantization in GGUF_BITS:
        bits, what = GGUF_BITS[quantization], f"{quantization}, mean of the whole file"
        return [
            *lines,
            line("embeddings", embeddings, bits, what),
            line("language model's layers", rest, bits, what),
            line("lm_head", head, bits, what),
        ]
    linear = sum(module.weight.numel() for module in model.model.language_model.modules() if _is_linear(module))
    lines.append(line("embeddings", embeddings))
    if quantization is None:
        lines.append(line("language model's layers", rest))
    else:
        lines.append(line("linear layers", linear, LINEAR_BITS[quantization], quantization))
        lines.append(line("norms and convolutions", rest - linear))
    return [*lines, line("lm_head", head)]


def _count_cache(config, context: int, batch_size: int, dtype: torch.dtype) -> list[BudgetLine]:
    # Configurations of models with one kind of layer need not list it.
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    num_linear = layer_types.count("linear_attention")
    num_attention = len(layer_types) - num_linear
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    lines = [
        BudgetLine(
            "KV cache",
            num_attention * 2 * num_heads * head_dim * dtype.itemsize * context * batch_size,
            f"{num_attention} attention layers x 2 (keys, values) x {num_heads} heads x {head_dim} x {dtype.itemsize} "
            f"bytes x {context} tokens x {batch_size} prompts",
        )
    ]
    if num_linear:
        heads, key_dim, value_dim = (
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )
        channels = 2 * config.linear_num_key_heads * key_dim + heads * value_dim
        kernel = config.linear_conv_kernel_dim
        lines.append(
            BudgetLine(
                "DeltaNet state",
                num_linear * (heads * key_dim * value_dim * 4 + channels * kernel * dtype.itemsize) * batch_size,
                f"{num_linear} linear layers x ({heads} heads x {key_dim} x {value_dim} x 4 bytes + {channels} "
                f"channels x {kernel} x {dtype.itemsize} bytes of convolution) x {batch_size} prompts",
            )
        )
    return lines


def _run_language_model(config, context: int, batch_size: int, dtype: torch.dtype) -> BudgetLine:
    """Of one layer of each kind: in inference nothing is kept from layer to layer."""
    config = copy.deepcopy(config)
    layer_types = getattr(config, "layer_types", None)
    kinds = list(dict.fromkeys(layer_types)) if layer_types else None
    config.num_hidden_layers = len(kinds) if kinds else 1
    if kinds:
        config.layer_types = kinds
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=dtype, attn_implementation=NO_SCORES)
        input_ids = torch.zeros(batch_size, context, dtype=torch.long)
    peak = _track_peak(model, input_ids=input_ids)
    return BudgetLine(
        "activations",
        peak,
        f"peak of a prompt of {context} tokens x {batch_size} through one layer of each kind, on the meta device",
    )


def _run_tower(config, dtype: torch.dtype) -> BudgetLine:
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        tower = VJepaQwenVisionTower._from_config(config, dtype=dtype, attn_implementation=NO_SCORES)
        frames = torch.zeros(1, config.frames_per_clip, 3, config.crop_size, config.crop_size, dtype=dtype)
    peak = _track_peak(tower, pixel_values_videos=frames)
    how = f"peak of a window of {config.frames_per_clip} frames through one layer of the tower, on the meta device"
    return BudgetLine("activations", peak, how)


def _track_peak(model, **inputs) -> int:
    with torch.no_grad(), PeakTracker(model) as tracker:
        model.eval()(**inputs)
    return tracker.peak


class PeakTracker(TorchDispatchMode):
    """Counts the bytes of all results that are alive at the same time, weights left out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
        self.users, self.sizes = {}, {}
        self.peak = self.current = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.weights:
                self._add(tensor)
        return result

    def _add(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.users:
            self.users[key], self.sizes[key] = 0, storage.nbytes()
            self.current += self.sizes[key]
            self.peak = max(self.peak, self.current)
        self.users[key] += 1
        weakref.finalize(tensor, self._remove, key)

    def _remove(self, key: int):
        self.users[key] -= 1
        if self.users[key] == 0:
            del self.users[key]
            self.current -= self.sizes.pop(key)


class _AttentionWithoutScores(torch.autograd.Function):
    """Shapes of an attention that never holds all of its scores, as SDPA's and FlashAttention's kernels do not."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attend_without_scores(module, query, key, value, attention_mask, **kwargs):
    return _AttentionWithoutScores.apply(query, key, value), None


NO_SCORES = "vjepa_qwen_no_scores"
AttentionInterface.register(NO_SCORES, _attend_without_scores)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def main(arguments: list[str] | None = None):
    options = parse_arguments(arguments)
    config = VJepaQwenConfig() if options.model is None else VJepaQwenConfig.from_pretrained(options.model)
    size = {"batch_size": options.batch_size, "dtype": getattr(torch, options.dtype)}
    if options.stage is None:
        lines = estimate_memory(config, quantization=options.quantization, context=options.context or 8192, **size)
    else:
        from .training.memory import estimate_training_memory  # the only line of inference's files that needs training

        if options.quantization is not None:
            raise ValueError(
                f"quantization ({options.quantization}) must not be given with --stage: training keeps the frozen "
                "weights in --dtype"
            )
        lines = estimate_training_memory(config, stage=options.stage, context=options.context or 1024, **size)
    total = sum(line.num_bytes for line in lines)
    if options.json:
        print(json.dumps({"lines": [asdict(line) for line in lines], "total_bytes": total}, indent=2))
        return
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f"{line.name:<{width}}  {line.num_bytes / 1e9:8.3f} GB  {line.how}")
    print(f"{'total':<{width}}  {total / 1e9:8.3f} GB")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vjepa-qwen memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="repository or folder (default: V-JEPA 2 ViT-L and Qwen3.5-27B)")
    parser.add_argument(
        "--quantization",
        help=f"of the language model: {', '.join((*GGUF_BITS, *LINEAR_BITS))}, or a GGUF file (default: none)",
    )
    parser.add_argument("--stage", choices=("projector", "lora"), help="of `vjepa-qwen train`: memory of training")
    parser.add_argument("--context", type=int, help="tokens of prompt and answer (default: 8192; 1024 with --stage)")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts or samples at a time (default: 1)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
