"""The model: sizes of the real one, both input paths, generation, gradients, checkpoints."""

import pytest
import torch
from conftest import TEXT_CONFIG, VISION_CONFIG, make_model
from transformers import GPT2Config, LlamaConfig

from vjepa_qwen import VJepaQwenConfig, VJepaQwenForConditionalGeneration, modeling_vjepa_qwen

# Two videos of different length, in the first and the third prompt; the second prompt has none.
FRAME_EVENT_IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 1, -1, -1, -1, -1]])
NUM_EVENTS = [3, 2]


@pytest.fixture
def inputs(model, tokenizer):
    torch.manual_seed(1)
    video = model.config.video_token_id
    rows = [[5, *[video] * 3, 6, 7, 8], [9, 10, 11], [12, *[video] * 2, 13]]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[tokenizer.pad_token_id] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values_videos": torch.randn(2, 16, 3, 32, 32),
        "frame_event_ids": FRAME_EVENT_IDS,
    }


@pytest.fixture
def feature_inputs(model, inputs):
    """The same batch with the tower's features instead of frames."""
    frames = inputs["pixel_values_videos"]
    with torch.no_grad():
        first = model.model.vision_tower(frames[:1]).pooler_output[0]
        second = model.model.vision_tower(frames[1:, :8]).pooler_output[0]
    features = torch.nn.utils.rnn.pad_sequence([first, second], batch_first=True)
    return {**{k: v for k, v in inputs.items() if k != "pixel_values_videos"}, "frame_features": features}


def test_default_config_describes_the_real_model():
    with torch.device("meta"):
        model = VJepaQwenForConditionalGeneration(VJepaQwenConfig())

    def count(*modules):
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    assert count(model.model.vision_tower) == 303_885_312
    assert count(model.model.multi_modal_projector) == 167_797_760
    assert count(model.model.language_model, model.lm_head) == 26_895_998_464


def test_config_refuses_a_placeholder_outside_of_the_vocabulary():
    with pytest.raises(ValueError, match=r"video_token_id \(248057\) must be an id of the text model's vocabulary"):
        VJepaQwenConfig(text_config={**TEXT_CONFIG, "vocab_size": 300})


def test_config_round_trips(tmp_path, model):
    model.config.save_pretrained(tmp_path)
    assert VJepaQwenConfig.from_pretrained(tmp_path).to_dict() == model.config.to_dict()


def test_both_input_paths_give_equal_logits(model, inputs, feature_inputs):
    with torch.no_grad():
        from_frames = model(**inputs).logits
        from_features = model(**feature_inputs).logits
    torch.testing.assert_close(from_frames, from_features, atol=1e-5, rtol=0)


