"""Renders, encodes, decodes and preprocesses the training clips, in several processes.

Called by `python -m vjepa_qwen.toy.build`. The clips go through real mp4 files and through the same video processor as
at inference, so the tower is trained on exactly what it will be shown.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..video_processing_vjepa_qwen import VJepaQwenVideoProcessor
from .synthetic_shorts import FRAMES_PER_SECOND, SyntheticShort, generate_short, shape_centres, write_video

FRAMES_PER_CLIP = 32
CROP_SIZE = 64


def make_video_processor() -> VJepaQwenVideoProcessor:
    """The toy's: one window of 32 frames of 64 x 64 pixels for each 10 seconds."""
    return VJepaQwenVideoProcessor(
        size={"shortest_edge": CROP_SIZE},
        crop_size=CROP_SIZE,
        frames_per_clip=FRAMES_PER_CLIP,
        tubelet_size=2,
        max_window_seconds=10.0,
    )


def normalizer(video_processor: VJepaQwenVideoProcessor) -> Callable[[torch.Tensor], torch.Tensor]:
    """From frames in 0..1, `(..., 3, size, size)`, to what the tower is given."""
    mean = torch.tensor(video_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(video_processor.image_std).view(3, 1, 1)
    return lambda frames: (frames - mean) / std


@dataclass(frozen=True)
class RenderedClips:
    """Training clips as the tower will see them.

    Attributes:
        shorts: What each clip shows.
        frames (`np.ndarray` of shape `(num_clips, 32, 3, 64, 64)`): uint8, on disk, before normalisation.
        timestamps (`np.ndarray` of shape `(num_clips, 32)`): Seconds.
        centres (`np.ndarray` of shape `(num_clips, 32, 2)`): Where the shape is, x and y as fractions of the frame.
    """

    shorts: list[SyntheticShort]
    frames: np.ndarray
    timestamps: np.ndarray
    centres: np.ndarray

    def first(self, count: int) -> "RenderedClips":
        """The first `count` of the clips."""
        return RenderedClips(self.shorts[:count], self.frames[:count], self.timestamps[:count], self.centres[:count])


def _render(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    torch.set_num_threads(1)
    short, processor = generate_short(seed), make_video_processor()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "short.mp4")
        write_video(short, path)
        sampled = processor.sample(path)
        (window,) = sampled.windows()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    frames = ((window * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    indices = np.round(sampled.timestamps * FRAMES_PER_SECOND).astype(int)
    return frames, sampled.timestamps, shape_centres(short)[indices]


def render_clips(seeds: range, folder: Path, report: Callable[[int], None], num_processes: int = 2) -> RenderedClips:
    """Renders the shorts of `seeds`; the frames are kept in `folder` (about 0.4 MB a clip)."""
    frames = np.lib.format.open_memmap(
        folder / "frames.npy", "w+", np.uint8, (len(seeds), FRAMES_PER_CLIP, 3, CROP_SIZE, CROP_SIZE)
    )
    timestamps = np.zeros((len(seeds), FRAMES_PER_CLIP))
    centres = np.zeros((len(seeds), FRAMES_PER_CLIP, 2))
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        for index, result in enumerate(pool.imap(_render, seeds, chunksize=8)):
            frames[index], timestamps[index], centres[index] = result
            report(index + 1)
    return RenderedClips([generate_short(seed) for seed in seeds], frames, timestamps, centres)
