"""The processor: bound, unbound and precomputed; batches; the chat; what it saves."""

import numpy as np
import pytest
import torch
from conftest import make_model, user_message, write_scenes

from vjepa_qwen import EventSegmenter, VJepaQwenForConditionalGeneration, VJepaQwenProcessor

CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture
def unbound(tiny_checkpoint):
    return VJepaQwenProcessor.from_pretrained(tiny_checkpoint)


@pytest.fixture
def bound(processor, model):
    return processor.bind(model)


def placeholders(processor, inputs):
    return (inputs["input_ids"] == processor.video_token_id).sum(dim=1).tolist()


def test_bound_processor_returns_features_and_one_placeholder_per_event(bound, clips):
    inputs = bound.apply_chat_template(user_message(clips[0]), **CHAT)
    assert set(inputs) == {"input_ids", "attention_mask", "frame_features", "frame_event_ids"}
    assert inputs["frame_features"].shape == (1, 8, 24)
    assert inputs["frame_features"].dtype == torch.float32
    assert inputs["frame_event_ids"].dtype == torch.int64
    assert placeholders(bound, inputs) == [int(inputs["frame_event_ids"].max()) + 1]


def test_unbound_processor_returns_frames_and_the_same_spans(unbound, bound, clips):
    inputs = unbound.apply_chat_template(user_message(clips[0]), **CHAT)
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values_videos", "frame_event_ids"}
    assert inputs["pixel_values_videos"].shape == (1, 16, 3, 32, 32)
    expected = bound.apply_chat_template(user_message(clips[0]), **CHAT)
    assert torch.equal(inputs["frame_event_ids"], expected["frame_event_ids"])


def test_bound_unbound_and_precomputed_give_equal_logits_and_tokens(model, unbound, bound, clips):
    conversations = [user_message(clips[0]), user_message(clips[2])]
    events = bound.segment(clips[0]) + bound.segment(clips[2])
    batches = [
        bound.apply_chat_template(conversations, **CHAT),
        unbound.apply_chat_template(conversations, **CHAT),
        unbound.apply_chat_template(conversations, **CHAT, processor_kwargs={"return_frame_features": True}),
        bound.apply_chat_template([user_message(video) for video in events], **CHAT),
    ]
    prompts = bound.apply_chat_template(conversations, add_generation_prompt=True)
    features = [video.frame_features for video in events]
    batches.append(bound(text=prompts, frame_features=features, return_tensors="pt"))
    with torch.no_grad():
        logits = [model(**batch).logits for batch in batches]
    tokens = [model.generate(**batch, max_new_tokens=8, do_sample=False) for batch in batches]
    for i in range(1, len(batches)):
        torch.testing.assert_close(logits[i], logits[0], atol=1e-4, rtol=0)
        assert torch.equal(tokens[i], tokens[0])


def test_an_adapter_that_only_the_model_carries_is_respected(tokenizer, model, unbound, clips):
    """Unbound, the frames travel: another tower in the model gives other logits."""
    other = make_model(tokenizer, seed=7)
    other.model.language_model.load_state_dict(model.model.language_model.state_dict())
    inputs = unbound.apply_chat_template(user_message(clips[0]), **CHAT)
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, other(**inputs).logits, atol=1e-3)


def test_prompts_with_no_one_and_two_videos_in_one_batch_equal_each_alone(model, bound, unbound, clips):
    conversations = [user_message(clips[0], clips[1]), user_message(), user_message(clips[2], text="And this one?")]
    for processor in (bound, unbound):
        batch = processor.apply_chat_template(conversations, **CHAT)
        assert batch["frame_event_ids"].shape[0] == 3
        with torch.no_grad():
            logits = model(**batch).logits
            for row, conversation in enumerate(conversations):
                inputs = processor.apply_chat_template(conversation, **CHAT)
                alone = model(**inputs).logits[0]
                assert (batch["attention_mask"][row, : -len(alone)] == 0).all()
                torch.testing.assert_close(logits[row, -len(alone) :], alone, atol=1e-4, rtol=0)


