"""The toy: its generator keeps its promises, and the committed checkpoint is small and describes what it never saw."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from transformers import AutoTokenizer

from vjepa_qwen import TOY_CHECKPOINT
from vjepa_qwen.toy.synthetic_shorts import (
    DOMAINS,
    FRAMES_PER_SECOND,
    HELD_OUT_SEEDS,
    MIN_SCENE_SECONDS,
    ORDINALS,
    TRAINING_SEEDS,
    WORDS,
    generate_short,
    render_frames,
    shape_centres,
    write_video,
)

SEEDS = [0, 1, 17, HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.start + 5]


def test_training_and_held_out_seeds_are_disjoint():
    assert not range(max(TRAINING_SEEDS.start, HELD_OUT_SEEDS.start), min(TRAINING_SEEDS.stop, HELD_OUT_SEEDS.stop))


def test_the_world_is_as_large_as_promised():
    assert len(set(WORDS)) == len(WORDS) >= 100
    assert len(set(DOMAINS)) >= 6
    shorts = [generate_short(seed) for seed in range(300)]
    assert {short.domain for short in shorts} == set(DOMAINS)
    assert {len(short.scenes) for short in shorts} == {2, 3, 4, 5}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_gives_the_same_short_and_the_same_frames(seed):
    short = generate_short(seed)
    assert short == generate_short(seed)
    assert short != generate_short(seed + 1)
    for first, second in itertools.islice(zip(render_frames(short), render_frames(short), strict=True), 0, None, 15):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("seed", range(40))
def test_scenes_are_contiguous_and_long_enough(seed):
    short = generate_short(seed)
    assert short.scenes[0].start_seconds == 0
    for scene, following in itertools.pairwise(short.scenes):
        assert scene.end_seconds == following.start_seconds
        assert (scene.shape, scene.colour) != (following.shape, following.colour)
    assert min(scene.end_seconds - scene.start_seconds for scene in short.scenes) >= MIN_SCENE_SECONDS
    assert 3 <= short.duration_seconds <= 8
    assert short.cut_seconds == [scene.start_seconds for scene in short.scenes[1:]]


@pytest.mark.parametrize("seed", SEEDS)
def test_cut_times_are_where_the_picture_changes(seed):
    short = generate_short(seed)
    frames = np.stack(list(render_frames(short))).astype(int)
    assert len(frames) == short.num_frames == math.floor(short.duration_seconds * FRAMES_PER_SECOND)
    changes = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    strongest = np.sort(np.argsort(-changes)[: len(short.cut_seconds)]) + 1
    assert list(strongest / FRAMES_PER_SECOND) == short.cut_seconds


@pytest.mark.parametrize("seed", SEEDS)
def test_the_shape_stays_in_the_picture_and_moves_as_told(seed):
    short = generate_short(seed)
    centres = shape_centres(short)
    assert centres.shape == (short.num_frames, 2)
    assert centres.min() > 0 and centres.max() < 1
    for scene in short.scenes:
        start, end = (round(time * FRAMES_PER_SECOND) for time in (scene.start_seconds, scene.end_seconds))
        way = centres[end - 1] - centres[start]
        if scene.motion in ("left", "right"):
            assert (way[0] > 0.1) == (scene.motion == "right") and way[1] == 0
        elif scene.motion in ("up", "down"):
            assert (way[1] > 0.1) == (scene.motion == "down") and way[0] == 0
        elif scene.motion == "still":
            assert np.all(way == 0)


def test_the_summary_names_domain_scenes_and_text_in_order():
    for seed in range(50):
        short = generate_short(seed)
        assert short.domain in short.summary
        positions = [
            short.summary.index(f"{ordinal}, {scene.description}")
            for ordinal, scene in zip(ORDINALS, short.scenes, strict=False)
        ]
        assert positions == sorted(positions)
        assert all(f'"{word}"' in short.summary for word in short.words)


def test_the_file_holds_the_rendered_frames(tmp_path):
    short = generate_short(3)
    write_video(short, tmp_path / "short.mp4")
    with av.open(str(tmp_path / "short.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        decoded = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    rendered = list(render_frames(short))
    assert [time for time, _ in decoded] == pytest.approx([n / FRAMES_PER_SECOND for n in range(len(rendered))])
    differences = [np.abs(a.astype(int) - b).mean() for (_, a), b in zip(decoded, rendered, strict=True)]
    assert max(differences) < 12  # of 255: what compression and halved colour resolution cost


def test_the_command_writes_a_videofolder(tmp_path):
    command = [sys.executable, "-m", "vjepa_qwen.toy.synthetic_shorts", str(tmp_path), "--count", "2", "--seed", "7"]
    subprocess.run(command, check=True)
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["file_name"] for row in rows] == ["000000.mp4", "000001.mp4"]
    assert all((tmp_path / row["file_name"]).is_file() for row in rows)
    short = generate_short(8)
    assert rows[1] == {
        "file_name": "000001.mp4",
        "summary": short.summary,
        "domain": short.domain,
        "on_screen_text": short.words,
        "cut_seconds": short.cut_seconds,
    }


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOY_CHECKPOINT)


@pytest.mark.parametrize(
    "text",
    ["A cooking video.", "한국어 자막", "emoji 😀", "tabs\tand\n\nlines ", "".join(map(chr, range(32, 127))), ""],
)
def test_the_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizer_has_the_special_tokens_of_qwen(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.padding_side == "left"
    for token in (
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
        "<|image_pad|>", "<|video_pad|>", "<think>", "</think>",
    ):  # fmt: skip
        assert len(tokenizer(token).input_ids) == 1
    text = "<|im_start|>assistant\n<think>\n\n</think>\n\nA music video.<|im_end|>"
    visible = tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)
    assert visible == "assistant\n<think>\n\n</think>\n\nA music video."


def test_the_committed_checkpoint_is_small():
    files = [path for path in Path(TOY_CHECKPOINT).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 15_000_000


def test_the_checkpoint_describes_and_cuts_held_out_clips():
    from vjepa_qwen.toy.evaluate import evaluate

    score = evaluate(TOY_CHECKPOINT, HELD_OUT_SEEDS[2000:2010])
    assert score.right["domain"] >= 9
    assert score.f1 >= 0.95


@pytest.mark.slow
def test_the_checkpoint_meets_its_targets():
    from vjepa_qwen.toy.evaluate import evaluate

    score = evaluate(TOY_CHECKPOINT, HELD_OUT_SEEDS[:100])
    assert score.right["domain"] >= 90
    assert score.f1 >= 0.95


def test_count_matches_is_one_to_one():
    from vjepa_qwen.toy.evaluate import count_matches

    assert count_matches([1.0, 2.0], [1.1, 2.1], 0.2) == 2
    assert count_matches([1.0, 1.1], [1.05], 0.2) == 1
    assert count_matches([1.0], [0.9, 1.1], 0.2) == 1
    assert count_matches([0.5], [1.0], 0.2) == 0
    assert count_matches([], [1.0], 0.2) == count_matches([1.0], [], 0.2) == 0


def test_the_committed_files_are_those_that_the_build_writes(tokenizer, tmp_path):
    """All but weights and what was learned: whoever changes what is saved must save the toy again."""
    from vjepa_qwen import VJepaQwenForConditionalGeneration, VJepaQwenProcessor
    from vjepa_qwen.toy.build import make_config, save

    save(
        VJepaQwenForConditionalGeneration(make_config(tokenizer)),
        VJepaQwenProcessor.from_pretrained(TOY_CHECKPOINT),
        tmp_path,
    )
    committed = Path(TOY_CHECKPOINT)
    names = {path.name for path in committed.iterdir() if path.name != "__pycache__"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in ("config.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (committed / name).read_text(encoding="utf-8"), name
