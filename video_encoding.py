"""Videos to features of the tower: windows are decoded in background threads while the one before them is encoded.

    tower = load_vision_tower("repository or folder", {})
    for video in encode_videos(tower, [partial(video_processor.sample, path) for path in paths]):
        video.frame_features                               # (num_steps, hidden), or the exception of a bad file

Every open video has one batch of windows ahead and no more, so the memory depends neither on the length of a video nor
on the number of videos; only features grow. A batch holds windows of one video alone and its size rests on nothing but
the tower: what a video's features are, to the last bit, never depends on what is encoded beside it.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .configuration_vjepa_qwen import VJepaQwenConfig
from .interrupted_downloads import explain_interrupted_download
from .modeling_vjepa_qwen import VJepaQwenVisionTower
from .video_processing_vjepa_qwen import SampledVideo

TOWER_PREFIX = "model.vision_tower."

# Tokens of one forward pass. An accelerator is filled by a 64-frame window of ViT-L, or by several smaller ones; on a
# CPU more of them only take memory.
ACCELERATOR_TOKENS = 8192
CPU_TOKENS = 1024
# Videos that are decoded side by side: one for each core, but each holds a batch or two (50 MB for ViT-L).
MAX_OPEN_VIDEOS = 8


@dataclass(frozen=True, eq=False)
class VideoFeatures:
    """
    What the tower made of one video.

    Attributes:
        sampled (`SampledVideo`): The frames that were chosen, with their times.
        frame_features (`torch.FloatTensor` of shape `(num_steps, hidden)`): float32, on the CPU.
        frames (`torch.FloatTensor` of shape `(num_frames, 3, height, width)`, *optional*): If they were to be kept.
    """

    sampled: SampledVideo
    frame_features: torch.FloatTensor
    frames: torch.FloatTensor | None


def encode_videos(
    tower: VJepaQwenVisionTower,
    videos: Sequence[Callable[[], SampledVideo]],
    *,
    keep_frames: Callable[[SampledVideo], bool] = lambda sampled: False,
    on_window: Callable[[int, int, int], None] | None = None,
) -> Iterator[VideoFeatures | Exception]:
    """
    Reads and encodes videos, in order. Closing the iterator, also by Ctrl-C, ends the threads after the window that
    each is at, closes all files and leaves the tower as it was.

    Args:
        tower (`VJepaQwenVisionTower`): Encodes, without gradients and in evaluation mode.
        videos (sequence of callables): Each opens one video; called in a background thread.
        keep_frames (callable, *optional*): Whether the frames of a video are returned as well.
        on_window (callable, *optional*):
            Called as `on_window(video_index, num_windows_done, num_windows)` whenever windows have been encoded.

    Yields:
        `VideoFeatures`, or the exception in its place when a video cannot be opened or decoded.
    """
    num_threads = min(len(videos), os.cpu_count() or 1, MAX_OPEN_VIDEOS)
    if num_threads == 0:
        return
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="vjepa_qwen-decoding")
    unopened, readers = iter(videos), deque()
    try:
        for index in range(len(videos)):
            # As many as there are threads, and each has one task at most: none ever waits for another.
            for open_video in islice(unopened, num_threads - len(readers)):
                readers.append(_Reader(pool, open_video, tower))
            result = _encode_video(tower, readers[0], keep_frames, partial(on_window, index) if on_window else None)
            readers.popleft()
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        for reader in readers:
            reader.close()


class _Reader:
    """Batches of windows of one video, each made in the background while the one before it is in use."""

    def __init__(self, pool: ThreadPoolExecutor, open_video: Callable[[], SampledVideo], tower: VJepaQwenVisionTower):
        self._pool = pool
        self._batches = _read_batches(open_video, tower)
        self._next = pool.submit(next, self._batches, None)

    def read(self) -> tuple[SampledVideo, torch.FloatTensor] | None:
        """The next batch `(windows, frames_per_window, 3, height, width)`, or None after the last."""
        batch = self._next.result()
        if batch is not None:
            self._next = self._pool.submit(next, self._batches, None)
        return batch

    def close(self):
        self._batches.close()


def _read_batches(open_video, tower) -> Iterator[tuple[SampledVideo, torch.FloatTensor]]:
    sampled = open_video()
    config, is_cuda = tower.config, tower.device.type == "cuda"
    num_tokens = CPU_TOKENS if tower.device.type == "cpu" else ACCELERATOR_TOKENS
    frames_per_window = min(sampled.num_frames, sampled.frames_per_window)
    tokens_per_window = frames_per_window // config.tubelet_size * (config.crop_size // config.patch_size) ** 2
    windows = sampled.windows()
    while batch := list(islice(windows, max(num_tokens // tokens_per_window, 1))):
        batch = torch.stack(batch)
        # Only from pinned memory does a copy to the device leave the host free.
        yield sampled, batch.pin_memory() if is_cuda else batch


def _encode_video(tower, reader: _Reader, keep_frames, on_window) -> VideoFeatures | Exception:
    features, frames, num_windows, num_steps = None, [], 0, 0
    while True:
        try:
            batch = reader.read()
        except Exception as error:  # of this video; what fails in the tower is no fault of the video
            return error
        if batch is None:
            break
        sampled, windows = batch
        encoded = _encode_windows(tower, windows)
        if features is None:
            # Room for all at once: many small tensors that stay between large ones that go would fragment the memory.
            features = encoded.new_empty(sampled.num_frames // tower.config.tubelet_size, encoded.shape[-1])
        features[num_steps : num_steps + len(encoded)] = encoded
        num_steps += len(encoded)
        num_windows += len(windows)
        if keep_frames(sampled):
            frames.append(windows.flatten(0, 1))
        del batch, windows, encoded  # before the next one arrives
        if on_window is not None:
            on_window(num_windows, math.ceil(sampled.num_frames / sampled.frames_per_window))
    # The only place where the host waits for the device.
    return VideoFeatures(sampled, features.cpu(), torch.cat(frames) if frames else None)


@torch.no_grad()
def _encode_windows(tower, windows: torch.FloatTensor) -> torch.FloatTensor:
    """Windows to features `(windows * num_steps, hidden)`, float32, on the tower's device."""
    # Parameters that accelerate has offloaded are on "meta"; its hooks move the input themselves.
    device = tower.device if tower.device.type != "meta" else windows.device
    was_training = tower.training
    tower.eval()
    try:
        return tower(windows.to(device, non_blocking=True)).pooler_output.flatten(0, 1)
    finally:
        tower.train(was_training)


