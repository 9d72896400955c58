"""Both stages of the training on a tiny model: what moves, what is saved, that it resumes, and merging."""

import json
import math
import os
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from vjepa_qwen import TOY_CHECKPOINT, VJepaQwenForConditionalGeneration, VJepaQwenProcessor
from vjepa_qwen.training import feature_cache, merge, train
from vjepa_qwen.training.data import load_samples
from vjepa_qwen.training.trainer import load_trained

LORA_NAMES = ("query", "key", "value", "proj")


@pytest.fixture(scope="session")
def folder(tmp_path_factory, clips):
    """Five samples: four with a video, one without."""
    folder = tmp_path_factory.mktemp("shorts")
    answers = ["A red circle moves left.", "A cooking video.", "요리", "A circle."]
    rows = [{"summary": answer} for answer in answers]
    for index, row in enumerate(rows):
        row["file_name"] = f"{index}.mp4"
        shutil.copy(clips[index % len(clips)], folder / row["file_name"])
    # Every file has a content of its own.
    with open(folder / "3.mp4", "ab") as file:
        file.write(b"\0\0\0\x08free")
    rows.append({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def cache(tmp_path_factory, folder, tiny_checkpoint):
    cache = str(tmp_path_factory.mktemp("cache") / "features")
    feature_cache.main([folder, cache, "--model", tiny_checkpoint])
    return cache


@pytest.fixture
def run(tmp_path, folder, tiny_checkpoint):
    """Calls the command with options for a short run."""

    def run(*options, out="out", dataset=folder):
        defaults = {
            "--dataset": dataset,
            "--model": tiny_checkpoint,
            "--output_dir": str(tmp_path / out),
            "--per_device_train_batch_size": "2",
            "--gradient_accumulation_steps": "1",
            "--num_train_epochs": "2",
            "--learning_rate": "0.01",
            "--logging_steps": "1",
            "--report_to": "none",
            "--disable_tqdm": "true",
            "--use_cpu": "true",
        }
        given = [*options]
        for name, value in defaults.items():
            if name not in given:
                given += [name, value]
        return train.main(given)

    return run


def parameters_of(checkpoint):
    model = VJepaQwenForConditionalGeneration.from_pretrained(checkpoint)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("source", ["videos", "cache"])
def test_stage_projector_moves_the_projector_and_nothing_else(run, cache, tiny_checkpoint, source):
    trainer = run(*(["--feature_cache", cache] if source == "cache" else []))
    before = parameters_of(tiny_checkpoint)
    after = dict(trainer.model.named_parameters())
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".multi_modal_projector." in name} and len(moved) == 6


@pytest.mark.parametrize("rule", ["adapted", "base"])
def test_stage_lora_moves_projector_and_adapters_and_nothing_else(run, cache, tiny_checkpoint, rule):
    options = ["--stage", "lora", "--event_tower", rule]
    trainer = run(*options, *(["--feature_cache", cache] if rule == "base" else []))
    before = parameters_of(tiny_checkpoint)
    adapters, moved = set(), set()
    for name, parameter in trainer.model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if plain in before:
            moved |= {plain} if not torch.equal(before.pop(plain), parameter) else set()
        else:
            adapters.add(name)
            assert "lora_B" not in name or parameter.abs().sum() > 0, f"{name} has not moved from zero"
    assert before == {}
    assert moved == {name for name in parameters_of(tiny_checkpoint) if ".multi_modal_projector." in name}
    layers = [f"model.vision_tower.encoder.layer.{n}.attention.{m}" for n in range(2) for m in LORA_NAMES]
    assert adapters == {f"{layer}.lora_{ab}.default.weight" for layer in layers for ab in "AB"}
    assert trainer.processing_class.event_tower == rule


def test_features_from_the_cache_train_as_videos_do(run, cache):
    assert losses_of(run(out="a")) == pytest.approx(losses_of(run("--feature_cache", cache, out="b")), rel=1e-4)


def test_the_loss_goes_down(run):
    whole_epochs = ["--per_device_train_batch_size", "5", "--num_train_epochs", "10"]
    losses = losses_of(run("--model", TOY_CHECKPOINT, *whole_epochs))
    assert losses[-1] < 0.8 * losses[0]


def test_a_checkpoint_holds_what_was_trained_and_no_more(run, tmp_path):
    run("--stage", "lora")
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-6"):
        projector, adapter = (
            load_file(folder / "projector.safetensors"),
            load_file(folder / "adapter_model.safetensors"),
        )
        assert len(projector) == 6 and len(adapter) == 16
        names = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth")}
        allowed = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
        assert names - allowed == {"projector.safetensors", "adapter_model.safetensors"}
        assert VJepaQwenProcessor.from_pretrained(folder).event_tower == "adapted"


def make_inputs(processor, clip, **kwargs):
    content = [{"type": "video", "video": clip}, {"type": "text", "text": "Describe this video."}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


@pytest.fixture
def trained_lora(run, tmp_path):
    trainer = run("--stage", "lora")
    return str(tmp_path / "out"), trainer.model.eval()


def test_adapter_files_load_with_peft_and_transformers(trained_lora, tiny_checkpoint, clips):
    folder, model = trained_lora
    inputs = make_inputs(VJepaQwenProcessor.from_pretrained(tiny_checkpoint).bind(model), clips[0])
    wanted = model.get_video_features(
        frame_features=inputs["frame_features"], frame_event_ids=inputs["frame_event_ids"]
    ).last_hidden_state
    base = VJepaQwenForConditionalGeneration.from_pretrained(tiny_checkpoint)
    base.load_adapter(folder)
    wrapped = PeftModel.from_pretrained(VJepaQwenForConditionalGeneration.from_pretrained(tiny_checkpoint), folder)
    plain = VJepaQwenForConditionalGeneration.from_pretrained(tiny_checkpoint)
    for other, is_same in ((base, True), (wrapped, True), (plain, False)):
        processor = VJepaQwenProcessor.from_pretrained(tiny_checkpoint).bind(other.eval())
        features = processor.segment(clips[0])[0].frame_features
        assert torch.allclose(features, wanted[0], atol=1e-5) == is_same


def test_merged_checkpoint_is_an_ordinary_one_with_the_same_logits(trained_lora, tmp_path, clips):
    folder, model = trained_lora
    merge.main([folder, str(tmp_path / "merged")])
    merged, report = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any("lora" in name or "base_layer" in name for name, _ in merged.named_parameters())
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    inputs = make_inputs(VJepaQwenProcessor.from_pretrained(folder).bind(model), clips[0])
    own = make_inputs(VJepaQwenProcessor.from_pretrained(tmp_path / "merged"), clips[0])
    assert torch.equal(inputs["frame_event_ids"], own["frame_event_ids"])
    torch.testing.assert_close(merged(**own).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_merging_the_projector_alone(run, tmp_path, tiny_checkpoint):
    trainer = run()
    merge.main([str(tmp_path / "out"), str(tmp_path / "merged")])
    merged, wanted = parameters_of(tmp_path / "merged"), dict(trainer.model.named_parameters())
    assert merged.keys() == wanted.keys() and all(torch.equal(merged[name], wanted[name]) for name in merged)


def test_videos_cut_by_the_base_tower_are_not_merged_silently(run, cache, tmp_path, tiny_checkpoint, clips):
    trainer = run("--stage", "lora", "--event_tower", "base", "--feature_cache", cache)
    folder = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"event_tower \('base'\) .*must be 'adapted' to be merged"):
        merge.main([folder, str(tmp_path / "merged")])
    merge.main([folder, str(tmp_path / "merged"), "--event-tower", "adapted"])
    assert VJepaQwenProcessor.from_pretrained(tmp_path / "merged").event_tower == "adapted"

    # The rule at inference: the spans of the tower without the LoRA, the features of the tower with it.
    base = VJepaQwenProcessor.from_pretrained(tiny_checkpoint).segment(clips)
    processor = VJepaQwenProcessor.from_pretrained(folder).bind(trainer.model.eval())
    requires_grad = [parameter.requires_grad for parameter in trainer.model.parameters()]
    adapted = processor.segment(clips)
    for plain, changed in zip(base, adapted, strict=True):
        assert torch.equal(plain.frame_event_ids, changed.frame_event_ids)
        assert not torch.allclose(plain.frame_features, changed.frame_features, atol=1e-4)
    assert [parameter.requires_grad for parameter in trainer.model.parameters()] == requires_grad


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["projector", "lora"])
def test_interrupted_and_resumed_gives_the_same_weights(run, tmp_path, monkeypatch, stage):
    """In the middle of an epoch, with dropout, gradient accumulation and a learning rate that falls."""
    options = ["--stage", stage, "--save_strategy", "steps", "--save_steps", "2", "--lr_scheduler_type", "linear"]
    options += ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "1"]
    options += ["--lora_dropout", "0.2"] if stage == "lora" else []
    whole = run(*options, out="whole")

    make_trainer = train.VJepaQwenTrainer
    monkeypatch.setattr(
        train,
        "VJepaQwenTrainer",
        lambda *args, callbacks, **kwargs: make_trainer(*args, callbacks=[*callbacks, Interrupt(3)], **kwargs),
    )
    with pytest.raises(KeyboardInterrupt):
        run(*options, out="parts")
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "parts").glob("checkpoint-*")) == ["checkpoint-2"]
    resumed = run(*options, "--resume_from_checkpoint", "last", out="parts")
    assert resumed.state.global_step == whole.state.global_step == 6
    wanted = dict(whole.model.named_parameters())
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in resumed.model.named_parameters())
    for name in ("projector.safetensors", *(["adapter_model.safetensors"] if stage == "lora" else [])):
        first, second = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_of_another_stage_is_refused(run, tmp_path):
    run("--max_steps", "1", "--save_steps", "1", "--save_strategy", "steps")
    with pytest.raises(ValueError, match="was it made by another --stage"):
        run("--stage", "lora", "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1"), out="other")


