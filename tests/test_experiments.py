"""The pre-training and the experiments of the toy, on sizes at which nothing is learned but everything runs."""

import json
import math

import numpy as np
import pytest
import torch

from vjepa_qwen import VJepaQwenForConditionalGeneration
from vjepa_qwen.toy import experiments
from vjepa_qwen.toy.pretraining import (
    NoteDialogues,
    _draw_masks,
    make_base_config,
    make_notes,
    make_tokenizer,
    pretrain_language_model,
    pretrain_tower,
)
from vjepa_qwen.toy.rendering import FRAMES_PER_CLIP, make_video_processor, normalizer
from vjepa_qwen.toy.synthetic_shorts import summarize_text


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return VJepaQwenForConditionalGeneration(make_base_config(tokenizer))


def weights(module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(before: dict[str, torch.Tensor], module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


def test_masks_share_all_patches_between_them(model):
    config, generator = model.config.vision_config, torch.Generator().manual_seed(0)
    for _ in range(10):
        visible, hidden = _draw_masks(config, 8, generator)
        assert sorted([*visible.tolist(), *hidden.tolist()]) == list(range(8 * 16))
        assert len(visible) > 0 and len(hidden) > len(visible)


def test_tower_learns_to_predict_and_keeps_its_patch_projection(model):
    tower, losses = model.model.vision_tower, []
    before = weights(model)
    # One bright square at a place of its own in each clip: what is hidden follows from what is seen.
    frames = np.zeros((8, FRAMES_PER_CLIP, 3, 64, 64), np.uint8)
    for clip, (top, left) in zip(frames, np.ndindex(2, 4), strict=True):
        clip[:, :, 32 * top : 32 * top + 32, 16 * left : 16 * left + 16] = 255
    pretrain_tower(
        tower,
        frames,
        normalize=normalizer(make_video_processor()),
        num_updates=30,
        seed=0,
        batch_size=8,
        report=lambda update, total, figures: losses.append(figures["loss"]),
    )
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    expected = {name for name in before if "vision_tower." in name and "embeddings." not in name}
    assert changed(before, model) == expected


def test_language_model_learns_from_text_alone(model, tokenizer):
    losses, before = [], weights(model)
    pretrain_language_model(
        model,
        tokenizer,
        num_updates=12,
        seed=0,
        batch_size=8,
        report=lambda update, total, figures: losses.append(figures["loss"]),
    )
    assert losses[-1] < losses[0]
    assert changed(before, model) == {name for name in before if "language_model." in name}


def test_notes_stand_for_the_scenes_in_order(tokenizer):
    dialogues = NoteDialogues(tokenizer, seed=0)
    dialogues.max_scenes = 5
    input_ids, attention_mask, labels, notes = dialogues.batch(16)
    assert (input_ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")).sum() == len(notes)
    rows = iter(notes)
    for ids, mask, row_labels in zip(input_ids, attention_mask, labels, strict=True):
        assert (row_labels[mask == 0] == -100).all()
        num_notes = int((ids == tokenizer.convert_tokens_to_ids("<|video_pad|>")).sum())
        domains, words = zip(*(tokenizer.decode(next(rows)).split() for _ in range(num_notes)), strict=True)
        assert tokenizer.decode(ids[row_labels != -100]) == summarize_text(domains[0], words) + "<|im_end|>"


def test_notes_are_readable_to_any_degree_and_their_length_does_not_tell_how_far():
    parts = torch.randn(4000, 2, 128)
    readable, any_degree = (make_notes(parts, faintness, torch.Generator().manual_seed(0)) for faintness in (0.0, 1.0))
    similarity = torch.cosine_similarity(any_degree, parts.sum(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(readable, parts.sum(dim=1)), torch.ones(4000))
    assert similarity.min() < 0.1 and similarity.max() > 0.9
    for notes in (readable, any_degree):
        assert 0.3 / math.e <= notes.std(dim=1).min() and notes.std(dim=1).max() <= 0.3 * math.e
    assert abs(torch.corrcoef(torch.stack([similarity, any_degree.std(dim=1)]))[0, 1]) < 0.05


def test_seen_and_unseen_words_are_apart():
    assert len(experiments.SEEN_WORDS) >= 100 and not set(experiments.SEEN_WORDS) & set(experiments.UNSEEN_WORDS)


def test_failed_command_says_what_it_printed_and_is_run_again(tmp_path):
    command = [(tmp_path / "clips", "toy.synthetic_shorts", [tmp_path / "clips", "--count", "many"])]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="(?s)clips failed.*invalid int value: 'many'"):
            experiments.run_commands(tmp_path, "clips", command)


@pytest.mark.slow
def test_experiments_run_from_end_to_end_and_go_on_where_they_stopped(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--clips", "20", "--test-clips", "8", "--epochs", "1"]
    arguments += ["--lora-epochs", "1", "--seeds", "0"]
    arguments += ["--base-arguments", "--clips 24 --tower-updates 4 --language-updates 4"]
    experiments.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["experiments"]) == set(experiments.EXPERIMENTS)
    for experiment in results["experiments"].values():
        (run,) = experiment["runs"]
        for name in experiments.FIGURES:
            assert run[name] == experiment["mean"][name] >= 0
    assert "6 adapted cuts" in capsys.readouterr().out

    (tmp_path / "projector-0-seen.log").unlink()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.log")}
    experiments.main(arguments)
    assert (tmp_path / "projector-0-seen.log").exists()
    assert times == {path: path.stat().st_mtime_ns for path in times}
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["experiments"] == results["experiments"]
    assert again["minutes"] > results["minutes"]  # of both sessions