def test_text_alone_needs_no_tower(processor):
    inputs = processor.apply_chat_template(user_message(), **CHAT)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert set(processor(text="Hello", return_tensors="pt")) == {"input_ids", "attention_mask"}


def test_videos_alone_need_no_text(bound, clips):
    assert set(bound(videos=clips[0])) == {"frame_features", "frame_event_ids"}


def test_videos_of_different_length_are_padded_and_marked(unbound, model, clips):
    short = unbound.segment(clips[0], num_frames=8)[0]
    long = unbound.segment(clips[0], num_frames=16)[0]
    inputs = unbound.apply_chat_template([user_message(short), user_message(long)], **CHAT)
    assert inputs["frame_features"].shape[:2] == (2, 8)
    assert (inputs["frame_event_ids"][0, 4:] == -1).all()
    alone = unbound.apply_chat_template(user_message(short), **CHAT)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -alone["input_ids"].shape[1] :]
        torch.testing.assert_close(logits, model(**alone).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("option", "num_steps"), [({"num_frames": 8}, 4), ({"fps": 2}, 3)])
def test_num_frames_and_fps_are_honoured(bound, clips, option, num_steps):
    """`fps=2` of a clip of 3 seconds: 6 frames, 3 steps."""
    inputs = bound.apply_chat_template(user_message(clips[0]), **CHAT, processor_kwargs=dict(option))
    assert inputs["frame_event_ids"].shape == (1, num_steps)
    assert bound.segment(clips[0], **option)[0].frame_features.shape == (num_steps, 24)


def test_beyond_one_window_features_are_returned_with_one_warning(unbound, bound, clips, caplog):
    options = {"processor_kwargs": {"num_frames": 32}}
    with caplog.at_level("WARNING"):
        inputs = unbound.apply_chat_template(user_message(clips[0]), **CHAT, **options)
    assert inputs["frame_features"].shape == (1, 16, 24)
    assert sum("processor.bind(model)" in record.getMessage() for record in caplog.records) == 1
    expected = bound.apply_chat_template(user_message(clips[0]), **CHAT, **options)
    assert torch.equal(inputs["frame_event_ids"], expected["frame_event_ids"])
    with pytest.raises(ValueError, match=r"return_frame_features \(False\)"):
        options["processor_kwargs"]["return_frame_features"] = False
        unbound.apply_chat_template(user_message(clips[0]), **CHAT, **options)


def test_segment_gives_contiguous_events_in_seconds(bound, clips):
    for clip, duration in zip(clips, (3.0, 1.0, 4.0), strict=True):
        video = bound.segment(clip)[0]
        assert video.duration_seconds == pytest.approx(duration)
        assert video.events[0].start_seconds == 0 and video.events[-1].end_seconds == pytest.approx(duration)
        for event, following in zip(video.events, video.events[1:], strict=False):
            assert event.start_seconds < event.end_seconds == following.start_seconds
        assert video.num_events == len(video.boundaries) + 1 == int(video.frame_event_ids.max()) + 1
        assert video.timestamps.shape == (16,) and video.distances.shape == (8,)


def test_segment_finds_the_cuts(bound, tmp_path):
    """Three scenes of 8 frames each at 8 frames per second: cuts at 1 and 2 seconds, a step is 3/8 of a second."""
    clip = write_scenes(tmp_path / "clip.mp4", [(250, 250, 250), (10, 10, 10), (200, 100, 0)])
    bound.segmenter = EventSegmenter(min_events=3, max_events=3, min_distance=1e-6)
    starts = [event.start_seconds for event in bound.segment(clip)[0].events]
    assert starts == pytest.approx([0, 1, 2], abs=0.375)


def test_segment_is_the_same_alone_and_in_a_list(bound, clips):
    together = bound.segment(clips)
    for clip, video in zip(clips, together, strict=True):
        alone = bound.segment(clip)[0]
        assert alone.events == video.events
        assert torch.equal(alone.frame_features, video.frame_features)


