"""The command line: `vjepa-qwen describe VIDEO...` and `vjepa-qwen segment VIDEO...`.

Results go to standard output, progress, notes and errors to standard error. Whatever is heavy is imported inside the
commands, so that `--help` answers at once.
"""

import json
import os
from contextlib import closing, contextmanager
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import TOY_CHECKPOINT, __version__

DEFAULT_PROMPT = "Describe this video."
# No such repository, no weights in it, no library that its code needs.
LOADING_ERRORS = (OSError, ValueError, ImportError)


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


app = typer.Typer(
    help="Few-token, event-based video understanding: V-JEPA 2 sees, event segmentation cuts, Qwen3.5 speaks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
output = Console()
messages = Console(stderr=True)

Videos = Annotated[list[str], typer.Argument(metavar="VIDEO...", help="Files or http(s) URLs.", show_default=False)]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="Repository on the Hub or folder. Its code is run (trust_remote_code=True): name only what you trust. "
        "Without it, the toy that is installed with the package.",
        show_default=False,
    ),
]
Revision = Annotated[str, typer.Option(help="Branch, tag or commit of the repository.")]
NumFrames = Annotated[
    int | None, typer.Option(help="Frames to look at in each video: even, whole windows beyond the first.", min=1)
]
Fps = Annotated[float | None, typer.Option(help="Frames per second to look at, instead.", min=0.001)]
Start = Annotated[
    float | None, typer.Option("--start", help="Seconds at which to begin to look at each video.", min=0.0)
]
End = Annotated[float | None, typer.Option("--end", help="Seconds at which to stop.", min=0.0)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


@app.callback(invoke_without_command=True)
def version(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False):
    if show_version:
        output.print(__version__)
        raise typer.Exit()


@app.command()
def describe(
    videos: Videos,
    model: Model = TOY_CHECKPOINT,
    revision: Revision = "main",
    prompt: Annotated[str, typer.Option(help="What to ask about each video.")] = DEFAULT_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    num_frames: NumFrames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...; without it, the accelerators if there are any.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; auto is as they are saved.")] = Dtype.auto,
    as_json: Json = False,
):
    """Describe videos: their events, the number of tokens they cost, and a text."""
    _start(model)
    processor = _load_processor(model, revision)
    with messages.status("Loading the model"):
        language_model = _load_model(model, revision, device, dtype)
    processor.bind(language_model)

    def describe_events(video_events) -> dict:
        content = [{"type": "video", "video": video_events}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(language_model.device)
        tokens = language_model.generate(**inputs, max_new_tokens=max_new_tokens)[0, inputs["input_ids"].shape[1] :]
        text = processor.decode(tokens, skip_special_tokens=True)
        # A model that thinks although it was told not to.
        return {"text": text.split("</think>")[-1].strip()}

    options = {"num_frames": num_frames, "fps": fps, "start_seconds": start, "end_seconds": end}
    _run(videos, processor, options, describe_events, as_json)


@app.command()
def segment(
    videos: Videos,
    model: Model = TOY_CHECKPOINT,
    revision: Revision = "main",
    num_frames: NumFrames = None,
    fps: Fps = None,
    start: Start = None,
    end: End = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the vision tower; auto is as it is saved.")] = Dtype.auto,
    as_json: Json = False,
):
    """Find the events of videos. Only the vision tower is loaded, no language model."""
    _start(model)
    processor = _load_processor(model, revision, dtype)
    options = {"num_frames": num_frames, "fps": fps, "start_seconds": start, "end_seconds": end}
    _run(videos, processor, options, lambda video_events: {}, as_json)


# The options of these commands are defined where they are used; `--help` goes there too.
OPTIONS_ELSEWHERE = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=OPTIONS_ELSEWHERE)
def convert(context: typer.Context):
    """Convert the research release's files to a repository, light (linked to its language model) or full."""
    from .upload_scripts.convert_checkpoint import main

    _pass_on(main, context)


@app.command(context_settings=OPTIONS_ELSEWHERE)
def evaluate(context: typer.Context):
    """Let a model answer about a data set, and measure the answers."""
    from .evaluation.evaluate_model import main

    _pass_on(main, context)


@app.command(context_settings=OPTIONS_ELSEWHERE)
def push(context: typer.Context):
    """Check a checkpoint, write its model card and upload it to the Hub."""
    from .upload_scripts.push_to_hub import main

    _pass_on(main, context)


@app.command(context_settings=OPTIONS_ELSEWHERE)
def memory(context: typer.Context):
    """Print the memory that inference or training needs, line by line, without loading or downloading weights."""
    from .memory_budget import main

    _pass_on(main, context)


@app.command(context_settings=OPTIONS_ELSEWHERE)
def encode(context: typer.Context):
    """Encode the videos of a data set once, for training with a frozen tower."""
    from .training.feature_cache import main

    _pass_on(main, context)


@app.command(context_settings=OPTIONS_ELSEWHERE)
def train(context: typer.Context):
    """Train the projector, or a LoRA on the tower with it, on videos with answers."""
    from .training.train import main

    _pass_on(main, context)


@app.command(context_settings=OPTIONS_ELSEWHERE)
def merge(context: typer.Context):
    """Put what was trained into the model and write an ordinary checkpoint."""
    from .training.merge import main

    _pass_on(main, context)


def _pass_on(main, context: typer.Context):
    try:
        main(context.args)
    except (OSError, ValueError) as error:
        raise _fail(_one_line(error)) from error


def _start(model: str):
    # Before transformers is imported. One progress display is enough.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if model == TOY_CHECKPOINT:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        note = "Using the toy model, trained on synthetic clips only; name a real one with --model."
        _print_as_it_is(messages, note, style="dim")


def _load_processor(model: str, revision: str, dtype: Dtype = Dtype.auto):
    with messages.status("Loading the processor"), _one_line_errors(f"--model {model}", *LOADING_ERRORS):
        if model == TOY_CHECKPOINT:
            from .processing_vjepa_qwen import VJepaQwenProcessor

            return VJepaQwenProcessor.from_pretrained(model, dtype=dtype.value)
        from transformers import AutoProcessor

        options = {"revision": revision, "dtype": dtype.value, "trust_remote_code": True}
        return AutoProcessor.from_pretrained(model, **options)


def _load_model(model: str, revision: str, device: str | None, dtype: Dtype):
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if device is None:
        device = "auto" if torch.accelerator.is_available() else None
    else:  # before a large model is read
        with _one_line_errors(f"--device {device}", RuntimeError, AssertionError):
            torch.empty(0, device=device)
    options = {"dtype": dtype.value, "device_map": device}
    with _one_line_errors(f"--model {model}", *LOADING_ERRORS):
        if model == TOY_CHECKPOINT:
            from .modeling_vjepa_qwen import VJepaQwenForConditionalGeneration

            return VJepaQwenForConditionalGeneration.from_pretrained(model, **options).eval()
        from transformers import AutoModel

        return AutoModel.from_pretrained(model, revision=revision, trust_remote_code=True, **options).eval()


def _run(videos: list[str], processor, options: dict, process, as_json: bool):
    """
    Segments all videos, decoding the next ones meanwhile, and adds to each what `process` makes of its events. A bad
    video costs only itself. Exits with 1 when there was one.
    """
    results = []
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=messages,
        transient=True,
        disable=not messages.is_terminal,  # it would leave blank lines in a log
    )
    with progress:
        task = progress.add_task(os.path.basename(videos[0]), total=len(videos))

        def show_progress(index: int, num_windows_done: int, num_windows: int):
            progress.update(task, completed=index + num_windows_done / num_windows)

        segmented = processor.iter_segment(videos, **options, return_exceptions=True, on_window=show_progress)
        with closing(segmented), _one_line_errors("vision tower", *LOADING_ERRORS):
            for index, (video, video_events) in enumerate(zip(videos, segmented, strict=True)):
                result = _as_json(video, video_events, process)
                results.append(result)
                if "error" in result:
                    _print_as_it_is(messages, f"{video}: {result['error']}", style="red")
                elif not as_json:
                    progress.stop()  # both streams may be the same terminal
                    _print_result(result)
                    progress.start()
                following = os.path.basename(videos[min(index + 1, len(videos) - 1)])
                progress.update(task, completed=index + 1, description=following)
    if as_json:
        typer.echo(json.dumps(results, indent=2, ensure_ascii=False))
    if any("error" in result for result in results):
        raise typer.Exit(1)


