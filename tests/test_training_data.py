"""Data sets for training: what is read, and that every problem is found before the training, all at once."""

import json
import shutil

import pytest
from datasets import Dataset

from vjepa_qwen.training.data import DEFAULT_PROMPT, load_samples


def write_metadata(folder, rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


@pytest.fixture
def folder(tmp_path, clips):
    for name, clip in zip("ab", clips, strict=False):
        shutil.copy(clip, tmp_path / f"{name}.mp4")
    return tmp_path


def text_of(message):
    return "".join(item.get("text", "") for item in message["content"])


def test_a_summary_becomes_a_question_with_the_video_and_an_answer(folder):
    rows = [{"file_name": "a.mp4", "summary": "A circle.", "domain": "sport", "on_screen_text": ["GO"]}]
    rows += [{"file_name": "b.mp4", "summary": "요리 영상입니다.\u2028끝", "prompt": "무엇이 보이나요?"}]
    first, second = load_samples(write_metadata(folder, rows))
    user, assistant = first["messages"]
    assert user["content"] == [{"type": "video"}, {"type": "text", "text": DEFAULT_PROMPT}]
    assert (assistant["role"], text_of(assistant)) == ("assistant", "A circle.")
    assert first["videos"] == [str(folder / "a.mp4")]
    assert (first["domain"], first["on_screen_text"]) == ("sport", ["GO"])
    assert text_of(second["messages"][0]) == "무엇이 보이나요?"
    assert text_of(second["messages"][1]) == "요리 영상입니다.\u2028끝"


def test_messages_keep_their_place_of_the_videos(folder):
    question = [{"type": "text", "text": "Compare"}, {"type": "video"}, {"type": "text", "text": "and"}]
    messages = [{"role": "user", "content": [*question, {"type": "video"}]}, {"role": "assistant", "content": "Same."}]
    text_only = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    rows = [{"file_names": ["b.mp4", "a.mp4"], "messages": messages}, {"file_name": None, "messages": text_only}]
    first, second = load_samples(write_metadata(folder, rows))
    assert [item["type"] for item in first["messages"][0]["content"]] == ["text", "video", "text", "video"]
    assert first["videos"] == [str(folder / "b.mp4"), str(folder / "a.mp4")]
    assert second["videos"] == []


BAD_ROWS = {
    "missing.mp4 does not exist": {"file_name": "missing.mp4", "summary": "A circle."},
    "broken.mp4": {"file_name": "broken.mp4", "summary": "A circle."},
    "the answer (summary, or an assistant's message) must not be empty": {"file_name": "a.mp4", "summary": " "},
    "is not JSON": "{file_name",
    "must be a JSON object": "[]",
    "1 video items for 0 videos": {
        "messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "Yes."}]
    },
    "end with the assistant's answer": {"file_name": "a.mp4", "messages": [{"role": "user", "content": "Hello"}]},
    "role is one of": {"file_name": "a.mp4", "messages": [{"role": "narrator", "content": "Hello"}]},
}


def test_all_problems_are_named_at_once(folder):
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    source = write_metadata(folder, [{"file_name": "a.mp4", "summary": "A circle."}, *BAD_ROWS.values()])
    with pytest.raises(ValueError, match="8 bad of 9 samples") as error:
        load_samples(source)
    for line, fault in zip(str(error.value).splitlines()[1:], BAD_ROWS, strict=True):
        assert fault in line
    assert [f":{number}" in str(error.value) for number in range(2, 10)] == [True] * 8


def test_bad_samples_are_skipped_and_counted_when_asked_for(folder, caplog):
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    source = write_metadata(folder, [{"file_name": "a.mp4", "summary": "A circle."}, *BAD_ROWS.values()])
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        samples = load_samples(source, skip_bad_samples=True)
    finally:
        logging.disable_propagation()
    assert [text_of(sample["messages"][1]) for sample in samples] == ["A circle."]
    assert "8 of 9 samples skipped" in caplog.text and "missing.mp4" in caplog.text


def test_nothing_left_is_an_error(folder):
    with pytest.raises(ValueError, match="at least one good sample; it has none of 1"):
        load_samples(write_metadata(folder, [BAD_ROWS["missing.mp4 does not exist"]]), skip_bad_samples=True)


def test_a_folder_without_metadata_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="must hold metadata.jsonl"):
        load_samples(str(tmp_path))


def test_splits_are_subfolders(folder):
    (folder / "validation").mkdir()
    shutil.copy(folder / "a.mp4", folder / "validation" / "c.mp4")
    write_metadata(folder, [{"file_name": "a.mp4", "summary": "A circle."}])
    write_metadata(folder / "validation", [{"file_name": "c.mp4", "summary": "A square."}])
    assert load_samples(str(folder))[0]["videos"] == [str(folder / "a.mp4")]
    assert load_samples(str(folder), split="validation")[0]["videos"] == [str(folder / "validation" / "c.mp4")]


def test_a_data_set_of_the_datasets_library(tmp_path, clips):
    rows = {"video": clips[:2], "summary": ["A circle.", "원"], "domain": ["sport", "music"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path)
    samples = load_samples(str(tmp_path))
    assert [sample["videos"] for sample in samples] == [[clip] for clip in clips[:2]]
    assert [text_of(sample["messages"][1]) for sample in samples] == ["A circle.", "원"]
    assert samples[1]["domain"] == "music"