def test_thresholds_can_be_tuned_without_encoding_again(bound, clips):
    video = bound.segment(clips[2])[0]
    again = bound.segmenter.segment_distances(video.distances)
    assert np.array_equal(again.frame_event_ids, video.frame_event_ids.numpy())


def test_given_spans_are_kept(bound):
    features = torch.randn(2, 4, 24)
    inputs = bound(
        text=["<|video_pad|>", "<|video_pad|>"],
        frame_features=features,
        frame_event_ids=[[0, 0, 1, 2], [0, 0, 0, 0]],
        return_tensors="pt",
    )
    assert inputs["frame_event_ids"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]
    assert placeholders(bound, inputs) == [3, 1]


def test_saved_processor_keeps_every_parameter(tmp_path, bound):
    bound.save_pretrained(tmp_path)
    loaded = VJepaQwenProcessor.from_pretrained(tmp_path)
    assert loaded.segmenter == bound.segmenter
    assert loaded.chat_template == bound.chat_template
    assert loaded.video_processor.to_dict() == bound.video_processor.to_dict()
    assert bound._vision_tower is not None, "saving must not unbind"


def test_unbound_processor_reads_only_the_shards_of_the_tower(tmp_path, model, processor, clips, bound):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    processor.save_pretrained(tmp_path)
    for shard in tmp_path.glob("*.safetensors"):
        if b"vision_tower" not in shard.read_bytes():
            shard.unlink()
    video = VJepaQwenProcessor.from_pretrained(tmp_path).segment(clips[0])[0]
    assert video.events == bound.segment(clips[0])[0].events


def test_half_precision_model_and_inputs(tiny_checkpoint, processor, clips):
    model = VJepaQwenForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    inputs = processor.bind(model).apply_chat_template(user_message(clips[0]), **CHAT).to(torch.bfloat16)
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1


def test_thinking_is_off_unless_asked_for(processor):
    prompt = processor.apply_chat_template(user_message(), add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    prompt = processor.apply_chat_template(user_message(), add_generation_prompt=True, enable_thinking=True)
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(text="<|video_pad|>", frame_features=[torch.zeros(24)]), "must be a list with one"),
        (
            lambda p: p(text="<|video_pad|>", frame_features=[torch.zeros(3, 24)], frame_event_ids=[[0, 0]]),
            r"frame_event_ids \(\[2\] steps\) must have one id for each step",
        ),
        (lambda p: p(text="no placeholder", frame_features=[torch.zeros(3, 24)]), "0 video placeholders .* for 1 "),
        (lambda p: p(text="<|video_pad|>"), "no videos were passed"),
        (lambda p: p(text="hello", images=[np.zeros((4, 4, 3))]), "images and audio must not be given"),
        (lambda p: p(text="<|video_pad|>", videos=[np.zeros((4, 8, 8, 3), dtype=np.uint8)]), "made from parts"),
        (lambda p: p.bind(torch.nn.Linear(1, 1)), "must hold a VJepaQwenVisionTower"),
        (lambda p: p(), "at least one input"),
    ],
)
def test_bad_inputs_are_one_clear_error(processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(processor)


def test_another_towers_geometry_is_refused(processor, model):
    processor.video_processor.frames_per_clip = 8
    with pytest.raises(ValueError, match=r"frames_per_clip of the vision tower \(16\) must be the video processor's"):
        processor.bind(model)


def test_truncation_through_a_video_is_refused(bound, clips):
    with pytest.raises(ValueError):
        bound.apply_chat_template(
            user_message(clips[2]), **CHAT, processor_kwargs={"truncation": True, "max_length": 5}
        )


def test_unknown_video_option_is_refused(bound, clips):
    with pytest.raises((TypeError, ValueError), match="crop_size"):
        bound(text="<|video_pad|>", videos=clips[0], crop_size=64)
