"""Videos to features of the tower: windows are decoded in background threads while the one before them is encoded.

    for video in encode_videos(tower, [partial(video_processor.sample, path) for path in paths]):
        video.frame_features                               # (num_steps, hidden), or the exception of a bad file

Every open video has one batch of windows ahead and no more, so the memory depends neither on the length of a video nor
on the number of videos; only features grow. A batch holds windows of one video alone and its size rests on nothing but
the tower: what a video's features are, to the last bit, never depends on what is encoded beside it.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from .modeling_vjepa_qwen import TOKENS_PER_PASS, VJepaQwenVisionTower
from .video_processing_vjepa_qwen import SampledVideo
from .vision_tower_access import find_adapted_layers, without_adapters

# Tokens of one forward pass on a CPU, where more of them only take memory.
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
        span_features (`torch.FloatTensor` of shape `(num_steps, hidden)`):
            What the video is cut by: the same, or those of the tower without its adapters.
        frames (`torch.FloatTensor` of shape `(num_frames, 3, height, width)`, *optional*): If they were to be kept.
    """

    sampled: SampledVideo
    frame_features: torch.FloatTensor
    span_features: torch.FloatTensor
    frames: torch.FloatTensor | None


def encode_videos(
    tower: VJepaQwenVisionTower,
    videos: Sequence[Callable[[], SampledVideo]],
    *,
    keep_frames: Callable[[SampledVideo], bool] = lambda sampled: False,
    on_window: Callable[[int, int, int], None] | None = None,
    spans_without_adapters: bool = False,
) -> Iterator[VideoFeatures | Exception]:
    """
    Reads and encodes videos, in order. Closing the iterator, also by Ctrl-C, ends the threads after the window that
    each is at, closes all files and leaves the tower as it was.

    Args:
        tower (`VJepaQwenVisionTower`): Encodes, without gradients; in evaluation mode until the iterator is closed.
        videos (sequence of callables): Each opens one video; called in a background thread.
        keep_frames (callable, *optional*): Whether the frames of a video are returned as well.
        on_window (callable, *optional*):
            Called as `on_window(video_index, num_windows_done, num_windows)` whenever windows have been encoded.
        spans_without_adapters (`bool`, *optional*, defaults to `False`):
            Whether a tower with adapters encodes a second time without them, for the spans.

    Yields:
        `VideoFeatures`, or the exception in its place when a video cannot be opened or decoded.
    """
    num_threads = min(len(videos), os.cpu_count() or 1, MAX_OPEN_VIDEOS)
    if num_threads == 0:
        return
    adapted_layers = find_adapted_layers(tower) if spans_without_adapters else []
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="vjepa_qwen-decoding")
    unopened, readers = iter(videos), deque()
    was_training = tower.training
    tower.eval()  # once: for a small tower it takes as long as a tenth of a window
    try:
        for index in range(len(videos)):
            # As many as there are threads, and each has one task at most: none ever waits for another.
            for open_video in islice(unopened, num_threads - len(readers)):
                readers.append(_Reader(pool, open_video, tower))
            report = partial(on_window, index) if on_window else None
            result = _encode_video(tower, readers[0], keep_frames, report, adapted_layers)
            readers.popleft()
            yield result
    finally:
        tower.train(was_training)
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
    num_tokens = CPU_TOKENS if tower.device.type == "cpu" else TOKENS_PER_PASS
    frames_per_window = min(sampled.num_frames, sampled.frames_per_window)
    tokens_per_window = frames_per_window // config.tubelet_size * (config.crop_size // config.patch_size) ** 2
    windows = sampled.windows()
    while batch := list(islice(windows, max(num_tokens // tokens_per_window, 1))):
        batch = torch.stack(batch)
        # Only from pinned memory does a copy to the device leave the host free.
        yield sampled, batch.pin_memory() if is_cuda else batch
        del batch  # before the next one is decoded


def _encode_video(tower, reader: _Reader, keep_frames, on_window, adapted_layers) -> VideoFeatures | Exception:
    features, frames, num_windows, num_steps = None, [], 0, 0
    while True:
        try:
            batch = reader.read()
        except Exception as error:  # of this video; what fails in the tower is no fault of the video
            return error
        if batch is None:
            break
        sampled, windows = batch
        encoded = [_encode_windows(tower, windows)]
        if adapted_layers:
            with without_adapters(adapted_layers):
                encoded.append(_encode_windows(tower, windows))
        if features is None:
            # Room for all at once: many small tensors that stay between large ones that go would fragment the memory.
            total_steps = sampled.num_frames // tower.config.tubelet_size
            features = [steps.new_empty(total_steps, steps.shape[-1]) for steps in encoded]
        for kept, steps in zip(features, encoded, strict=True):
            kept[num_steps : num_steps + len(steps)] = steps
        num_steps += len(encoded[0])
        num_windows += len(windows)
        if keep_frames(sampled):
            frames.append(windows.flatten(0, 1))
        del batch, windows, encoded  # before the next one arrives
        if on_window is not None:
            on_window(num_windows, math.ceil(sampled.num_frames / sampled.frames_per_window))
    # The only place where the host waits for the device.
    features = [kept.cpu() for kept in features]
    return VideoFeatures(sampled, features[0], features[-1], torch.cat(frames) if frames else None)


@torch.no_grad()
def _encode_windows(tower, windows: torch.FloatTensor) -> torch.FloatTensor:
    """Windows to features `(windows * num_steps, hidden)`, float32, on the tower's device."""
    # Parameters that accelerate has offloaded are on "meta"; its hooks move the input themselves.
    device = tower.device if tower.device.type != "meta" else windows.device
    return tower(windows.to(device, non_blocking=True)).pooler_output.flatten(0, 1)


__all__ = ["VideoFeatures", "encode_videos"]
