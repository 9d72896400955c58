"""Videos that are in memory already: arrays, tensors and lists of images, and the times that come with them.

is_frames([image, image])                           # True: one video
times, duration_seconds = frame_times({"fps": 2}, num_frames=8)
"""

import math

import numpy as np
import torch
from transformers.image_utils import is_pil_image
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

logger = logging.get_logger(__name__)

# What transformers assumes for frames that come without times.
DEFAULT_FRAMES_PER_SECOND = 24


def num_dimensions(item) -> int:
    """Dimensions of an array or image; 0 for anything else."""
    if isinstance(item, (np.ndarray, torch.Tensor)):
        return item.ndim
    return 3 if is_pil_image(item) else 0


def is_frames(video) -> bool:
    """Whether this is a video (or a batch of them) in memory: an array, or a list of images."""
    if isinstance(video, (list, tuple)):
        return len(video) > 0 and all(num_dimensions(frame) in (2, 3) for frame in video)
    return num_dimensions(video) > 0


def from_numpy(array) -> torch.Tensor:
    """An array as a tensor."""
    # torch knows neither negative strides nor read-only memory.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def stack_frames(frames: list) -> torch.Tensor:
    """Images, or arrays of shape (height, width[, channels]) or (channels, height, width), to one tensor."""
    frames = [np.asarray(frame.convert("RGB")) if is_pil_image(frame) else frame for frame in frames]
    frames = [frame if isinstance(frame, torch.Tensor) else from_numpy(frame) for frame in frames]
    shapes = {tuple(frame.shape) for frame in frames}
    if len(shapes) > 1:
        raise ValueError(f"frames of a video ({sorted(shapes)}) must have one shape; resize them to one size")
    video = torch.stack(frames)
    return video[..., None] if video.ndim == 3 else video


def frame_times(video_metadata: VideoMetadata | dict | None, num_frames: int) -> tuple[np.ndarray, float]:
    """Seconds at which each frame of an array is shown, and the length of the video in seconds."""
    metadata = dict(video_metadata or {})
    fps, duration_seconds = metadata.get("fps"), metadata.get("duration")
    times, indices = metadata.get("timestamps"), metadata.get("frames_indices")
    for name, value in (("fps", fps), ("duration", duration_seconds)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} of video_metadata ({value}) must be greater than 0")
    for name, values in (("timestamps", times), ("frames_indices", indices)):
        if values is not None and len(values) != num_frames:
            raise ValueError(
                f"{name} of video_metadata ({len(values)}) must have one entry for each of the {num_frames} frames"
            )
    if times is None:
        indices = np.arange(num_frames) if indices is None else np.asarray(indices)
        total_num_frames = max(metadata.get("total_num_frames") or 0, int(indices[-1]) + 1)
        if fps is None and duration_seconds is not None:
            fps = total_num_frames / duration_seconds
        if fps is None:
            logger.warning_once(
                f"A video given as frames has no times: {DEFAULT_FRAMES_PER_SECOND} frames per second are assumed. "
                'Pass video_metadata={"fps": ...} for right event times.'
            )
            fps = DEFAULT_FRAMES_PER_SECOND
        times, end_seconds = indices / fps, total_num_frames / fps
    else:
        times = np.asarray(times, dtype=np.float64)
        last_seconds = np.median(np.diff(times)) if num_frames > 1 else 1 / (fps or DEFAULT_FRAMES_PER_SECOND)
        end_seconds = times[-1] + last_seconds
    if np.any(np.diff(times) < 0) or times[0] < 0:
        raise ValueError("timestamps and frames_indices of video_metadata must be in ascending order, from 0 on")
    if duration_seconds is not None and duration_seconds > times[-1]:
        end_seconds = duration_seconds
    return times, float(end_seconds)


__all__ = ["frame_times", "from_numpy", "is_frames", "num_dimensions", "stack_frames"]