def test_the_best_checkpoint_is_kept_and_training_stops_early(run, tmp_path, folder):
    """What the toy has learned is forgotten by training on other answers: the evaluation becomes worse."""
    summary = "A cooking video in two scenes. First, a small red circle moves left. Second, a large blue star shakes."
    (tmp_path / "validation").mkdir()
    shutil.copy(os.path.join(folder, "0.mp4"), tmp_path / "validation" / "0.mp4")
    row = json.dumps({"file_name": "0.mp4", "summary": summary})
    (tmp_path / "validation" / "metadata.jsonl").write_text(row, encoding="utf-8")
    options = ["--eval_dataset", str(tmp_path), "--model", TOY_CHECKPOINT]
    trainer = run(*options, "--num_train_epochs", "8", "--early_stopping_patience", "2", "--save_total_limit", "8")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 8
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{3 * (best + 1)}")
    kept = load_file(os.path.join(trainer.state.best_model_checkpoint, "projector.safetensors"))
    saved = load_file(tmp_path / "out" / "projector.safetensors")
    assert all(torch.equal(kept[name], saved[name]) for name in kept)
    last = load_file(tmp_path / "out" / f"checkpoint-{trainer.state.global_step}" / "projector.safetensors")
    assert not any(torch.equal(kept[name], last[name]) for name in kept)
    loaded = load_trained(VJepaQwenForConditionalGeneration.from_pretrained(TOY_CHECKPOINT), str(tmp_path / "out"))
    assert all(torch.equal(loaded.state_dict()[name], kept[name]) for name in kept)


