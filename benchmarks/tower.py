"""The vision tower: ViT-L on one clip, against transformers' `VJEPA2Model`; random weights, the CPU.

    python -m benchmarks.tower                          # 16 frames; about 7 minutes on 2 cores
    python -m benchmarks.tower --frames 64 --rounds 1   # one whole window
    python -m benchmarks.tower --rounds 0 --shorts 60   # only whether bfloat16 moves boundaries

Speed does not depend on the weights. Every contender has the same ones and sees the same clip of hard cuts; the table
is preceded by how far its features are from those of `VJEPA2Model` in float32, and whether its events are the same.
What bfloat16 does to the boundaries of a trained tower is measured with the toy on held-out synthetic shorts.
"""

import argparse
import copy
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import VJEPA2Config, VJEPA2Model

from vjepa_qwen import TOY_CHECKPOINT, VJepaQwenProcessor
from vjepa_qwen.event_segmentation import EventSegmenter
from vjepa_qwen.modeling_vjepa_qwen import VJepaQwenVisionTower
from vjepa_qwen.toy.synthetic_shorts import HELD_OUT_SEEDS, generate_short, write_video
from vjepa_qwen.vision_tower_access import load_vision_tower

from .measure import Run, measure, report, write_json

# Name to (class, dtype, whether the predictor runs, as it does by default).
CONTENDERS = {
    "ours, bfloat16": (VJepaQwenVisionTower, torch.bfloat16, False),
    "ours, float32": (VJepaQwenVisionTower, torch.float32, False),
    "VJEPA2Model": (VJEPA2Model, torch.float32, True),
    "VJEPA2Model, skip_predictor": (VJEPA2Model, torch.float32, False),
    "VJEPA2Model, skip_predictor, bfloat16": (VJEPA2Model, torch.bfloat16, False),
}
REFERENCE = "VJEPA2Model, skip_predictor"
FRAMES_PER_SCENE = 6


@cache
def make_model(name: str, layers: int | None):
    """The same random weights for every contender, made once in a process."""
    kind, dtype, _ = CONTENDERS[name]
    config = VJEPA2Config() if layers is None else VJEPA2Config(num_hidden_layers=layers, pred_num_hidden_layers=1)
    with torch.device("meta"):
        model = kind(config)
    model.to_empty(device="cpu")
    for parameter_name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(map(ord, parameter_name)))
        if "norm" in parameter_name:
            torch.nn.init.constant_(parameter, float(parameter_name.endswith("weight")))
        else:
            torch.nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
    return model.to(dtype).eval()