def test_batched_equals_alone(model, inputs):
    with torch.no_grad():
        batched = model(**inputs).logits
        first = model(
            input_ids=inputs["input_ids"][:1],
            pixel_values_videos=inputs["pixel_values_videos"][:1],
            frame_event_ids=FRAME_EVENT_IDS[:1],
        ).logits
        text = model(input_ids=inputs["input_ids"][1:2, 4:]).logits
        third = model(
            input_ids=inputs["input_ids"][2:, 3:],
            pixel_values_videos=inputs["pixel_values_videos"][1:, :8],
            frame_event_ids=FRAME_EVENT_IDS[1:, :4],
        ).logits
    torch.testing.assert_close(batched[0], first[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(batched[1, 4:], text[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(batched[2, 3:], third[0], atol=1e-4, rtol=0)


def test_frames_beyond_a_videos_own_steps_are_never_read(model, inputs):
    changed = inputs["pixel_values_videos"].clone()
    changed[1, 8:] = torch.nan
    with torch.no_grad():
        expected = model(**inputs).logits
        actual = model(**{**inputs, "pixel_values_videos": changed}).logits
    assert torch.equal(expected, actual)


def test_longer_videos_are_encoded_window_by_window(model):
    frames = torch.randn(1, 32, 3, 32, 32)
    event_ids = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        features = model.get_video_features(frames, frame_event_ids=event_ids).last_hidden_state
        second_window = model.model.vision_tower(frames[:, 16:]).pooler_output
    torch.testing.assert_close(features[:, 8:], second_window, atol=1e-6, rtol=0)


def test_neighbouring_windows_of_one_length_share_a_pass(model, monkeypatch):
    frames = torch.randn(3, 32, 3, 32, 32)
    event_ids = torch.full((3, 16), -1)
    for video, num_steps in enumerate((16, 8, 2)):
        event_ids[video, :num_steps] = 0
    shapes = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    with torch.no_grad():
        together = model.get_video_features(frames, frame_event_ids=event_ids).last_hidden_state
        monkeypatch.setattr(modeling_vjepa_qwen, "TOKENS_PER_PASS", 1)
        alone = model.get_video_features(frames, frame_event_ids=event_ids).last_hidden_state
    hook.remove()
    assert shapes == [(3, 16), (1, 4), (1, 16), (1, 16), (1, 16), (1, 4)]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_events_are_the_mean_of_their_steps(model, feature_inputs):
    outputs = model.get_video_features(
        frame_features=feature_inputs["frame_features"], frame_event_ids=feature_inputs["frame_event_ids"]
    )
    assert [len(events) for events in outputs.pooler_output] == NUM_EVENTS
    expected = model.model.multi_modal_projector(feature_inputs["frame_features"][0, 3:7].mean(dim=0))
    torch.testing.assert_close(outputs.pooler_output[0][1], expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False, "disable_compile": True},
        {"prefill_chunk_size": 3, "do_sample": False},
    ],
    ids=["greedy", "sampling", "beams", "beams-and-sequences", "static-cache", "chunked-prefill"],
)
def test_generation_is_the_same_from_frames_and_from_features(model, inputs, feature_inputs, options):
    options = {"max_new_tokens": 6, **options}
    torch.manual_seed(3)
    from_frames = model.generate(**inputs, **options)
    torch.manual_seed(3)
    from_features = model.generate(**feature_inputs, **options)
    assert torch.equal(from_frames, from_features)
    assert len(from_frames) == 3 * options.get("num_return_sequences", 1)


def test_generation_depends_on_the_video(model, feature_inputs):
    """A generate that dropped the features would pass every comparison of the two paths."""
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    logits = model.generate(**feature_inputs, **options).logits[0]
    other = {**feature_inputs, "frame_features": feature_inputs["frame_features"].flip(-1)}
    other_logits = model.generate(**other, **options).logits[0]
    assert not torch.allclose(logits[0], other_logits[0], atol=1e-3)
    torch.testing.assert_close(logits[1], other_logits[1])  # the prompt without a video
    forward_logits = model(**feature_inputs).logits[:, -1]
    torch.testing.assert_close(logits, forward_logits, atol=1e-4, rtol=0)


def test_beams_keep_each_video_with_its_own_prompt(model, feature_inputs):
    batched = model.generate(**feature_inputs, num_beams=2, max_new_tokens=5, do_sample=False)
    alone = model.generate(
        input_ids=feature_inputs["input_ids"][2:, 3:],
        frame_features=feature_inputs["frame_features"][1:, :4],
        frame_event_ids=FRAME_EVENT_IDS[1:, :4],
        num_beams=2,
        max_new_tokens=5,
        do_sample=False,
    )
    length = alone.shape[1] - 4
    assert torch.equal(batched[2, 7 : 7 + length], alone[0, 4:])


def test_encoder_outputs_can_be_passed_in(model, inputs):
    with torch.no_grad():
        expected = model(**inputs).logits
        video = model.get_video_features(inputs["pixel_values_videos"], frame_event_ids=inputs["frame_event_ids"])
        actual = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mm_encoder_outputs={"video": video},
        ).logits
    assert torch.equal(expected, actual)


def test_embeddings_can_replace_ids(model, inputs):
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        expected = model(**inputs).logits
        actual = model(inputs_embeds=embeddings, **{k: v for k, v in inputs.items() if k != "input_ids"}).logits
    assert torch.equal(expected, actual)


@pytest.mark.parametrize(
    ("event_ids", "sample"),
    [
        ([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, -1, -1, -1, -1]], 0),  # one event too few in all
        ([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 1, 2, -1, -1, -1, -1]], 2),  # one too many in all
        ([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 2, -1, -1, -1, -1]], 0),  # the sum is right, the samples are not
    ],
)
def test_mismatch_names_the_sample_and_both_numbers(model, inputs, event_ids, sample):
    with pytest.raises(ValueError, match=rf"Sample {sample} of the batch: the \d video placeholders .* do not match"):
        model(**{**inputs, "frame_event_ids": torch.tensor(event_ids)})


