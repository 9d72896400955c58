"""Training data: a folder of videos with `metadata.jsonl`, or a data set of `datasets`, to checked samples.

    python -m vjepa_qwen.toy.synthetic_shorts shorts --count 200 --seed 0     # such a folder
    samples = load_samples("shorts")

A row of `metadata.jsonl` (UTF-8; the convention of the `videofolder` loader) or of the data set has

* `file_name`, one path relative to the folder, or `file_names`, several; in a data set also `video` or `videos`
  (paths, bytes, or the `Video` feature); left out or null: a row without video;
* `summary`, the answer, with `prompt`, the question (optional); or `messages`, a whole conversation whose
  `{"type": "video"}` items stand for the row's videos in order (without any, they go before the first user's text);
* anything else (`domain`, `on_screen_text`, ...), which is kept for the evaluation.
"""

import copy
import json
import os
from pathlib import Path

from transformers.utils import logging

from ..video_decoding import VideoDecoder, VideoDecodingError

logger = logging.get_logger(__name__)

DEFAULT_PROMPT = "Describe this video."
ROLES = ("system", "user", "assistant")


def load_samples(
    source: str, *, split: str = "train", prompt: str = DEFAULT_PROMPT, skip_bad_samples: bool = False
) -> list[dict]:
    """
    Reads and checks a data set; every problem is found before anything is trained.

    Args:
        source (`str`): Folder with `metadata.jsonl`, folder of `Dataset.save_to_disk`, or a name on the Hub.
        split (`str`): Of a data set; in a folder, the subfolder of this name when `metadata.jsonl` is there.
        prompt (`str`): The question of rows that have a `summary` and no `prompt`.
        skip_bad_samples (`bool`): Go on without the samples that have a problem, after a warning with their number.

    Returns:
        `list[dict]`: Samples with `name`, `messages` (with video items in place), `videos` (paths or bytes, in order)
        and the other columns of their rows.

    Raises:
        ValueError: naming every missing file, unreadable video and empty answer at once.
    """
    rows, folder = _read_rows(source, split)
    samples, problems = [], []
    for number, row in rows:
        try:
            samples.append(_make_sample(row, f"{source}:{number}", folder, prompt))
        except ValueError as error:
            problems.append(str(error))
    if problems and not skip_bad_samples:
        raise ValueError(
            f"{source} has {len(problems)} bad of {len(rows)} samples; repair them or go on without them with "
            "--skip-bad-samples:\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    if problems:
        listing = "\n".join(f"  {problem}" for problem in problems)
        logger.warning(f"{source}: {len(problems)} of {len(rows)} samples skipped:\n{listing}")
    if not samples:
        raise ValueError(f"{source} (split {split}) must have at least one good sample; it has none of {len(rows)}")
    return samples


def _read_rows(source: str, split: str) -> tuple[list[tuple[int, dict | str]], Path | None]:
    """Numbered rows, and the folder that their file names are relative to. A line that is no JSON stays a string."""
    for folder in (Path(source, split), Path(source)):
        metadata = folder / "metadata.jsonl"
        if metadata.is_file():
            lines = metadata.read_text(encoding="utf-8-sig").split("\n")
            return [(number, _parse(line)) for number, line in enumerate(lines, 1) if line.strip()], folder
    import datasets

    if Path(source, "dataset_dict.json").is_file() or Path(source, "dataset_info.json").is_file():
        dataset = datasets.load_from_disk(source)
        dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
    elif os.path.isdir(source):
        raise ValueError(f"{source} must hold metadata.jsonl, one row for each video; see vjepa_qwen.training.data")
    else:
        dataset = datasets.load_dataset(source, split=split)
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Video):  # as a path or bytes: our decoder reads it
            dataset = dataset.cast_column(name, datasets.Video(decode=False))
    return list(enumerate(dataset)), None


def _parse(line: str) -> dict | str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"is not JSON ({error})"
    return row if isinstance(row, dict) else "must be a JSON object"


def _make_sample(row: dict | str, name: str, folder: Path | None, prompt: str) -> dict:
    if isinstance(row, str):
        raise ValueError(f"{name}: {row}")
    row = dict(row)
    videos = _take_videos(row, folder)
    if isinstance(videos and videos[0], str):
        name = f"{name} ({', '.join(os.path.basename(video) for video in videos)})"
    faults = [fault for fault in map(_find_fault_of_video, videos) if fault]
    messages, summary, question = row.pop("messages", None), row.pop("summary", None), row.pop("prompt", None)
    if messages is None:
        messages = [{"role": "user", "content": [{"type": "text", "text": question or prompt}]}]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": summary or ""}]})
    try:
        messages = _place_videos(messages, len(videos))
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise ValueError(f"{name}: " + "; ".join(faults))
    return {**row, "name": name, "messages": messages, "videos": videos}


def _take_videos(row: dict, folder: Path | None) -> list[str | bytes]:
    """The row's videos, taken out of it."""
    videos = []
    for key in ("file_name", "video", "file_names", "videos"):
        value = row.pop(key, None)
        videos += [] if value is None else value if isinstance(value, list) else [value]
    videos = [(v["bytes"] if v["bytes"] is not None else v["path"]) if isinstance(v, dict) else v for v in videos]
    return [str(folder / video) if folder and isinstance(video, str) else video for video in videos]


def _find_fault_of_video(video: str | bytes) -> str | None:
    if isinstance(video, str) and "://" not in video and not os.path.isfile(video):
        return f"{video} does not exist"
    try:
        next(VideoDecoder(video).frames([0]))
    except VideoDecodingError as error:
        return str(error)
    return None


def _place_videos(messages: list[dict], num_videos: int) -> list[dict]:
    """Messages with content as lists, one video item for each video, and an answer that is not empty."""
    messages = copy.deepcopy(messages)
    if not isinstance(messages, list) or any(
        not isinstance(message, dict) or message.get("role") not in ROLES for message in messages
    ):
        raise ValueError(f"messages must be a list of messages whose role is one of {', '.join(ROLES)}")
    for message in messages:
        content = message.get("content") or ""
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        # Arrow gives every item every key.
        message["content"] = [{key: value for key, value in item.items() if value is not None} for item in items]
        text = "".join(item.get("text", "") for item in message["content"])
        if message["role"] == "assistant" and not text.strip():
            raise ValueError("the answer (summary, or an assistant's message) must not be empty")
    users = [message for message in messages if message["role"] == "user"]
    if not users or messages[-1]["role"] != "assistant":
        raise ValueError("messages must have a user's message and end with the assistant's answer")
    num_items = sum(item.get("type") == "video" for message in messages for item in message["content"])
    if num_items == 0:
        users[0]["content"][:0] = [{"type": "video"}] * num_videos
    elif num_items != num_videos:
        raise ValueError(f"messages have {num_items} video items for {num_videos} videos of the row")
    return messages
