"""VJepaQwenDataCollator: labels are the assistant's tokens, all of them and nothing else, with any chat template."""

import importlib.util
from pathlib import Path

import datasets
import pytest
import torch
from conftest import make_model
from test_chat_template import OURS
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from vjepa_qwen.training.collator import VJepaQwenDataCollator, render_conversation

TEMPLATES = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
FLAVOURS = {
    "ours": OURS,
    "nothink": (TEMPLATES / "qwen3_5_nothink.jinja").read_text(encoding="utf-8"),
    "think": (TEMPLATES / "qwen3_5_think.jinja").read_text(encoding="utf-8"),
}
VIDEO = {"type": "video"}


def text(text):
    return {"type": "text", "text": text}


def turn(question, answer, num_videos=0):
    user = {"role": "user", "content": [VIDEO] * num_videos + [text(question)]}
    return [user, {"role": "assistant", "content": [text(answer)]}]


def features(*num_steps):
    generator = torch.Generator().manual_seed(sum(num_steps))
    return [torch.randn(steps, 24, generator=generator) for steps in num_steps]


@pytest.fixture(params=FLAVOURS)
def any_template(request, processor):
    processor.chat_template = FLAVOURS[request.param]
    return processor


def answers_of(processor, batch):
    return [
        processor.tokenizer.decode(ids[labels != -100])
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def test_labels_are_the_answer_and_the_end_of_its_turn(any_template):
    samples = [
        {"messages": turn("What?", "A red circle."), "videos": []},
        {"messages": turn("무엇?", " 빨간 원이 왼쪽으로 움직입니다. ", 1), "frame_features": features(8)},
        {"messages": turn("Compare", "First <b>, second\n\nc.", 2), "frame_features": features(8, 4)},
    ]
    batch = VJepaQwenDataCollator(any_template)(samples)
    assert answers_of(any_template, batch) == [
        "A red circle.<|im_end|>",
        "빨간 원이 왼쪽으로 움직입니다.<|im_end|>",
        "First <b>, second\n\nc.<|im_end|>",
    ]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert not (kept & (batch["attention_mask"] == 0)).any()


def test_every_turn_of_a_conversation_has_labels(any_template):
    messages = [{"role": "system", "content": [text("Be brief.")]}]
    messages += turn("What?", "A circle.", 1) + turn("And here?", "A circle.", 1) + turn("Why?", "No idea.")
    batch = VJepaQwenDataCollator(any_template)([{"messages": messages, "frame_features": features(8, 8)}])
    assert answers_of(any_template, batch) == ["A circle.<|im_end|>A circle.<|im_end|>No idea.<|im_end|>"]


def test_prompt_is_the_one_of_inference(any_template):
    """What stands before the last answer is what `apply_chat_template(add_generation_prompt=True)` gives."""
    messages = turn("What?", "A circle.") + turn("Why?", "No idea.")
    rendered, spans = render_conversation(any_template, messages)
    prompt = any_template.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert rendered[: spans[-1][0]] == prompt


def test_two_identical_answers_and_answers_inside_of_questions(any_template):
    messages = turn("A", "A") + turn("Say A", "A")
    rendered, spans = render_conversation(any_template, messages)
    assert [rendered[start:end] for start, end in spans] == ["A<|im_end|>"] * 2
    assert spans[0][1] < rendered.index("Say A") < spans[1][0]


def test_a_chain_of_thought_is_refused(any_template):
    messages = turn("What?", "<think>\nHm.\n</think>\n\nA circle.")
    with pytest.raises(ValueError, match="message 1 .*must be rendered as it is by the chat template"):
        render_conversation(any_template, messages)


def test_a_template_without_an_end_of_turn_is_refused(processor):
    processor.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}"
    with pytest.raises(ValueError, match="must be followed by a special token that ends the turn"):
        render_conversation(processor, turn("What?", "A circle."))


def test_a_template_that_asks_differently_at_inference_is_refused(processor):
    processor.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}answer: {% endif %}"
    )
    with pytest.raises(ValueError, match="must follow the prompt that the model gets at inference"):
        render_conversation(processor, turn("What?", "A circle."))


def test_no_answer_is_refused(processor):
    with pytest.raises(ValueError, match="there is nothing to train on"):
        render_conversation(processor, turn("What?", "A circle.")[:1])


