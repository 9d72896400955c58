"""Lets a model answer about a data set, and measures the answers.

    python -m vjepa_qwen.toy.synthetic_shorts shorts --count 100
    vjepa-qwen evaluate shorts --output shorts.results
    vjepa-qwen evaluate shorts --model REPO --trained OUTPUT_DIR_OF_TRAIN --feature-cache shorts.features
    accelerate launch -m vjepa_qwen.evaluation.evaluate_model shorts --output shorts.results    # processes share it

DATA is what `vjepa-qwen train` takes. What is measured depends on its columns: `domain` (domain accuracy),
`on_screen_text`, a list (text recognition), `cut_seconds`, a list (event boundaries); video tokens always.

The output folder gets `predictions.jsonl` and `results.json`. Run again after an interruption, it goes on where it
stopped; predictions of another model or of other settings are refused.
"""

import argparse
import json
import shlex
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import set_seed
from transformers.utils import logging

from .. import TOY_CHECKPOINT
from ..modeling_vjepa_qwen import VJepaQwenForConditionalGeneration
from ..processing_vjepa_qwen import VJepaQwenProcessor
from ..training.data import DEFAULT_PROMPT, load_samples
from ..training.feature_cache import FeatureCache, process_state
from ..training.trainer import base_model_of, load_trained
from ..video_decoding import VideoDecoder
from .domain_accuracy.domain_accuracy import DomainAccuracy
from .event_boundaries.event_boundaries import EventBoundaries
from .frame_tokens import count_frame_tokens
from .text_recognition.text_recognition import TextRecognition
from .token_efficiency.token_efficiency import TokenEfficiency

# Name of a figure to the sums that it is the ratio of; the metrics' counts add up over samples.
RATIOS = {
    "domain_accuracy": (("num_right",), ("num_samples",)),
    "text_recognition": (("num_found",), ("num_words",)),
    "character_score": (("character_score_sum",), ("num_words",)),
    "boundary_f1": (("num_matched", "num_matched"), ("num_predicted", "num_true")),
    "boundary_precision": (("num_matched",), ("num_predicted",)),
    "boundary_recall": (("num_matched",), ("num_true",)),
    "boundary_f1_at_0.05": (("num_matched_at_0.05", "num_matched_at_0.05"), ("num_predicted", "num_true")),
    "tokens_per_video": (("num_tokens",), ("num_videos",)),
    "token_ratio": (("num_reference_tokens",), ("num_tokens",)),
}
NUM_RESAMPLES = 2000