def test_placeholders_without_a_video_are_an_error(model, inputs):
    with pytest.raises(ValueError, match="Sample 0 of the batch: its prompt has 3 video placeholders but no video"):
        model(input_ids=inputs["input_ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_event_ids": None}, "frame_event_ids must be given"),
        ({"pixel_values_videos": torch.zeros(2, 16, 3, 48, 32)}, r"frame size \(48x32\) must be 32x32"),
        ({"pixel_values_videos": torch.zeros(1, 16, 3, 32, 32)}, "must hold the same number of videos"),
        ({"pixel_values_videos": torch.zeros(2, 4, 3, 32, 32)}, "must cover at most the 4 frames"),
        ({"frame_features": torch.zeros(2, 8, 24)}, "Exactly one of pixel_values_videos and frame_features"),
        ({"pixel_values_videos": None, "frame_features": torch.zeros(2, 8, 23)}, "must have the shape"),
    ],
)
def test_bad_vision_inputs_are_one_clear_error(model, inputs, changes, message):
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **changes})


def test_padding_does_not_change_a_single_prompt(model, inputs):
    """Qwen3.5's DeltaNet layers once let padding of a single sample into their state (transformers #46773)."""
    with torch.no_grad():
        padded = model(input_ids=inputs["input_ids"][1:2], attention_mask=inputs["attention_mask"][1:2]).logits[0, 4:]
        plain = model(input_ids=inputs["input_ids"][1:2, 4:]).logits[0]
    torch.testing.assert_close(padded, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_step_moves_every_parameter(tokenizer, inputs, checkpointing):
    model = make_model(tokenizer).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels).loss.backward()
    # Rows of the vocabulary that the batch does not use have no gradient; every parameter as a whole has.
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key bias shifts all scores of a query alike: the softmax takes it out, and its gradient is rounding.
    assert [name for name in without if not name.endswith("attention.key.bias")] == []


def test_checkpointing_gives_the_same_gradients(tokenizer, inputs):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(tokenizer).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_model_loads_with_equal_logits(tmp_path, tokenizer, inputs, tied):
    model = make_model(tokenizer, text_config={**TEXT_CONFIG, "tie_word_embeddings": tied})
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded.eval()(**inputs).logits)


@pytest.mark.parametrize(
    "text_config",
    [
        {"model_type": "llama", "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": None},
        {
            "model_type": "gpt2",
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "tie_word_embeddings": True,
        },
    ],
    ids=["llama", "gpt2"],
)
def test_other_text_models_and_towers_fit(tmp_path, tokenizer, inputs, text_config):
    vision_config = {**VISION_CONFIG, "hidden_size": 36, "num_attention_heads": 3, "patch_size": 8}
    model = make_model(tokenizer, text_config=text_config, vision_config=vision_config)
    assert isinstance(model.config.text_config, (LlamaConfig, GPT2Config))
    model.save_pretrained(tmp_path)
    loaded = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), loaded.generate(**inputs, max_new_tokens=4))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)


def test_device_map_and_half_precision(tiny_checkpoint, inputs):
    model = VJepaQwenForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 3
