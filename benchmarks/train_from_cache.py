"""Samples per second of the projector's training: from cached features, and encoding every video each time it comes.

    python benchmarks/train_from_cache.py --rounds 5
    python benchmarks/train_from_cache.py --model experiments/base      # of `python -m vjepa_qwen.toy.experiments`
    python benchmarks/train_from_cache.py --video real.mp4

The toy checkpoint, if no other is named, and synthetic shorts, which cost less to decode than real videos (128 x 128
pixels); with `--video` their answers to that file. Runs take turns; only the Trainer's own clock counts
(`train_runtime`: steps, batches and, without a cache, decoding and encoding; not the loading of the model). Medians
are compared.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from vjepa_qwen import TOY_CHECKPOINT
from vjepa_qwen.training import feature_cache, train


def samples_per_second(folder: Path, batch_size: int, *options: str) -> float:
    common = ["--dataset", str(folder), "--output_dir", str(folder / "out"), "--num_train_epochs", "1"]
    common += ["--per_device_train_batch_size", str(batch_size), "--gradient_accumulation_steps", "1"]
    common += ["--activation_checkpointing", "false", "--report_to", "none", "--save_strategy", "no"]
    trainer = train.main([*common, "--disable_tqdm", "true", *options])
    return next(entry for entry in trainer.state.log_history if "train_runtime" in entry)["train_samples_per_second"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=64, help="number of videos")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--video", type=Path, help="file to see in every sample instead of its synthetic short")
    parser.add_argument("--model", default=TOY_CHECKPOINT, help="repository or folder (default: the toy)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [
                sys.executable,
                "-m",
                "vjepa_qwen.toy.synthetic_shorts",
                name,
                "--count",
                str(arguments.count),
                "--seed",
                "0",
            ],
            check=True,
        )
        if arguments.video:
            for path in folder.glob("*.mp4"):
                shutil.copyfile(arguments.video, path)
        cache = str(folder / "features")
        feature_cache.main([name, cache, "--model", arguments.model])
        model = ["--model", arguments.model]
        contenders = {"encoding each time": model, "cached features": [*model, "--feature_cache", cache]}
        speeds = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, options in contenders.items():
                speeds[name].append(samples_per_second(folder, arguments.batch_size, *options))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name}: {medians[name]:.1f} samples/s (min {min(values):.1f}, max {max(values):.1f})")
    ratio = medians["cached features"] / medians["encoding each time"]
    print(f"ratio {ratio:.1f}, {torch.get_num_threads()} threads, batch size {arguments.batch_size}")


if __name__ == "__main__":
    main()