def predict(
    samples: list[dict], model, processor, *, cache: FeatureCache | None, batch_size: int, max_new_tokens: int
):
    """
    Answers, batch by batch; the videos of the next ones are decoded meanwhile.

    Args:
        samples (`list[dict]`): From `training.data.load_samples`; the last message of each, the answer, is left out.
        model (`VJepaQwenForConditionalGeneration`), processor (`VJepaQwenProcessor`): Bound to each other.
        cache (`FeatureCache`, *optional*): With it, nothing is encoded.
        batch_size (`int`), max_new_tokens (`int`)

    Yields:
        `dict` for each sample: `name`, `prediction`, `num_video_tokens`, `boundary_seconds` of each of its videos.
    """
    videos = [video for sample in samples for video in sample["videos"]]
    seen = map(lambda video: _from_cache(cache[video], processor), videos) if cache else _segment(videos, processor)
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        # (features, event ids, boundaries) of each video of each sample
        vision = [list(islice(seen, len(sample["videos"]))) for sample in batch]
        texts = [
            processor.apply_chat_template(sample["messages"][:-1], tokenize=False, add_generation_prompt=True)
            for sample in batch
        ]
        flat = [video for sample_videos in vision for video in sample_videos]
        features = {"frame_features": [f for f, _, _ in flat], "frame_event_ids": [ids for _, ids, _ in flat]}
        inputs = processor(text=texts, **(features if flat else {}), return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for sample, sample_videos, answer in zip(batch, vision, answers, strict=True):
            yield {
                "name": sample["name"],
                "prediction": answer.split("</think>")[-1].strip(),
                "num_video_tokens": sum(len(boundaries) + 1 for _, _, boundaries in sample_videos),
                "boundary_seconds": [boundaries for _, _, boundaries in sample_videos],
            }


def _segment(videos: list, processor):
    for events in processor.iter_segment(videos):
        yield events.frame_features, events.frame_event_ids, [event.start_seconds for event in events.events[1:]]


def _from_cache(entry: dict[str, torch.Tensor], processor):
    starts = 1 + torch.nonzero(torch.diff(entry["frame_event_ids"])).flatten()
    seconds = entry["timestamps"][starts * processor.video_processor.tubelet_size]
    return entry["frame_features"], entry["frame_event_ids"], seconds.tolist()


def count(sample: dict, prediction: dict, domains: list[str], tolerance_seconds: float) -> dict[str, float]:
    """The counts of all metrics that a sample has the columns for."""
    # `_compute`: the public call writes every input to a file.
    counts, answer = {}, [prediction["prediction"]]
    if sample.get("domain") is not None:
        counts |= DomainAccuracy()._compute(answer, [sample["domain"]], domains=domains)
    if sample.get("on_screen_text") is not None:
        counts |= TextRecognition()._compute(answer, [sample["on_screen_text"]])
    if len(sample["videos"]) == 1:
        video = VideoDecoder(sample["videos"][0])
        if sample.get("cut_seconds") is not None:
            counts |= EventBoundaries()._compute(
                prediction["boundary_seconds"],
                [sample["cut_seconds"]],
                durations=[video.duration_seconds],
                tolerance_seconds=tolerance_seconds,
            )
        size = {"num_frames": video.num_frames, "height": video.height, "width": video.width}
        num_frame_tokens = count_frame_tokens(video.duration_seconds, **size)
        counts |= TokenEfficiency()._compute([prediction["num_video_tokens"]], [num_frame_tokens])
    return counts


def measure(counts: list[dict[str, float]], seed: int) -> dict[str, dict]:
    """
    Figures over all samples, with 95 % confidence intervals (percentile bootstrap over samples).

    Returns:
        `dict`: Name to `{"value": float, "confidence_interval": [low, high]}`, for what was counted.
    """
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(counts), size=(NUM_RESAMPLES, len(counts)))
    metrics = {}
    for name, ratio in RATIOS.items():
        upper, lower = (
            np.array([sum(sample.get(part, 0) for part in parts) for sample in counts], dtype=float) for parts in ratio
        )
        if lower.sum() == 0:
            continue
        resampled = lower[draws].sum(axis=1)
        values = upper[draws].sum(axis=1)[resampled > 0] / resampled[resampled > 0]
        interval = [float(value) for value in np.percentile(values, [2.5, 97.5])]
        metrics[name] = {"value": float(upper.sum() / lower.sum()), "confidence_interval": interval}
    return metrics


