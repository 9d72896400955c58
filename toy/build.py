"""Builds the toy checkpoint from a seed: rendering, tower, segmentation, language, in about 35 minutes on 2 cores.

    python -m vjepa_qwen.toy.build --output toy/checkpoint --seed 0

1. `rendering`: synthetic shorts become mp4 files and come back through the project's own video processor;
2. `tower_training`: a tiny V-JEPA 2 encoder learns what scenes show and where they change;
3. the thresholds of the event segmentation are chosen on training clips;
4. `language_training`: projector and a tiny Qwen3.5 text model learn the summaries, the tower stays frozen;
5. `evaluate` measures the saved checkpoint on clips that were held out.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Qwen3_5TextConfig, VJEPA2Config

from .. import TOY_CHECKPOINT
from ..configuration_vjepa_qwen import VJepaQwenConfig
from ..event_segmentation import EventSegmenter
from ..modeling_vjepa_qwen import VJepaQwenForConditionalGeneration
from ..processing_vjepa_qwen import VJepaQwenProcessor
from .evaluate import Score, evaluate
from .language_training import (
    DESCRIBE_PROMPTS,
    DOMAIN_PROMPTS,
    TEXT_ONLY_TURNS,
    TEXT_PROMPTS,
    EncodedScene,
    train_language,
)
from .rendering import CROP_SIZE, FRAMES_PER_CLIP, RenderedClips, make_video_processor, normalizer, render_clips
from .synthetic_shorts import HELD_OUT_SEEDS, TRAINING_SEEDS, generate_short
from .tokenizer import train_tokenizer
from .tower_training import scene_of_steps, train_tower

NUM_CLIPS = 6000
NUM_TOWER_UPDATES = 2200
NUM_LANGUAGE_UPDATES = 1500
NUM_LANGUAGE_CLIPS = 3000
NUM_SEGMENTATION_CLIPS = 1000
CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"
STEPS_PER_WINDOW = FRAMES_PER_CLIP // 2


def make_config(tokenizer) -> VJepaQwenConfig:
    """About three million parameters, float32: 12 MB."""
    vision_config = VJEPA2Config(
        crop_size=CROP_SIZE,
        frames_per_clip=FRAMES_PER_CLIP,
        patch_size=16,
        tubelet_size=2,
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        drop_path_rate=0.0,
        initializer_range=0.06,  # the usual 0.02 is meant for widths of a thousand and learns slowly here
    )
    text_config = Qwen3_5TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=400,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.05,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return VJepaQwenConfig(
        vision_config=vision_config,
        text_config=text_config,
        projector_hidden_size=256,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        tie_word_embeddings=True,
        initializer_range=0.07,
    )


@torch.inference_mode()
def encode_clips(tower, clips: RenderedClips, normalize, report, batch_size: int = 20) -> torch.Tensor:
    """Features of all clips, `(num_clips, num_steps, hidden)` float32."""
    features = []
    for start in range(0, len(clips.shorts), batch_size):
        frames = torch.from_numpy(clips.frames[start : start + batch_size]).float() / 255
        features.append(tower(normalize(frames)).pooler_output)
        report(min(start + batch_size, len(clips.shorts)), len(clips.shorts), {})
    return torch.cat(features).clone()


def choose_segmentation(
    features: torch.Tensor, clips: RenderedClips, min_distances: tuple[float, ...] = (0.3, 0.2, 0.4, 0.1)
) -> dict:
    """The parameters of `EventSegmenter` with the best boundary F1 on training clips."""
    best_f1, best = -1.0, {}
    curves = [EventSegmenter(min_events=1)(clip, steps_per_window=STEPS_PER_WINDOW).distances for clip in features]
    # Of several that are equally good, the first: low thresholds relative to the clip, a high absolute floor.
    for min_distance, threshold, prominence, min_steps in itertools.product(
        min_distances, (0.0, 0.25, 0.5), (0.5, 0.25, 1.0), (2, 1)
    ):
        parameters = {
            "threshold_deviations": threshold,
            "prominence_deviations": prominence,
            "min_distance": min_distance,
            "min_event_steps": min_steps,
            "min_events": 1,
            "max_events": 8,
        }
        segmenter, score = EventSegmenter(**parameters), Score()
        for curve, short, times in zip(curves, clips.shorts, clips.timestamps, strict=False):
            boundaries = segmenter.segment_distances(curve, steps_per_window=STEPS_PER_WINDOW).boundaries
            score.add_boundaries(short, list(times[2 * boundaries]), short.duration_seconds / STEPS_PER_WINDOW)
        if score.f1 > best_f1:
            best_f1, best = score.f1, parameters
    return best


def collect_scenes(
    features: torch.Tensor, clips: RenderedClips, segmenter: EventSegmenter
) -> list[list[EncodedScene]]:
    """The events of each clip, cut as at inference, with the scene that each shows. Miscounted clips are left out."""
    collected = []
    for clip_features, short, times in zip(features, clips.shorts, clips.timestamps, strict=True):
        event_ids = torch.from_numpy(segmenter(clip_features, steps_per_window=STEPS_PER_WINDOW).frame_event_ids)
        true_ids = scene_of_steps(short, times)
        num_events = int(event_ids.max()) + 1
        scenes = [np.bincount(true_ids[event_ids == event]).argmax() for event in range(num_events)]
        if scenes == list(range(len(short.scenes))):
            collected.append(
                [
                    EncodedScene(short.domain, scene, clip_features[event_ids == event].mean(0))
                    for event, scene in enumerate(short.scenes)
                ]
            )
    return collected


def tokenizer_texts() -> list[str]:
    """Summaries of training clips, and the prompts."""
    summaries = [generate_short(seed).summary for seed in TRAINING_SEEDS[:3000]]
    turns = [text for turn in TEXT_ONLY_TURNS for text in turn]
    system = "You are a helpful assistant. system user"
    return [*summaries, *turns, *DESCRIBE_PROMPTS, *DOMAIN_PROMPTS, *TEXT_PROMPTS, system]


def save(model, processor, output: Path) -> None:
    """Saves as any checkpoint; in the package's own folder the copies of the code become links to their one source."""
    generation, tokenizer = model.generation_config, processor.tokenizer
    generation.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    generation.pad_token_id = tokenizer.pad_token_id
    generation.max_new_tokens = 160
    for path in output.glob("*.py"):
        path.unlink()
    model.save_pretrained(output)
    processor.save_pretrained(output)
    if output.resolve() == Path(TOY_CHECKPOINT).resolve():
        for path in output.glob("*.py"):
            path.unlink()
            path.symlink_to(Path("..", "..", path.name))


