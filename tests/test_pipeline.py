"""The `video-text-to-text` pipeline, and transformers' own two with the same checkpoint."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import user_message, write_scenes
from fresh_process import run_fresh
from PIL import Image
from transformers import TextStreamer, pipeline

from vjepa_qwen import TOY_CHECKPOINT, VJepaQwenForConditionalGeneration, VJepaQwenPipeline, VJepaQwenProcessor

SHORT = str(Path(__file__).parent.parent / "examples" / "short.mp4")
DESCRIBE = "Describe this video."


@pytest.fixture(scope="module")
def pipe():
    """Of the toy, greedy."""
    model = VJepaQwenForConditionalGeneration.from_pretrained(TOY_CHECKPOINT)
    processor = VJepaQwenProcessor.from_pretrained(TOY_CHECKPOINT)
    return VJepaQwenPipeline(model=model, processor=processor, device="cpu", max_new_tokens=80)


@pytest.fixture
def tower_calls(pipe):
    """Grows by one entry with every window that the tower encodes."""
    calls = []
    hook = pipe.model.model.vision_tower.register_forward_hook(lambda *arguments: calls.append(1))
    yield calls
    hook.remove()


@pytest.fixture(scope="module")
def expected(pipe):
    """Of the short, as the two calls of the README give it."""
    processor = pipe.processor.bind(pipe.model)
    inputs = processor.apply_chat_template(
        user_message(SHORT), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    tokens = pipe.model.generate(**inputs, max_new_tokens=80)[0, inputs["input_ids"].shape[1] :]
    video = processor.segment(SHORT)[0]
    events = [[event.start_seconds, event.end_seconds, event.score] for event in video.events]
    return processor.decode(tokens, skip_special_tokens=True), events


def values(events):
    return [list(event.values()) for event in events]


def test_a_path_gives_text_and_events_and_is_encoded_once(pipe, tower_calls, expected):
    (result,) = pipe(SHORT)
    assert set(result) == {"generated_text", "events"}
    assert (result["generated_text"], values(result["events"])) == expected
    assert "video" in result["generated_text"]
    assert list(result["events"][0]) == ["start_seconds", "end_seconds", "score"]
    assert len(tower_calls) == 1
    json.dumps(result)  # nothing but plain numbers and strings


@pytest.mark.parametrize("kind", ["path object", "file url", "bytes", "events", "chat", "dict", "chat in a tuple"])
def test_every_kind_of_input_gives_the_same(pipe, expected, kind):
    path = Path(SHORT)
    inputs = {
        "path object": lambda: path,
        "file url": lambda: path.as_uri(),
        "bytes": lambda: path.read_bytes(),
        "events": lambda: pipe.processor.segment(SHORT)[0],
        "chat": lambda: user_message(SHORT),
        "dict": lambda: {"video": SHORT, "text": DESCRIBE},
        "chat in a tuple": lambda: tuple(user_message(SHORT)),
    }
    (result,) = pipe(inputs[kind]())
    assert (result["generated_text"], values(result["events"])) == expected


def test_frames_as_an_array_or_as_images(pipe):
    with av.open(SHORT) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    (from_array,) = pipe(np.stack(frames))
    assert "video" in from_array["generated_text"]
    for video in (frames, tuple(frames), {"video": frames}, [Image.fromarray(frame) for frame in frames]):
        assert pipe(video) == [from_array]
    assert pipe([np.stack(frames)] * 2, batch_size=2) == pipe([frames, frames]) == [[from_array]] * 2
    assert pipe([]) == []


def test_a_batch_is_what_each_input_gives_alone(pipe, tower_calls, tmp_path):
    other = write_scenes(tmp_path / "other.mp4", [(200, 30, 30), (30, 30, 200)], frames_per_scene=16)
    inputs = [
        SHORT,
        {"video": other, "text": "What is the domain of this video?"},
        user_message(other),
        {"text": "Hi"},
    ]
    alone = [pipe(item) for item in inputs]
    assert len(tower_calls) == 3
    assert pipe(inputs, batch_size=3) == alone
    assert len(tower_calls) == 6
    assert list(pipe((item for item in inputs[:2]), batch_size=2)) == alone[:2]
    texts = [DESCRIBE, "What is the domain of this video?"]
    assert pipe([SHORT, other], text=texts, batch_size=2) == alone[:2]
    assert pipe([user_message(SHORT), user_message(other)], batch_size=2) == [alone[0], alone[2]]


def test_text_asks_and_can_be_set_for_all_calls(pipe):
    (asked,) = pipe(SHORT, text="What is the domain of this video?")
    assert asked != pipe(SHORT)[0]
    always = VJepaQwenPipeline(
        model=pipe.model, processor=pipe.processor, device="cpu", text="What is the domain of this video?"
    )
    assert always(SHORT) == [asked]


def test_text_alone_is_a_prompt_without_video(pipe, tower_calls):
    (result,) = pipe(text="Hello")
    assert result["events"] == [] and result["generated_text"] and not tower_calls
    assert pipe(text=["Hello", "Hello"], batch_size=2) == [[result], [result]]
    assert pipe(text=user_message(text="Hello")) == [result]


def test_generation_arguments_reach_generate_and_several_sequences_cost_one_encoding(pipe, tower_calls):
    (result,) = pipe(SHORT, max_new_tokens=3)
    assert len(pipe.tokenizer(result["generated_text"]).input_ids) <= 3
    assert len(tower_calls) == 1
    results = pipe([SHORT, SHORT], batch_size=2, num_beams=3, num_return_sequences=3, max_new_tokens=6)
    assert [len(sequences) for sequences in results] == [3, 3] and results[0] == results[1]
    assert len({result["generated_text"] for result in results[0]}) == 3
    assert len(tower_calls) == 3
    with pytest.raises(ValueError, match="max_new_token"):
        pipe(SHORT, max_new_token=3)


def test_video_options_and_special_tokens(pipe, expected):
    (result,) = pipe(SHORT, num_frames=8, skip_special_tokens=False)
    assert len(result["events"]) <= 4 and values(result["events"]) != expected[1]
    assert result["generated_text"].endswith("<|im_end|>")


def test_thinking_is_off_unless_asked_for(pipe, monkeypatch):
    prompts = []
    original = type(pipe.processor).__call__
    monkeypatch.setattr(
        type(pipe.processor),
        "__call__",
        lambda self, **kwargs: prompts.extend(kwargs["text"]) or original(self, **kwargs),
    )
    pipe(SHORT, max_new_tokens=1)
    pipe(SHORT, max_new_tokens=1, enable_thinking=True)
    assert prompts[0].endswith("<think>\n\n</think>\n\n") and prompts[1].endswith("<think>\n")


def test_full_text_is_the_conversation_and_an_answer_is_continued(pipe, expected):
    (result,) = pipe(SHORT, return_full_text=True)
    assert result["generated_text"] == [*user_message(SHORT), {"role": "assistant", "content": expected[0]}]
    half = expected[0][: len(expected[0]) // 2]
    for content, get_text in ((half, lambda c: c), ([{"type": "text", "text": half}], lambda c: c[0]["text"])):
        chat = [*user_message(SHORT), {"role": "assistant", "content": content}]
        (result,) = pipe(chat, return_full_text=True)
        assert result["generated_text"][-1]["role"] == "assistant"
        assert get_text(result["generated_text"][-1]["content"]).startswith(half)
        assert len(result["generated_text"]) == len(chat)


def test_events_of_several_videos_say_which(pipe, tower_calls):
    (result,) = pipe(user_message(SHORT, SHORT), max_new_tokens=2)
    assert {event["video_index"] for event in result["events"]} == {0, 1}
    assert len(tower_calls) == 2


def test_text_is_streamed_while_it_is_generated(pipe, expected):
    class Collector(TextStreamer):
        chunks = []

        def on_finalized_text(self, text, stream_end=False):
            self.chunks.append(text)

    pipe(SHORT, streamer=Collector(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert len(Collector.chunks) > 5 and "".join(Collector.chunks) == expected[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "must not both be left out"),
        ((user_message(SHORT), "What?"), "must be left out with a chat"),
        (([SHORT, SHORT], ["What?"]), "one for each entry of videos"),
        (("missing.mp4",), "missing.mp4.*no such file"),
        (([{"role": "user", "content": [{"type": "image", "url": "a.jpg"}]}],), "type 'image'.*must be a text, or a"),
        ((np.zeros((2, 8, 64, 64, 3), dtype=np.uint8),), r"video \(2 videos\) must be one; pass several as a list"),
        (([{"role": "user", "content": [{"type": "video"}]}],), "one of 'video', 'url' and 'path'"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(*arguments)


def test_a_pipeline_needs_the_processor(pipe):
    with pytest.raises(ValueError, match=r"processor \(None\) must be"):
        VJepaQwenPipeline(model=pipe.model, device="cpu")


def test_transformers_own_pipelines_give_the_same_text(pipe, expected):
    parts = {"model": pipe.model, "processor": VJepaQwenProcessor.from_pretrained(TOY_CHECKPOINT), "device": "cpu"}
    options = {"return_full_text": False, "max_new_tokens": 80}
    any_to_any, image_text_to_text = (pipeline(task, **parts) for task in ("any-to-any", "image-text-to-text"))
    prompt = pipe.processor.apply_chat_template(user_message(SHORT), add_generation_prompt=True, tokenize=False)
    for result in (
        any_to_any(text=prompt, videos=SHORT, **options),
        any_to_any(text=user_message(SHORT), **options),
        image_text_to_text(text=user_message(SHORT), **options),
    ):
        assert result[0]["generated_text"] == expected[0]
    batch = any_to_any(text=[prompt, prompt], videos=[SHORT, SHORT], **options)
    assert [result["generated_text"] for result in batch] == [expected[0]] * 2
    (full,) = image_text_to_text(text=user_message(SHORT), max_new_tokens=80)
    assert full["generated_text"][-1] == {"role": "assistant", "content": expected[0]}


NO_TASK = """
from transformers import AutoModel, pipeline

folder, video, text = sys.argv[1:]
pipe = pipeline(model=folder, trust_remote_code=True, device="cpu")
results = [type(pipe).__name__, pipe.task, pipe(video, max_new_tokens=80)[0]]
chat = [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": text}]}]
for task in ("any-to-any", "image-text-to-text"):
    other = pipeline(task, model=folder, trust_remote_code=True, device="cpu")
    results.append(other(text=chat, return_full_text=False, max_new_tokens=80)[0]["generated_text"])
pipe.save_pretrained("again")
print(json.dumps([*results, pipeline(model="again", trust_remote_code=True)(video, max_new_tokens=80)[0]]))
"""


@pytest.mark.slow
def test_no_task_is_needed_with_a_saved_folder_and_saved_again_it_still_is_not(expected, tmp_path):
    name, task, result, *texts, again = run_fresh(NO_TASK, tmp_path, TOY_CHECKPOINT, SHORT, DESCRIBE)
    assert (name, task) == ("VJepaQwenPipeline", "video-text-to-text")
    assert (result["generated_text"], values(result["events"])) == expected
    assert texts == [expected[0]] * 2 and again == result