def evaluate_model(options: argparse.Namespace) -> dict | None:
    """What `vjepa-qwen evaluate` does; returns the results in the main process, None in the others."""
    set_seed(options.seed)
    state = process_state()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # one is enough
    base = options.model or (base_model_of(options.trained) if options.trained else TOY_CHECKPOINT)
    samples = load_samples(
        options.data, split=options.split, prompt=options.prompt, skip_bad_samples=options.skip_bad_samples
    )
    names = [sample["name"] for sample in samples]
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    decisive = ("data", "split", "revision", "trained", "dtype", "prompt", "max_new_tokens")
    settings = {"model": base, **{name: getattr(options, name) for name in decisive}}
    settings["files"] = [_list_files(folder) for folder in (base, options.trained, options.data) if folder]
    if state.is_main_process:
        _check_settings(output / "settings.json", settings)
    state.wait_for_everyone()
    done = _read_predictions(output)
    missing = [sample for sample in samples if sample["name"] not in done]
    if missing:
        processor = VJepaQwenProcessor.from_pretrained(options.trained or base, revision=options.revision)
        model = VJepaQwenForConditionalGeneration.from_pretrained(
            base, revision=options.revision, dtype=options.dtype, device_map={"": state.device}
        )
        if options.trained:
            load_trained(model, options.trained)
        processor.bind(model.eval())
        cache = FeatureCache(options.feature_cache, processor) if options.feature_cache else None
        share = missing[state.process_index :: state.num_processes]
        predictions = predict(
            share,
            model,
            processor,
            cache=cache,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
        )
        part = output / f"predictions.{state.process_index}.part.jsonl"
        if part.exists():  # an interruption may have cut a line off
            part.write_bytes(part.read_bytes()[: part.read_bytes().rfind(b"\n") + 1])
        with open(part, "a", encoding="utf-8") as file:
            for prediction in track(
                predictions, "answering", len(share), console=Console(stderr=True), disable=not state.is_main_process
            ):
                file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
                file.flush()
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    done = _read_predictions(output)
    domains = options.domains or sorted({sample["domain"] for sample in samples if sample.get("domain")})
    counts = [count(sample, done[sample["name"]], domains, options.tolerance_seconds) for sample in samples]
    results = {
        "model": options.trained or base,
        "revision": options.revision if not Path(base).exists() else None,
        "dataset": {"name": options.data, "split": options.split, "num_samples": len(samples)},
        "metrics": measure(counts, options.seed),
        "command": shlex.join(["vjepa-qwen", "evaluate", *options.arguments]),
        "seed": options.seed,
    }
    lines = [
        json.dumps({**done[name], **counted}, ensure_ascii=False) for name, counted in zip(names, counts, strict=True)
    ]
    (output / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    Console().print(make_table(results))
    return results


def _list_files(folder: str) -> list[list]:
    """Name, size and time of the files of a folder: a model that was trained again is another one."""
    files = [path for path in sorted(Path(folder).glob("*")) if path.suffix in (".safetensors", ".json", ".jsonl")]
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _check_settings(path: Path, settings: dict):
    """Refuses to mix predictions of two models or settings."""
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in settings if settings[name] != found.get(name)]
    if changed:
        differences = "; ".join(f"{name}: {found.get(name)!r} there, {settings[name]!r} now" for name in changed)
        raise ValueError(
            f"output ({path.parent}) holds predictions of another run ({differences}); choose another folder, or "
            "remove it"
        )


def _read_predictions(folder: Path) -> dict[str, dict]:
    """By name. A line that an interruption cut off does not count."""
    predictions = {}
    for path in sorted(folder.glob("predictions.*.part.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            prediction = json.loads(line)
            predictions[prediction["name"]] = prediction
    return predictions


def make_table(results: dict) -> Table:
    table = Table(title=f"{results['model']}, {results['dataset']['num_samples']} samples")
    for heading in ("figure", "value", "95 % confidence interval"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, metric in results["metrics"].items():
        low, high = metric["confidence_interval"]
        table.add_row(name, f"{metric['value']:.3f}", f"{low:.3f} - {high:.3f}")
    return table


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="vjepa-qwen evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", help="folder with metadata.jsonl, or data set of `datasets`")
    parser.add_argument("--split", default="test", help="of the data set (default: test)")
    parser.add_argument("--model", help="repository or folder (default: what TRAINED started from, or the toy)")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the model")
    parser.add_argument("--trained", help="checkpoint or output folder of `vjepa-qwen train`")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: as they are saved)")
    parser.add_argument("--feature-cache", help="folder that `vjepa-qwen encode` has written")
    parser.add_argument("--output", default="evaluation_results", help="folder (default: evaluation_results)")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="question of samples without one of their own")
    parser.add_argument("--batch-size", type=int, default=8, help="answers at a time (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: 256)")
    parser.add_argument("--domains", nargs="+", help="all domains there are (default: those of the data set)")
    parser.add_argument("--tolerance-seconds", type=float, default=0.5, help="of event boundaries (default: 0.5)")
    parser.add_argument("--skip-bad-samples", action="store_true", help="go on without unreadable videos")
    parser.add_argument("--seed", type=int, default=0, help="of the confidence intervals (default: 0)")
    options = parser.parse_args(argv)
    options.arguments = sys.argv[1:] if argv is None else argv
    return evaluate_model(options)


if __name__ == "__main__":
    main()
