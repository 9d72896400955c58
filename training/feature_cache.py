"""Feature cache: with a frozen tower every video is encoded once.

    vjepa-qwen encode DATA OUT [--model REPO]
    accelerate launch -m vjepa_qwen.training.feature_cache DATA OUT      # several processes share the videos

OUT gets `cache.json`, the fingerprint of the tower's weights and the processor's settings, and safetensors shards
with frame features, event ids and times of each video. Run again after an interruption, it goes on where it stopped: a
shard is there as a whole or not at all. Only the tower is loaded.
"""

import argparse
import hashlib
import json
import os
import uuid
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from .. import TOY_CHECKPOINT
from ..processing_vjepa_qwen import VJepaQwenProcessor
from .data import load_samples

logger = logging.get_logger(__name__)

FINGERPRINT_FILE = "cache.json"
VIDEOS_PER_SHARD = 64


def process_state() -> PartialState:
    """This process among those that a launcher started. Without `cpu`, accelerate sees but one where no GPU is."""
    return PartialState(cpu=not torch.accelerator.is_available())


def fingerprint(processor) -> dict:
    """
    What the features rest on: a digest of the tower's weights (as float32), and the settings of the video processor
    and the event segmentation.

    Args:
        processor (`VJepaQwenProcessor`): Bound, or with a checkpoint.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(processor._get_vision_tower().state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    video_processor = processor.video_processor.to_dict()
    for name in ("auto_map", "processor_class", "video_processor_type"):
        video_processor.pop(name, None)
    settings = {
        "vision_tower": digest.hexdigest(),
        "video_processor": video_processor,
        "event_segmentation": {**vars(processor.segmenter)},
    }
    return json.loads(json.dumps(settings))


def video_key(video: str | bytes) -> str:
    """Name of a video in the cache: digest of its bytes, so that it may be moved and must not be exchanged."""
    if isinstance(video, bytes):
        return hashlib.blake2b(video, digest_size=16).hexdigest()
    if "://" in video:
        return hashlib.blake2b(video.encode(), digest_size=16).hexdigest()
    return video_key(Path(video).read_bytes())


class FeatureCache:
    """
    What `vjepa-qwen encode` has written, for reading.

    `cache[video]` is a dict with `frame_features` `(num_steps, hidden)` float32, `frame_event_ids` `(num_steps,)`
    int64 and `timestamps` `(num_frames,)` float64, in seconds.

    Args:
        folder (`str`): Where it lies.
        processor (`VJepaQwenProcessor`): The one that is to be used with it.

    Raises:
        ValueError: when the folder is no cache, or was made by another tower or with other settings.
    """

    def __init__(self, folder: str, processor):
        self.folder = Path(folder)
        check_fingerprint(self.folder, processor)
        self._shards, self._keys = find_shards(self.folder), {}

    def __getitem__(self, video: str | bytes) -> dict[str, torch.Tensor]:
        key = self._key(video)
        if key not in self._shards:
            raise ValueError(f"{_name(video)} is not in the cache {self.folder}; run `vjepa-qwen encode` again")
        with safe_open(self._shards[key], framework="pt") as file:
            return {
                name: file.get_tensor(f"{key}.{name}") for name in ("frame_features", "frame_event_ids", "timestamps")
            }

    def check(self, samples: list[dict]):
        """Raises ValueError, naming them all, when videos of samples are not in the cache."""
        missing = [_name(v) for sample in samples for v in sample["videos"] if self._key(v) not in self._shards]
        if missing:
            raise ValueError(
                f"{len(missing)} videos are not in the cache {self.folder}, or were changed since; run `vjepa-qwen "
                f"encode` again: {', '.join(missing)}"
            )

    def _key(self, video: str | bytes) -> str:
        if isinstance(video, bytes):
            return video_key(video)
        if video not in self._keys:
            self._keys[video] = video_key(video)
        return self._keys[video]


def check_fingerprint(folder: Path, processor):
    """Raises ValueError when `folder` is no cache, or one of another tower or other settings."""
    path = folder / FINGERPRINT_FILE
    if not path.is_file():
        raise ValueError(f"feature cache ({folder}) must hold {FINGERPRINT_FILE}; `vjepa-qwen encode` writes it")
    cached, current = json.loads(path.read_text(encoding="utf-8")), fingerprint(processor)
    stale = [name for name in current if cached.get(name) != current[name]]
    if stale:
        differences = "; ".join(f"{name}: {cached.get(name)} there, {current[name]} now" for name in stale)
        raise ValueError(
            f"feature cache ({folder}) is stale: {', '.join(stale)} changed since it was written; encode into another "
            f"folder, or remove it ({differences})"
        )


def find_shards(folder: Path) -> dict[str, Path]:
    """The shard of each key."""
    shards = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shards.update({name.partition(".")[0]: path for name in file.keys()})
    return shards


def encode(samples: list[dict], folder: str, processor, *, videos_per_shard: int = VIDEOS_PER_SHARD) -> int:
    """
    Encodes what of the samples' videos is not in the cache yet; each process its share.

    Returns:
        `int`: Number of videos that this process has encoded.

    Raises:
        ValueError: when the folder is a cache of another tower or other settings.
    """
    state, folder = process_state(), Path(folder)
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FINGERPRINT_FILE).is_file():
            (folder / FINGERPRINT_FILE).write_text(json.dumps(fingerprint(processor), indent=2), encoding="utf-8")
    state.wait_for_everyone()
    check_fingerprint(folder, processor)
    done = find_shards(folder)
    # Before anything is written: every process has to see the same list.
    videos = {video_key(video): video for sample in samples for video in sample["videos"]}
    missing = sorted(key for key in videos if key not in done)
    state.wait_for_everyone()
    if state.is_main_process:
        logger.info(f"{len(videos) - len(missing)} of {len(videos)} videos are in the cache already")
    mine = missing[state.process_index :: state.num_processes]
    shard = {}
    progress = logging.tqdm(mine, desc="encoding", unit="video", disable=not state.is_local_main_process)
    for number, key in enumerate(progress, 1):
        found = processor.segment(videos[key])[0]
        shard[f"{key}.frame_features"] = found.frame_features.contiguous()
        shard[f"{key}.frame_event_ids"] = found.frame_event_ids
        shard[f"{key}.timestamps"] = torch.as_tensor(found.timestamps)
        if number % videos_per_shard == 0 or number == len(mine):
            _write(shard, folder)
            shard = {}
    state.wait_for_everyone()
    return len(mine)


def _write(shard: dict[str, torch.Tensor], folder: Path):
    name = uuid.uuid4().hex
    save_file(shard, folder / f"{name}.partial")
    os.replace(folder / f"{name}.partial", folder / f"{name}.safetensors")


def _name(video: str | bytes) -> str:
    return video if isinstance(video, str) else f"<{len(video)} bytes>"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="vjepa-qwen encode", description="Encode the videos of a data set once.")
    parser.add_argument("data", help="folder with metadata.jsonl, or data set of the datasets library")
    parser.add_argument("out", help="folder of the cache; one that is there is continued")
    parser.add_argument("--split", default="train", help="split of the data set")
    parser.add_argument("--model", default=TOY_CHECKPOINT, help="repository or folder; without it, the toy")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the repository")
    parser.add_argument("--num-frames", type=int, help="frames to look at in each video; by default it depends on it")
    parser.add_argument("--skip-bad-samples", action="store_true", help="go on without missing and unreadable videos")
    arguments = parser.parse_args(argv)
    samples = load_samples(arguments.data, split=arguments.split, skip_bad_samples=arguments.skip_bad_samples)
    process_state()  # before the tower is loaded: it chooses the device of this process
    processor = VJepaQwenProcessor.from_pretrained(arguments.model, revision=arguments.revision)
    if arguments.num_frames is not None:
        processor.video_processor.num_frames = arguments.num_frames
    encode(samples, arguments.out, processor)


if __name__ == "__main__":
    main()