def load_vision_tower(
    checkpoint: str | os.PathLike, download_kwargs: dict, dtype: str | torch.dtype = "auto"
) -> VJepaQwenVisionTower:
    """Reads the tower, and nothing else, from a checkpoint: only the files that hold its tensors are fetched.

    It goes to the accelerator if there is one. `dtype`: see [`VJepaQwenProcessor.from_pretrained`].
    """
    config = VJepaQwenConfig.from_pretrained(checkpoint, **download_kwargs)
    index_file = cached_file(
        checkpoint, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **download_kwargs
    )
    if index_file is None:
        file_names = {SAFE_WEIGHTS_NAME}
    else:
        with open(index_file, encoding="utf-8") as file:
            weight_map = json.load(file)["weight_map"]
        file_names = {file_name for name, file_name in weight_map.items() if name.startswith(TOWER_PREFIX)}
    state_dict = {}
    for file_name in sorted(file_names):
        with explain_interrupted_download(checkpoint, **download_kwargs):
            path = cached_file(checkpoint, file_name, **download_kwargs)
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():
                if name.startswith(TOWER_PREFIX):
                    state_dict[name.removeprefix(TOWER_PREFIX)] = tensors.get_tensor(name)
    if not state_dict:
        raise ValueError(
            f"checkpoint ({checkpoint}) must hold the vision tower ({TOWER_PREFIX}*) in safetensors files; save the "
            "model with `save_pretrained` into the processor's folder, or call `processor.bind(model)`"
        )
    tower = VJepaQwenVisionTower._from_config(config.vision_config)
    tower.load_state_dict(state_dict, strict=True, assign=True)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if dtype == "auto":
        dtype = config.dtype or tower.dtype
        if dtype == torch.bfloat16 and not _has_bfloat16(device):
            dtype = torch.float32
    elif isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return tower.to(device, dtype).eval()


def _has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed by the hardware; CPUs without it take several times as long as in float32."""
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


__all__ = ["VideoFeatures", "encode_videos", "load_vision_tower"]
