"""Event segmentation of 100,000 steps: against a plain loop, and against one pass over the data.

    python -m benchmarks.segmentation                   # under a minute

Features are a stationary random walk with a jump every 30 steps or so, float32. All contenders take turns in this
process: the data is made once. NumPy may use as many threads as it likes; those it uses here are one.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from vjepa_qwen.event_segmentation import EventSegmenter, cosine_distances

from .measure import Run, report

HIDDEN_SIZE = 1024
STEPS_PER_WINDOW = 32


def make_features(num_steps: int, seed: int = 0) -> np.ndarray:
    """`(num_steps, 1024)` float32: neighbours are alike but for jumps, every 30 steps on average."""
    rng = np.random.default_rng(seed)
    features = np.empty((num_steps, HIDDEN_SIZE), dtype=np.float32)
    row = rng.standard_normal(HIDDEN_SIZE, dtype=np.float32)
    for step in range(num_steps):
        noise = rng.standard_normal(HIDDEN_SIZE, dtype=np.float32)
        row = noise if rng.random() < 1 / 30 else 0.98 * row + 0.2 * noise
        features[step] = row
    return features


def loop_distances(features: np.ndarray) -> np.ndarray:
    """What one writes first: the cosine distance of each step to the one before it."""
    distances = np.zeros(len(features), dtype=np.float32)
    for step in range(1, len(features)):
        left, right = features[step - 1], features[step]
        distances[step] = 1 - left @ right / (np.linalg.norm(left) * np.linalg.norm(right))
    return distances


def loop_segment(features: np.ndarray) -> np.ndarray:
    """The same loop, and its boundaries: peaks above the mean."""
    distances = loop_distances(features)
    threshold = distances.mean()
    steps = range(1, len(distances) - 1)
    return np.array(
        [
            step
            for step in steps
            if distances[step] > threshold and distances[step - 1] < distances[step] >= distances[step + 1]
        ]
    )


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000, help="temporal steps (default: 100,000)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each contender (default: 9)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args(arguments)
    features = make_features(options.steps)
    segmenter = EventSegmenter()
    difference = np.abs(cosine_distances(features) - loop_distances(features)).max()
    Console().print(f"largest difference of the two curves: {difference:.1e}")
    cases = {
        "distance curve": {
            "ours": lambda: cosine_distances(features),
            "loop": lambda: loop_distances(features),
            "one read pass": lambda: features.sum(),
        },
        "curve and events": {
            "ours": lambda: segmenter(features, steps_per_window=STEPS_PER_WINDOW),
            "loop": lambda: loop_segment(features),
            "one read pass": lambda: features.sum(),
        },
    }
    results = {case: {name: [] for name in contenders} for case, contenders in cases.items()}
    for _ in track(range(options.rounds), description="rounds", transient=True):
        for case, contenders in cases.items():
            for name, function in contenders.items():
                start = time.perf_counter()
                function()
                results[case][name].append(Run(time.perf_counter() - start))
    title = f"Event segmentation, {options.steps:,} steps of {HIDDEN_SIZE} features"
    report(title, results, baseline="ours", output=options.output)


if __name__ == "__main__":
    main()