def test_a_table_shows_what_is_trained(run, capsys, tiny_checkpoint):
    run("--stage", "lora", "--max_steps", "1")
    table = {
        row.split("│")[1].strip(): row.split("│")[2:4] for row in capsys.readouterr().err.splitlines() if "│" in row
    }
    counts = {name: [int(cell.replace(",", "")) for cell in cells] for name, cells in table.items()}
    sizes = {name: parameter.numel() for name, parameter in parameters_of(tiny_checkpoint).items()}
    assert counts["vision_tower"][0] == 2 * 4 * 16 * (24 + 24)
    assert counts["multi_modal_projector"] == [sum(n for k, n in sizes.items() if "_projector" in k)] * 2
    assert counts["language_model"][0] == counts["lm_head"][0] == 0
    assert counts["all"][1] == sum(sizes.values()) + counts["vision_tower"][0]


@pytest.mark.parametrize("pattern", [r".*\.no_such_module", r".*\.mlp\.gate_proj"])
def test_a_stage_that_would_train_nothing_of_the_tower_is_refused(run, pattern):
    with pytest.raises(ValueError, match=r"lora_target_modules \(.*must match modules of the tower"):
        run("--stage", "lora", "--lora_target_modules", pattern)


def test_a_cache_is_refused_where_the_spans_move(run, cache):
    with pytest.raises(ValueError, match="feature_cache must not be given with --stage lora --event_tower adapted"):
        run("--stage", "lora", "--feature_cache", cache)