def make_frames(num_frames: int) -> torch.FloatTensor:
    """Smooth scenes with hard cuts and a little motion, `(1, num_frames, 3, 256, 256)`."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(-(-num_frames // FRAMES_PER_SCENE), 3, 8, 8, generator=generator)
    scenes = torch.nn.functional.interpolate(scenes, size=(256, 256), mode="bicubic")
    frames = [scenes[i // FRAMES_PER_SCENE].roll(i % FRAMES_PER_SCENE, dims=-1) for i in range(num_frames)]
    return torch.stack(frames).unsqueeze(0)


@torch.no_grad()
def encode(name: str, num_frames: int, layers: int | None, folder: str) -> None:
    """What is measured: one clip to features of its steps, which are left in `folder` with the CPU seconds taken."""
    if make_model.cache_info().currsize == 0:  # the warm-up call, which makes the model, sees one step only
        num_frames = 2
    model, frames = make_model(name, layers), make_frames(num_frames)
    start = time.process_time()
    if isinstance(model, VJEPA2Model):
        hidden_states = model(frames, skip_predictor=not CONTENDERS[name][2]).last_hidden_state
        features = hidden_states.unflatten(1, (num_frames // 2, -1)).mean(dim=2, dtype=torch.float32)
    else:
        features = model(frames).pooler_output
    seconds = time.process_time() - start
    np.save(Path(folder) / f"{name}.npy", features[0].numpy())
    if num_frames > 2:
        with open(Path(folder) / f"{name}.txt", "a", encoding="utf-8") as file:
            file.write(f"{seconds}\n")


def compare(folder: str) -> dict[str, str]:
    """Of each contender: relative error of its features, and its boundaries."""
    segmenter = EventSegmenter(min_events=1)
    expected = np.load(Path(folder) / f"{REFERENCE}.npy")
    expected_boundaries = segmenter(torch.from_numpy(expected)).boundaries.tolist()
    results = {}
    for name in CONTENDERS:
        features = np.load(Path(folder) / f"{name}.npy")
        error = np.linalg.norm(features - expected) / np.linalg.norm(expected)
        boundaries = segmenter(torch.from_numpy(features)).boundaries.tolist()
        verdict = "same events" if boundaries == expected_boundaries else f"not {expected_boundaries}"
        results[name] = f"error {error:.2%}, boundaries {boundaries}: {verdict}"
    return results


@torch.no_grad()
def count_equal_boundaries(num_shorts: int) -> dict[str, dict[str, int]]:
    """Of held-out shorts, how many a bfloat16 toy tower cuts as the float32 one: by segmentation and by tower."""
    processor, exact = VJepaQwenProcessor.from_pretrained(TOY_CHECKPOINT), load_vision_tower(TOY_CHECKPOINT, {})
    theirs = VJEPA2Model(copy.deepcopy(exact.config))
    theirs.load_state_dict(exact.state_dict(), strict=False)  # all but the predictor, which does not run
    theirs = theirs.bfloat16().eval()
    ours = copy.deepcopy(exact).bfloat16()
    towers = {
        "float32": lambda windows: exact(windows).last_hidden_state,
        "ours, bfloat16": lambda windows: ours(windows).last_hidden_state,
        "VJEPA2Model, bfloat16": lambda windows: theirs(windows, skip_predictor=True).last_hidden_state,
    }
    segmenters = {"of the toy": processor.segmenter, "defaults": EventSegmenter()}
    equal = {kind: dict.fromkeys(towers, 0) for kind in segmenters}
    with tempfile.TemporaryDirectory() as folder:
        for seed in HELD_OUT_SEEDS[:num_shorts]:
            path = f"{folder}/{seed}.mp4"
            write_video(generate_short(seed), path)
            windows = torch.stack(list(processor.video_processor.sample(path).windows()))
            num_steps = windows.shape[1] // 2
            for kind, segmenter in segmenters.items():
                cuts = {}
                for name, tower in towers.items():
                    steps = tower(windows).unflatten(1, (num_steps, -1)).mean(dim=2, dtype=torch.float32)
                    cuts[name] = segmenter(steps.flatten(0, 1), steps_per_window=num_steps).boundaries.tolist()
                for name, boundaries in cuts.items():
                    equal[kind][name] += boundaries == cuts["float32"]
    return equal


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=16, help="of the clip; even, at most 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, help="of the encoder, to try the script; all 24 by default")
    parser.add_argument("--shorts", type=int, default=60, help="synthetic shorts to compare boundaries on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the JSON files")
    options = parser.parse_args(arguments)
    console = Console()
    if options.shorts:
        equal = count_equal_boundaries(options.shorts)
        for kind, counts in equal.items():
            console.print(f"boundaries as in float32, of {options.shorts} shorts, segmentation {kind}: {counts}")
        results = {"num_shorts": options.shorts, "with_the_boundaries_of_float32": equal}
        write_json(options.output / "tower_boundaries.json", results)
    if options.rounds:
        with tempfile.TemporaryDirectory() as folder:
            contenders = {name: (encode, name, options.frames, options.layers, folder) for name in CONTENDERS}
            runs = measure(contenders, rounds=options.rounds)
            for name, result in compare(folder).items():
                console.print(f"{name}: {result}", highlight=False)
            # Of a busy machine the CPU seconds are what can be trusted, with one thread (OMP_NUM_THREADS=1).
            cpu_runs = {
                name: [
                    Run(seconds, run.added_bytes)
                    for seconds, run in zip(
                        np.loadtxt(f"{folder}/{name}.txt", ndmin=1).tolist(), runs[name], strict=True
                    )
                ]
                for name in CONTENDERS
            }
        report(
            f"ViT-L, {options.frames} frames, CPU",
            {"wall": runs, "CPU seconds": cpu_runs},
            baseline="ours, bfloat16",
            output=options.output / f"tower_{options.frames}_frames.json",
        )


if __name__ == "__main__":
    main()
