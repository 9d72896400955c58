"""What the benchmarks share: interleaved runs, each in a process of its own, medians, ratios, a table and a JSON file.

A benchmark names its contenders (functions at the top level of its module, so that a fresh process can import them):

    runs = measure({"ours": (ours, path), "peer": (peer, path)}, rounds=5)
    report("What is compared", {"1080p": runs}, baseline="ours", output=Path(__file__).with_suffix(".json"))

The machines are shared and noisy: contenders take turns, and medians and their ratios are what counts.
"""

import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table


@dataclass(frozen=True)
class Run:
    """One call: wall seconds, and by how many bytes the process's resident memory rose, where that was measured."""

    seconds: float
    added_bytes: int | None = None


def measure(contenders: dict[str, tuple], *, rounds: int, warm_up: bool = True) -> dict[str, list[Run] | str]:
    """
    Runs every contender `rounds` times, taking turns, each call in a fresh process.

    Args:
        contenders (`dict[str, tuple]`): Name to `(function, *arguments)`; the function must be importable.
        rounds (`int`): Measured calls of each.
        warm_up (`bool`): Whether the child calls the function once before the measured call, so that imports, lazy
            tables and the page cache are not measured. Its memory stays: turn it off to measure peak memory.

    Returns:
        Runs of each contender, or the first line of its error (a peer that cannot do a case is a result, too).
    """
    results: dict[str, list[Run] | str] = {name: [] for name in contenders}
    for _ in track(range(rounds), description="rounds", transient=True):
        for name, call in contenders.items():
            if isinstance(results[name], list):
                run = _in_fresh_process(call, warm_up)
                results[name] = [*results[name], run] if isinstance(run, Run) else run
    return results


def _in_fresh_process(call: tuple, warm_up: bool) -> Run | str:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, call, warm_up))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = f"process ended with status {process.exitcode}"
    process.join()
    return result


def _child(sender, call: tuple, warm_up: bool) -> None:
    function, *arguments = call
    try:
        if warm_up:
            function(*arguments)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (Linux)
        before, start = _memory("VmRSS"), time.perf_counter()
        kept = function(*arguments)
        seconds = time.perf_counter() - start
        del kept
        sender.send(Run(seconds, max(0, _memory("VmHWM") - before)))
    except Exception as error:
        traceback.print_exc()
        sender.send(f"{type(error).__name__}: {error}".splitlines()[0][:120])


def _memory(name: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def median_seconds(runs: list[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def median_added_bytes(runs: list[Run]) -> float:
    return statistics.median(run.added_bytes for run in runs)


def report(title: str, cases: dict[str, dict[str, list[Run] | str]], *, baseline: str, output: Path, **more) -> None:
    """
    Prints a table (median seconds, median added memory, both as multiples of `baseline`'s) and writes all runs.

    Args:
        title (`str`): Heading of the table.
        cases (`dict[str, dict[str, list[Run] | str]]`): What `measure` returned, by case.
        baseline (`str`): The contender to compare with, usually ours: 2.0x means twice its time.
        output (`Path`): JSON file, with the machine, the versions and the command beside the runs.
        more: Other results for that file.
    """
    table = Table(title=title)
    for heading in ("case", "contender", "median s", "min - max s", f"time / {baseline}", "MB", f"MB / {baseline}"):
        table.add_column(heading, justify="left" if heading in ("case", "contender") else "right")
    for case, contenders in cases.items():
        base = contenders[baseline]
        for name, runs in contenders.items():
            if isinstance(runs, str):
                table.add_row(case, name, runs)
                continue
            seconds = [run.seconds for run in runs]
            cells = [f"{median_seconds(runs):.3f}", f"{min(seconds):.3f} - {max(seconds):.3f}"]
            has_base = isinstance(base, list)
            cells.append(f"{median_seconds(runs) / median_seconds(base):.2f}x" if has_base else "")
            if runs[0].added_bytes is not None:
                cells.append(f"{median_added_bytes(runs) / 1e6:.0f}")
                cells.append(f"{median_added_bytes(runs) / max(1, median_added_bytes(base)):.2f}x" if has_base else "")
            table.add_row(case, name, *cells)
        table.add_section()
    Console().print(table)
    write_json(output, {"title": title, "baseline": baseline, "cases": cases, **more})


def write_json(output: Path, results: dict) -> None:
    """Results with what is needed to repeat them: command, machine, versions."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "av", "numpy")}
    facts = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch threads {torch.get_num_threads()}",
        "python": platform.python_version(),
        "versions": versions,
    }
    text = json.dumps({**facts, **results}, indent=1, default=_plain)
    output.write_text(text + "\n", encoding="utf-8")
    Console().print(f"[dim]{output.name} written[/dim]")


def _plain(value: Run) -> dict:
    return asdict(value)