def test_the_tower_is_trained_on_one_window_of_each_video(run, cache, tmp_path):
    with pytest.raises(ValueError, match="one longer than a window .* num_frames= looks at fewer"):
        run("--stage", "lora", "--num_frames", "32", "--max_steps", "1")
    run("--stage", "lora", "--num_frames", "8", "--max_steps", "1")
    assert VJepaQwenProcessor.from_pretrained(tmp_path / "out").video_processor.num_frames == 8
    with pytest.raises(ValueError, match="is stale: video_processor changed"):
        run("--num_frames", "32", "--feature_cache", cache)


def test_tensorboard_gets_the_figures(run, tmp_path):
    run("--report_to", "tensorboard", "--max_steps", "1")
    assert list((tmp_path / "out").glob("runs/*/events.out.tfevents.*"))


def test_too_long_samples_are_left_out_before_the_training(run, cache, folder):
    """With cached features every length is known; text-only batches and processes that wait are no matter then."""
    trainer = run("--feature_cache", cache, "--max_steps", "1")
    lengths = sorted(trainer.data_collator.count_tokens(sample) for sample in trainer.train_dataset)
    options = ["--feature_cache", cache, "--max_steps", "1", "--max_length", str(lengths[2])]
    longer = sum(length > lengths[2] for length in lengths)
    assert longer > 0
    with pytest.raises(ValueError, match=rf"{longer} samples must have at most max_length \({lengths[2]}\) tokens"):
        run(*options)
    trainer = run(*options, "--skip_too_long")
    kept = sorted(trainer.data_collator.count_tokens(sample) for sample in trainer.train_dataset)
    assert kept == lengths[: len(lengths) - longer]


def test_a_batch_without_video_gives_tower_and_projector_zero_gradients(run):
    """Processes that train together wait for one another's gradients: none may be missing."""
    trainer = run("--stage", "lora", "--max_steps", "1")
    model, collator = trainer.model.train(), trainer.data_collator
    model.zero_grad()
    sample = next(sample for sample in trainer.train_dataset if not sample["videos"])
    outputs = model(**collator([sample]))
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None or gradient.any()] == []
    torch.testing.assert_close(outputs.loss, model.eval()(**collator([sample])).loss)


def test_defaults_are_the_research_release(tmp_path):
    arguments = train.VJepaQwenArguments(dataset="x")
    training = train.VJepaQwenTrainingArguments(str(tmp_path))
    assert (training.num_train_epochs, training.learning_rate, training.optim[:5]) == (5, 1e-4, "adamw")
    assert (arguments.lora_r, arguments.lora_alpha) == (16, 32) and training.activation_checkpointing


def test_samples_are_not_changed_by_training(run, folder):
    trainer = run("--max_steps", "1")
    assert trainer.train_dataset.samples == load_samples(folder) and math.isfinite(losses_of(trainer)[0])
