"""Loading a light checkpoint against loading the same weights from one folder: time, and bytes written to disk.

    python benchmarks/load_light_checkpoint.py --repeats 21

Both are written once to a temporary folder with random weights: V-JEPA 2 ViT-L, the projector to the width of the
language model, and a Qwen3.5 text model of `--layers` layers. Then each is loaded in turn, in this process, and
neighbours are compared. What the process writes while it loads is read from `/proc/self/io` (Linux).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from vjepa_qwen import VJepaQwenConfig, VJepaQwenForConditionalGeneration

TEXT_CONFIG = {"model_type": "qwen3_5_text", "hidden_size": 1024, "intermediate_size": 3584, "vocab_size": 248320}


def write_checkpoints(folder: Path, num_layers: int, shard_size: str):
    """`light` and `language_model`, and `full` with the same weights; returns the bytes of each."""
    config = VJepaQwenConfig(text_config={**TEXT_CONFIG, "num_hidden_layers": num_layers})
    model = VJepaQwenForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder / "full", max_shard_size=shard_size)
    causal = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.bfloat16)
    causal.base_model.load_state_dict(model.model.language_model.state_dict())
    causal.get_output_embeddings().weight = model.lm_head.weight
    causal.save_pretrained(folder / "language_model", max_shard_size=shard_size)
    model.config.language_model_name_or_path = str(folder / "language_model")
    model.save_pretrained(folder / "light", light=True)
    return {
        name: sum(path.stat().st_size for path in (folder / name).iterdir())
        for name in ("full", "language_model", "light")
    }


def load(folder: Path) -> tuple[float, int]:
    """Seconds, and bytes that were written meanwhile."""
    written = count_written()
    start = time.perf_counter()
    model = VJepaQwenForConditionalGeneration.from_pretrained(folder)
    # Weights are mapped from the file and read when they are first used: here by a copy, as to an accelerator.
    for parameter in model.parameters():
        parameter.detach().clone()
    return time.perf_counter() - start, count_written() - written


def count_written() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=21, help="loads of each (default: 21)")
    parser.add_argument("--layers", type=int, default=24, help="layers of the language model (default: 24)")
    parser.add_argument("--shard-size", default="500MB", help="of the files (default: 500MB)")
    parser.add_argument("--folder", help="where to write the checkpoints (default: a temporary folder)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        sizes = write_checkpoints(folder, options.layers, options.shard_size)
        print("on disk: " + ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in sizes.items()))
        results = {"full": [], "light": []}
        for _ in range(options.repeats + 1):
            for name in results:
                results[name].append(load(folder / name))
    finally:
        shutil.rmtree(folder)
    for name, loads in results.items():
        seconds = [seconds for seconds, _ in loads[1:]]  # the first fills the page cache
        written = max(written for _, written in loads)
        print(f"{name:<5}  median {statistics.median(seconds):.3f} s  written {written:,} bytes")
    # Neighbours in time are compared: on a shared machine they have more in common than all loads of one kind.
    pairs = list(zip(results["light"], results["full"], strict=True))[1:]
    ratio = statistics.median(light / full for (light, _), (full, _) in pairs)
    extra_seconds = statistics.median(light - full for (light, _), (full, _) in pairs)
    print(f"light / full, median of {len(pairs)} pairs: {ratio:.3f} ({1000 * extra_seconds:+.0f} ms)")


if __name__ == "__main__":
    main()
