"""`vjepa-qwen evaluate` on held-out synthetic shorts with the toy checkpoint."""

import json
import os
import subprocess
import sys

import pytest
import torch

from vjepa_qwen import TOY_CHECKPOINT, VJepaQwenProcessor
from vjepa_qwen.evaluation.evaluate_model import main, measure
from vjepa_qwen.evaluation.frame_tokens import count_frame_tokens
from vjepa_qwen.toy.synthetic_shorts import HELD_OUT_SEEDS, generate_short, write_video
from vjepa_qwen.training.data import load_samples
from vjepa_qwen.training.feature_cache import encode

NUM_CLIPS = 5


@pytest.fixture(scope="module")
def shorts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shorts")
    rows = []
    for index, seed in enumerate(HELD_OUT_SEEDS[:NUM_CLIPS]):
        short = generate_short(seed)
        write_video(short, folder / f"{index}.mp4")
        columns = {"domain": short.domain, "on_screen_text": short.words, "cut_seconds": short.cut_seconds}
        rows.append({"file_name": f"{index}.mp4", "summary": short.summary, **columns})
    rows.append({"summary": "Hello!", "prompt": "Hi."})  # without a video
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder)


def run(shorts, output, *options):
    return main([shorts, "--output", str(output), "--batch-size", "3", "--max-new-tokens", "60", *options])


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def evaluated(shorts, tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    return run(shorts, output), output


def test_results_have_the_form_that_the_model_card_reads(evaluated, shorts):
    results, output = evaluated
    assert json.loads((output / "results.json").read_text()) == results
    assert set(results) == {"model", "revision", "dataset", "metrics", "command", "seed"}
    assert results["dataset"] == {"name": shorts, "split": "test", "num_samples": NUM_CLIPS + 1}
    assert results["command"].startswith("vjepa-qwen evaluate ")
    assert results["metrics"]["domain_accuracy"]["value"] == 1.0
    for metric in results["metrics"].values():
        low, high = metric["confidence_interval"]
        assert low <= metric["value"] <= high


def test_predictions_are_in_the_order_of_the_samples_with_what_was_seen(evaluated, shorts):
    predictions = read_lines(evaluated[1] / "predictions.jsonl")
    assert [row["name"] for row in predictions] == [sample["name"] for sample in load_samples(shorts)]
    processor = VJepaQwenProcessor.from_pretrained(TOY_CHECKPOINT)
    for row, sample in zip(predictions, load_samples(shorts), strict=True):
        cuts = [[e.start_seconds for e in events.events[1:]] for events in processor.segment(sample["videos"])]
        assert row["boundary_seconds"] == cuts
        assert row["num_video_tokens"] == sum(len(video) + 1 for video in cuts)


def test_an_interrupted_run_goes_on_where_it_stopped(evaluated, shorts, tmp_path):
    results, output = evaluated
    part = output / "predictions.0.part.jsonl"
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "settings.json").write_bytes((output / "settings.json").read_bytes())
    # Another answer shows that it is kept; the line that was cut off is answered again.
    kept = {**json.loads(lines[0]), "prediction": "kept"}
    (tmp_path / part.name).write_text(json.dumps(kept) + "\n" + lines[1] + lines[2][:20], encoding="utf-8")
    run(shorts, tmp_path)
    rows, expected = read_lines(tmp_path / "predictions.jsonl"), read_lines(output / "predictions.jsonl")
    assert rows[0]["prediction"] == "kept"
    assert [row["prediction"] for row in rows[1:]] == [row["prediction"] for row in expected[1:]]


@pytest.mark.slow
def test_two_processes_share_the_samples(evaluated, shorts, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "vjepa_qwen.evaluation.evaluate_model", shorts, "--output", str(tmp_path)]
    command += ["--batch-size", "3", "--max-new-tokens", "60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    parts = [read_lines(path) for path in sorted(tmp_path.glob("*.part.jsonl"))]
    assert [len(part) for part in parts] == [3, 3]
    rows, expected = read_lines(tmp_path / "predictions.jsonl"), read_lines(evaluated[1] / "predictions.jsonl")
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in expected]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["metrics"] == evaluated[0]["metrics"]


def test_predictions_of_other_settings_are_refused_by_name(evaluated, shorts):
    with pytest.raises(ValueError, match="max_new_tokens: 60 there, 61 now"):
        run(shorts, evaluated[1], "--max-new-tokens", "61")


def test_a_model_that_was_trained_again_is_another_one(evaluated, shorts, tmp_path):
    settings = json.loads((evaluated[1] / "settings.json").read_text())
    settings["files"][0][0][1] += 1  # the size of one of the checkpoint's files
    (tmp_path / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ValueError, match="files: "):
        run(shorts, tmp_path)


def test_cached_features_give_the_same_answers(evaluated, shorts, tmp_path):
    cache = str(tmp_path / "features")
    encode(load_samples(shorts), cache, VJepaQwenProcessor.from_pretrained(TOY_CHECKPOINT))
    run(shorts, tmp_path / "results", "--feature-cache", cache)
    rows, expected = (
        read_lines(tmp_path / "results" / "predictions.jsonl"),
        read_lines(evaluated[1] / "predictions.jsonl"),
    )
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in expected]
    assert [row["num_video_tokens"] for row in rows] == [row["num_video_tokens"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(row["boundary_seconds"], other["boundary_seconds"])


def test_figures_are_ratios_of_sums_and_only_of_what_was_counted():
    counts = [{"num_tokens": 1, "num_videos": 1}, {"num_tokens": 0, "num_videos": 3}, {}]
    metrics = measure(counts, seed=0)
    assert set(metrics) == {"tokens_per_video", "token_ratio"}
    assert metrics["tokens_per_video"]["value"] == 0.25
    assert metrics == measure(counts, seed=0)


def test_frame_tokens_of_a_minute_of_1080p():
    assert count_frame_tokens(60.0, num_frames=1800, height=1080, width=1920) == 11400
    assert count_frame_tokens(0.04, num_frames=1, height=64, width=64) >= 1
