"""Three parts of the V-JEPA 2 encoder, faster or more exact than transformers' and with the same parameter names.

    PatchConvolution       a matrix product: the bfloat16 Conv3d of CPUs is about ten times slower
    RotaryAttention        angles in float32: bfloat16 puts them up to 0.034 radians off within a window of 32 steps
    "vjepa_qwen_tower"     attention function for `attn_implementation`: SDPA, but for bfloat16 on CPUs blocks of plain
                           matrix products, where torch's SDPA is no faster than in float32

`VJepaQwenVisionTower` puts them into transformers' `VJEPA2Encoder`; `attn_implementation="sdpa"`, `"eager"` or
`"flash_attention_2"` choose another attention function. Speed: `python -m benchmarks.tower`.
"""

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2RopeAttention

TOWER_ATTENTION = "vjepa_qwen_tower"
# Scores of so many queries with all keys of a 16-frame window are 1 MB, which stays in a core's second-level cache.
QUERIES_PER_BLOCK = 256
ROTARY_BASE = 10000


class PatchConvolution(nn.Conv3d):
    """A convolution whose stride is its kernel, as the matrix product that it is."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """`(batch, channels, num_frames, height, width)` to `(batch, hidden, num_steps, rows, columns)`."""
        steps, rows, columns = (size // patch for size, patch in zip(frames.shape[2:], self.kernel_size, strict=True))
        depth, height, width = self.kernel_size
        frames = frames[:, :, : steps * depth, : rows * height, : columns * width]  # as a convolution leaves them out
        patches = frames.unflatten(4, (columns, width)).unflatten(3, (rows, height)).unflatten(2, (steps, depth))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        embeddings = nn.functional.linear(patches, self.weight.flatten(1), self.bias)
        return embeddings.transpose(1, 2).unflatten(2, (steps, rows, columns))


class RotaryAttention(VJEPA2RopeAttention):
    """V-JEPA 2's attention with rotary angles, and the rotation itself, in float32 whatever the activations are."""

    def apply_rotary_embeddings(self, qk: torch.Tensor, pos_ids: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """
        Args:
            qk (`torch.Tensor` of shape `(batch, heads, tokens, head size)`): Queries or keys.
            pos_ids (`tuple` of three `torch.LongTensor` of shape `(tokens,)`): Step, row and column of each token.

        Returns:
            `torch.Tensor` of the shape and dtype of `qk`.
        """
        size = self.d_dim  # of the part that each of the three positions turns
        exponents = torch.arange(size // 2, dtype=torch.float32, device=qk.device) / (size / 2)
        frequencies = 1.0 / ROTARY_BASE**exponents
        # Each angle list twice in a row, although it is neighbours that turn together: V-JEPA 2 was trained so.
        angles = torch.cat([ids.unsqueeze(-1) * frequencies for ids in pos_ids for _ in range(2)], dim=-1)
        angles = nn.functional.pad(angles, (0, self.attention_head_size - 3 * size))  # what is left does not turn
        even, odd = angles.sin().unflatten(-1, (-1, 2)).unbind(-1)
        signed_sines = torch.stack((-even, odd), dim=-1).flatten(-2)
        # Operands of one dtype, and few passes: a third of the time of the formula as it is usually written.
        swapped = qk.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).float()
        return (qk.float() * angles.cos()).addcmul_(swapped, signed_sines).to(qk.dtype)


def tower_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function as `AttentionInterface` wants it; `(batch, heads, tokens, head size)` in,
    `(batch, tokens, heads, head size)` out."""
    use_blocks = (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and attention_mask is None
        and dropout == 0.0
        # A compiler would unroll the loops, and autograd would keep every block's scores.
        and not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
    )
    if use_blocks:
        return _attend_in_blocks(query * scaling, key.contiguous(), value.contiguous()), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _attend_in_blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    batch_size, num_heads, num_tokens, head_size = query.shape
    output = query.new_empty(batch_size, num_tokens, num_heads, head_size)
    for sample in range(batch_size):
        for head in range(num_heads):
            keys, values = key[sample, head].T, value[sample, head]
            for start in range(0, num_tokens, QUERIES_PER_BLOCK):
                block = slice(start, start + QUERIES_PER_BLOCK)
                weights = torch.mm(query[sample, head, block], keys).softmax(dim=-1)
                output[sample, block, head] = torch.mm(weights, values)
    return output


AttentionInterface.register(TOWER_ATTENTION, tower_attention_forward)

__all__ = ["TOWER_ATTENTION", "PatchConvolution", "RotaryAttention"]
