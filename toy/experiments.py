"""Both experiments of the research release on synthetic shorts, frozen tower and LoRA: at most an hour on 2 cores.

    python -m vjepa_qwen.toy.experiments --output experiments

1. A tower is pre-trained by masked latent prediction on videos without labels, a language model on text alone
   (`python -m vjepa_qwen.toy.pretraining`); with a projector that has learned nothing they are the base checkpoint.
2. Experiment 5: `vjepa-qwen encode`, then `vjepa-qwen train --stage projector`.
3. Experiment 6: `vjepa-qwen train --stage lora`, the videos cut by the adapted tower, and by the base tower. It goes
   on from experiment 5 (`vjepa-qwen merge`), which needs fewer videos than to begin anew. For comparison, experiment 5
   goes on as well.
4. `vjepa-qwen evaluate` on held-out clips, and on others whose words no training clip shows.

With three seeds each, nothing but the package's own commands, whose output is in OUTPUT/*.log. OUTPUT/results.json
has all figures; `toy/experiments.json` is the committed one. Interrupted, the command goes on with what is missing.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .synthetic_shorts import HELD_OUT_SEEDS, TRAINING_SEEDS, WORDS

FIRST_TEST_SEED = HELD_OUT_SEEDS.start + 100_000  # the first ones were looked at while this was developed
UNSEEN_WORDS = WORDS[::5]
SEEN_WORDS = tuple(word for word in WORDS if word not in UNSEEN_WORDS)

# What `vjepa-qwen train` is given beside its defaults, which are the release's: its rate is meant for a model a
# thousand times as large. The rates are those at which the training loss fell furthest.
TRAINING = (
    "--lr_scheduler_type cosine --warmup_steps 50 --max_grad_norm 1.0 --per_device_train_batch_size 16 "
    "--gradient_accumulation_steps 1 --activation_checkpointing False --save_strategy no --report_to none "
    "--disable_tqdm True --logging_steps 50"
).split()
# Two layers are few: all their linear layers, where the default leaves out those of the MLP.
LORA_TARGETS = r".*\.vision_tower\.encoder\.layer\.\d+\.(attention\.(query|key|value|proj)|mlp\.(fc1|fc2))"
LORA = ["--stage", "lora", "--lora_target_modules", LORA_TARGETS]
EXPERIMENTS = {
    "projector": "5 frozen",
    "projector-longer": "5 as long",
    "lora-adapted": "6 adapted cuts",
    "lora-base": "6 base cuts",
}
STAGES_FILE = "stages.jsonl"
# Name of the figure, its heading, and what it is multiplied with.
FIGURES = {
    "domain_accuracy": ("domain\naccuracy %", 100),
    "text_recognition": ("words\nread %", 100),
    "unseen_text_recognition": ("unseen\nwords %", 100),
    "boundary_f1": ("boundary\nF1 %", 100),
    "tokens_per_video": ("tokens\nper video", 1),
}

console = Console()


def run_commands(output: Path, description: str, commands: list[tuple[Path, str, list]]):
    """
    Runs commands that do not wait for each other, one thread each, on all cores.

    Args:
        output (`Path`): In its stages.jsonl the time is written down.
        description (`str`): What the progress bar says.
        commands (`list`): Of each what it makes, its module and its arguments. Its output is in a `.log` beside what
            it makes, and a command that has one is not run again.

    Raises:
        RuntimeError: when one of them fails, with the end of its output.
    """
    commands = [command for command in commands if not _log(command[0]).exists()]
    if not commands:
        return
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    task = progress.add_task(description, total=len(commands))

    def run(command: tuple[Path, str, list]):
        made, module, arguments = command
        part = made.with_name(f"{made.name}.log.part")
        started = time.monotonic()
        with open(part, "w", encoding="utf-8") as file:
            code = subprocess.run(
                [sys.executable, "-m", f"vjepa_qwen.{module}", *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            ).returncode
        if code:
            raise RuntimeError(f"{made.name} failed:\n{part.read_text(encoding='utf-8')[-3000:]}")
        part.rename(_log(made))
        console.print(f"{made.name}: {(time.monotonic() - started) / 60:.1f} minutes")
        progress.advance(task)

    started = time.monotonic()
    try:
        with progress, ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
    finally:  # what was interrupted counts as well
        with open(output / STAGES_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": description, "minutes": (time.monotonic() - started) / 60}) + "\n")


def _log(made: Path) -> Path:
    return made.with_name(f"{made.name}.log")


def run_experiments(
    output: Path, *, num_clips: int, num_test_clips: int, epochs: int, lora_epochs: float, seeds: list[int], base: list
):
    """
    Runs everything that is missing in `output`.

    Args:
        num_clips (`int`): To train on. `num_test_clips` (`int`) to test on, and as many with unseen words.
        epochs (`int`): Of experiment 5; `lora_epochs` (`float`) of experiment 6.
        base (`list`): Further arguments of `vjepa_qwen.toy.pretraining`.
    """
    output.mkdir(parents=True, exist_ok=True)
    clips = {
        "train": (num_clips, TRAINING_SEEDS.start, SEEN_WORDS),
        "seen": (num_test_clips, FIRST_TEST_SEED, SEEN_WORDS),
        "unseen": (num_test_clips, FIRST_TEST_SEED + num_test_clips, UNSEEN_WORDS),
    }
    commands = [(output / "base", "toy.pretraining", ["--output", output / "base", *base])]
    for name, (count, seed, words) in clips.items():
        arguments = [output / name, "--count", count, "--seed", seed, "--text-share", 1, "--text-only"]
        arguments += ["--words", *words]
        commands.append((output / name, "toy.synthetic_shorts", arguments))
    run_commands(output, "pre-training, clips", commands)

    def features(name: str) -> Path:
        return output / f"{name}-features"

    run_commands(
        output,
        "encoding",
        [
            (features(name), "training.feature_cache", [output / name, features(name), "--model", output / "base"])
            for name in clips
        ],
    )

    def train(experiment: str, seed: int, model: Path, options: list) -> tuple[Path, str, list]:
        trained = output / f"{experiment}-{seed}"
        arguments = ["--dataset", output / "train", "--model", model, "--output_dir", trained, "--seed", seed]
        return trained, "training.train", [*arguments, *TRAINING, *options]

    cache = ["--feature_cache", features("train")]
    options = ["--stage", "projector", "--num_train_epochs", epochs, "--learning_rate", 1e-3, *cache]
    run_commands(output, "experiment 5", [train("projector", seed, output / "base", options) for seed in seeds])
    merged = {seed: output / f"projector-{seed}-merged" for seed in seeds}
    run_commands(
        output,
        "merging",
        [(merged[seed], "training.merge", [output / f"projector-{seed}", merged[seed]]) for seed in seeds],
    )
    lora = [*LORA, "--num_train_epochs", lora_epochs, "--learning_rate", 4e-3, "--event_tower"]
    longer = ["--stage", "projector", "--num_train_epochs", lora_epochs, "--learning_rate", 1e-3]
    options = {
        "lora-adapted": [*lora, "adapted"],
        "lora-base": [*lora, "base", *cache],
        "projector-longer": [*longer, *cache],
    }
    commands = [train(name, seed, merged[seed], options[name]) for name in options for seed in seeds]
    run_commands(output, "experiment 6", commands)

    commands, runs = [], [(experiment, seed) for experiment in reversed(EXPERIMENTS) for seed in seeds]
    for experiment, seed in runs:
        for name in ("seen", "unseen"):
            made = output / f"{experiment}-{seed}-{name}"
            arguments = [output / name, "--trained", output / f"{experiment}-{seed}", "--output", made]
            if experiment.startswith("projector"):
                arguments += ["--feature-cache", features(name)]
            commands.append((made, "evaluation.evaluate_model", arguments))
    run_commands(output, "evaluation", commands)


def collect(output: Path, seeds: list[int]) -> dict[str, dict]:
    """Of each experiment the figures of each seed, their mean, and their standard deviation."""
    experiments = {}
    for experiment in EXPERIMENTS:
        runs = []
        for seed in seeds:
            seen, unseen = (
                json.loads((output / f"{experiment}-{seed}-{name}" / "results.json").read_text(encoding="utf-8"))
                for name in ("seen", "unseen")
            )
            figures = {name: metric["value"] for name, metric in seen["metrics"].items()}
            figures["unseen_text_recognition"] = unseen["metrics"]["text_recognition"]["value"]
            runs.append({"seed": seed, **figures})
        columns = {name: [run[name] for run in runs] for name in runs[0] if name != "seed"}
        experiments[experiment] = {
            "runs": runs,
            "mean": {name: statistics.mean(values) for name, values in columns.items()},
            "standard_deviation": {
                name: statistics.stdev(values) if len(seeds) > 1 else 0.0 for name, values in columns.items()
            },
        }
    return experiments


def make_table(experiments: dict[str, dict]) -> Table:
    table = Table(title="held-out clips, mean and standard deviation over the seeds", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("experiment", no_wrap=True)
    for heading, _ in FIGURES.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for experiment, title in EXPERIMENTS.items():
        mean, deviation = experiments[experiment]["mean"], experiments[experiment]["standard_deviation"]
        cells = (f"{scale * mean[name]:.1f} ± {scale * deviation[name]:.1f}" for name, (_, scale) in FIGURES.items())
        table.add_row(title, *cells)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Run both experiments of the release on synthetic shorts.")
    parser.add_argument("--output", type=Path, default=Path("experiments"), help="folder (default: experiments)")
    parser.add_argument("--clips", type=int, default=3000, help="to train on (default: 3000)")
    parser.add_argument("--test-clips", type=int, default=100, help="to test on, of each kind (default: 100)")
    parser.add_argument("--epochs", type=int, default=12, help="of experiment 5 (default: 12)")
    parser.add_argument("--lora-epochs", type=float, default=3.25, help="of experiment 6 (default: 3.25)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the training (default: 0 1 2)")
    parser.add_argument(
        "--base-arguments", type=shlex.split, default=[], help="of `vjepa_qwen.toy.pretraining`, in one string"
    )
    options = parser.parse_args(argv)
    run_experiments(
        options.output,
        num_clips=options.clips,
        num_test_clips=options.test_clips,
        epochs=options.epochs,
        lora_epochs=options.lora_epochs,
        seeds=options.seeds,
        base=options.base_arguments,
    )
    experiments = collect(options.output, options.seeds)
    stages = map(json.loads, (options.output / STAGES_FILE).read_text(encoding="utf-8").splitlines())
    arguments = sys.argv[1:] if argv is None else argv
    results = {
        "command": shlex.join(["python", "-m", "vjepa_qwen.toy.experiments", *arguments]),
        "minutes": sum(stage["minutes"] for stage in stages),
        "num_cores": os.cpu_count(),
        "num_words": {"seen": len(SEEN_WORDS), "unseen": len(UNSEEN_WORDS)},
        "experiments": experiments,
    }
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    console.print(make_table(experiments))
    console.print(f"{options.output / 'results.json'} after {results['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