def _as_json(video: str, video_events, process) -> dict:
    if not isinstance(video_events, Exception):
        try:
            more = process(video_events)
        except ValueError as error:  # such as a prompt that does not fit the model
            video_events = error
    if isinstance(video_events, Exception):
        reason = _one_line(video_events).removeprefix(f"{video}: ")
        if not isinstance(video_events, (ValueError, OSError)):  # those explain themselves
            reason = f"{type(video_events).__name__}: {reason}"
        return {"video": video, "error": reason}
    return {
        "video": video,
        "duration_seconds": video_events.duration_seconds,
        "num_frames": len(video_events.timestamps),
        "num_video_tokens": video_events.num_events,
        "events": [
            {"start_seconds": event.start_seconds, "end_seconds": event.end_seconds, "score": event.score}
            for event in video_events.events
        ],
        **more,
    }


def _print_result(result: dict):
    _print_as_it_is(output, result["video"], style="bold")
    table = Table()
    for name in ("event", "start (s)", "end (s)", "score"):
        table.add_column(name, justify="right")
    for number, event in enumerate(result["events"], start=1):
        table.add_row(
            str(number),
            f"{event['start_seconds']:.2f}",
            f"{event['end_seconds']:.2f}",
            f"{event['score']:.3f}" if number > 1 else "",
        )
    output.print(table)
    seconds, tokens = result["duration_seconds"], result["num_video_tokens"]
    output.print(f"{seconds:.2f} s, {result['num_frames']} frames -> {tokens} video tokens", highlight=False)
    if "text" in result:
        _print_as_it_is(output, f"\n{result['text']}\n")


def _print_as_it_is(console: Console, text: str, style: str | None = None):
    """What comes from outside may hold brackets, and is copied from the terminal: no markup, no line breaks."""
    console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fail(message: str) -> typer.Exit:
    _print_as_it_is(messages, message, style="red")
    return typer.Exit(1)


@contextmanager
def _one_line_errors(what: str, *kinds: type[Exception]):
    """Ends the command with one line instead of a traceback."""
    try:
        yield
    except kinds as error:
        raise _fail(f"{what}: {_one_line(error)}") from error


def main():
    app()


if __name__ == "__main__":
    main()