def build(output: Path, seed: int, num_clips: int, num_tower_updates: int, num_language_updates: int) -> None:
    console = Console()
    progress = Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )

    def reporter(description: str, total: int):
        task, smooth = progress.add_task(description, total=total, figures=""), {}

        def report(done: int, total: int = total, figures: dict[str, float] | None = None) -> None:
            for name, value in (figures or {}).items():
                smooth[name] = 0.98 * smooth.get(name, value) + 0.02 * value
            text = " ".join(f"{name} {value:.2f}" for name, value in smooth.items())
            progress.update(task, completed=done, total=total, figures=text)
            if not console.is_terminal and done % 500 == 0:
                console.print(f"{description}: {done}/{total} {text}")

        return report

    started = time.monotonic()
    torch.manual_seed(seed)
    first = TRAINING_SEEDS.start + seed * num_clips
    video_processor = make_video_processor()
    normalize = normalizer(video_processor)
    tokenizer = train_tokenizer(tokenizer_texts(), CHAT_TEMPLATE.read_text(encoding="utf-8"))
    model = VJepaQwenForConditionalGeneration(make_config(tokenizer))
    tower = model.model.vision_tower
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    with tempfile.TemporaryDirectory() as folder, progress:
        clips = render_clips(range(first, first + num_clips), Path(folder), reporter("rendering clips", num_clips))
        train_tower(
            tower,
            clips,
            normalize=normalize,
            num_updates=num_tower_updates,
            seed=seed,
            report=reporter("training the tower", 1),
        )
        clips = clips.first(NUM_LANGUAGE_CLIPS)
        features = encode_clips(tower, clips, normalize, reporter("encoding clips", len(clips.shorts)))
        segmentation = choose_segmentation(features[:NUM_SEGMENTATION_CLIPS], clips)
        console.print(f"event segmentation: {segmentation}")
        scenes = collect_scenes(features, clips, EventSegmenter(**segmentation))
        console.print(f"{len(scenes)} of {len(clips.shorts)} training clips have as many events as scenes")
        report = reporter("training the language", 1)
        train_language(model, scenes, tokenizer, num_updates=num_language_updates, seed=seed, report=report)

    processor = VJepaQwenProcessor(video_processor, tokenizer, event_segmentation=segmentation)
    save(model, processor, output)
    size = sum(path.stat().st_size for path in output.iterdir())
    console.print(f"{output}: {size / 1e6:.1f} MB after {(time.monotonic() - started) / 60:.1f} minutes")
    score = evaluate(output, HELD_OUT_SEEDS[:100], num_examples=3)
    console.print(score.table("100 held-out clips"))
    console.print(f"built and measured in {(time.monotonic() - started) / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the toy checkpoint.")
    parser.add_argument("--output", type=Path, default=Path(TOY_CHECKPOINT), help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, clips and order")
    parser.add_argument("--clips", type=int, default=NUM_CLIPS, help="number of training clips")
    parser.add_argument("--tower-updates", type=int, default=NUM_TOWER_UPDATES)
    parser.add_argument("--language-updates", type=int, default=NUM_LANGUAGE_UPDATES)
    arguments = parser.parse_args()
    build(arguments.output, arguments.seed, arguments.clips, arguments.tower_updates, arguments.language_updates)


if __name__ == "__main__":
    main()