def test_a_placeholder_in_an_answer_is_refused(processor):
    with pytest.raises(ValueError, match="an answer must not contain the video placeholder"):
        VJepaQwenDataCollator(processor)([{"messages": turn("What?", "A <|video_pad|>.")}])


def test_a_batch_of_text_only(processor, model):
    batch = VJepaQwenDataCollator(processor)([{"messages": turn("Hello", "Hi")}, {"messages": turn("Who?", "A toy.")}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert torch.isfinite(model(**batch).loss)


def test_loss_of_a_batch_is_that_of_its_samples(processor, model):
    """Padding and the other samples change nothing."""
    samples = [
        {"messages": turn("What?", "A red circle moves left.", 1), "frame_features": features(8)},
        {"messages": turn("Hello", "Hi"), "frame_features": []},
        {"messages": turn("Compare", "Same.", 2), "frame_features": features(8, 4)},
    ]
    collator = VJepaQwenDataCollator(processor)
    together = model(**collator(samples), num_items_in_batch=1).loss
    alone = sum(model(**collator([sample]), num_items_in_batch=1).loss for sample in samples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_videos_with_known_spans_give_their_frames_and_the_same_logits(processor, model, clips):
    processor.bind(model)
    found = processor.segment(clips[0])[0]
    messages, collator = turn("What?", "A circle.", 1), VJepaQwenDataCollator(processor)
    event_ids = [found.frame_event_ids]
    cut = collator([{"messages": messages, "videos": [clips[0]], "frame_event_ids": event_ids}])
    assert "pixel_values_videos" in cut and "frame_features" not in cut
    cached = collator([{"messages": messages, "frame_features": [found.frame_features], "frame_event_ids": event_ids}])
    encoded = collator([{"messages": messages, "videos": [clips[0]]}])
    for batch in (cached, encoded):
        torch.testing.assert_close(model(**batch).logits, model(**cut).logits)


def test_known_spans_must_fit_the_video(processor, model, clips):
    processor.bind(model)
    sample = {"messages": turn("What?", "A circle.", 1), "videos": [clips[0]], "frame_event_ids": [torch.zeros(3)]}
    with pytest.raises(ValueError, match=r"frame_event_ids \(3 steps\) must have one id for each of the"):
        VJepaQwenDataCollator(processor)([sample])


def test_too_long_is_an_error_that_names_the_sample(processor):
    sample = {"name": "metadata.jsonl:7", "messages": turn("What?", "A circle." * 50)}
    with pytest.raises(ValueError, match=r"metadata.jsonl:7 \(\d+ tokens\) must have at most max_length \(50\)"):
        VJepaQwenDataCollator(processor, max_length=50)([sample])


def test_too_long_samples_are_left_out_as_a_whole_and_counted(processor):
    collator = VJepaQwenDataCollator(processor, max_length=80, skip_too_long=True)
    long = {"messages": turn("What?", "A circle." * 50, 1), "frame_features": features(8)}
    short = {"messages": turn("What?", "A circle.", 1), "frame_features": features(4)}
    batch = collator([long, short, long])
    assert len(batch["input_ids"]) == len(batch["frame_features"]) == 1
    assert answers_of(processor, batch) == ["A circle.<|im_end|>"]
    assert collator.num_skipped == 2
    with pytest.raises(ValueError, match="nothing is left to train on"):
        collator([long])


def test_columns_that_the_trainer_removed_are_missed(processor, tokenizer, tmp_path):
    dataset = [{"messages": turn("Hello", "Hi")}]
    arguments = TrainingArguments(tmp_path, report_to="none", max_steps=1, use_cpu=True)
    trainer = Trainer(make_model(tokenizer), arguments, VJepaQwenDataCollator(processor), dataset)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        trainer.train()


def test_videos_and_features_in_one_batch_are_refused(processor, clips):
    samples = [{"messages": turn("What?", "A circle.", 1), "videos": clips[:1]}]
    samples += [{"messages": turn("What?", "A circle.", 1), "frame_features": features(8)}]
    with pytest.raises(ValueError, match="must all have videos or all have frame_features"):
        VJepaQwenDataCollator(processor)(samples)


def test_trl_trains_with_it(processor, tokenizer, tmp_path, clips):
    processor.bind(model := make_model(tokenizer))
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    rows = [{"messages": turn("What?", "A red circle.", 1), "videos": [clip]} for clip in clips]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model,
        arguments,
        data_collator=VJepaQwenDataCollator(processor),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
    )
    trainer.train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".multi_modal_projector." in name}
