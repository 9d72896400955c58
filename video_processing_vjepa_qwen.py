"""VJepaQwenVideoProcessor: any video in, whole windows of normalised frames for the V-JEPA 2 tower out.

    video_processor = VJepaQwenVideoProcessor()
    pixel_values = video_processor("clip.mp4").pixel_values_videos         # (1, 64, 3, 256, 256)

    sampled = video_processor.sample("long.mkv")                           # nothing is decoded yet
    sampled.timestamps                                                     # seconds, from the frames' own times
    for window in sampled.windows():                                       # (64, 3, 256, 256), one at a time
        ...

The tower has no attention mask, so nothing can be padded inside a window: there is always a whole number of windows,
or one shorter window that is asked for. The frames are those on show in the middle of equal spans of time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from transformers import BatchFeature, VideosKwargs
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
    is_pil_image,
)
from transformers.processing_utils import Unpack
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from .video_arrays import frame_times, from_numpy, is_frames, num_dimensions, stack_frames
from .video_decoding import VideoDecoder

# A span that ends where a frame begins has that frame in its middle or not whatever the rounding of the times.
TIME_TOLERANCE_SECONDS = 1e-6


class VJepaQwenVideosKwargs(VideosKwargs, total=False):
    """
    frames_per_clip (`int`, *optional*):
        Frames in one window of the tower.
    tubelet_size (`int`, *optional*):
        Frames in one temporal step.
    max_window_seconds (`float`, *optional*):
        Longest time that one window stretches over when neither `num_frames` nor `fps` is given.
    start_seconds (`float`, *optional*):
        Where the part to look at begins.
    end_seconds (`float`, *optional*):
        Where the part to look at ends.
    """

    frames_per_clip: int
    tubelet_size: int
    max_window_seconds: float
    start_seconds: float | None
    end_seconds: float | None


@dataclass(frozen=True, eq=False)
class SampledVideo:
    """
    The frames chosen from one video, decoded when they are asked for.

    Attributes:
        timestamps (`np.ndarray` of shape `(num_frames,)`, float64):
            Presentation time of each frame, in seconds from the start of the video, also where only a part is sampled.
        duration_seconds (`float`): From the start of the first to the end of the last frame of the video.
        metadata (`VideoMetadata`): Of the whole video; `frames_indices` are the chosen frames.
        frames_per_window (`int`): Most frames in one window.
    """

    timestamps: np.ndarray
    duration_seconds: float
    metadata: VideoMetadata
    frames_per_window: int
    _read_frames: Callable[[], Iterator[torch.Tensor]] = field(repr=False)
    _scale: np.ndarray = field(repr=False)
    _shift: np.ndarray = field(repr=False)

    @property
    def num_frames(self) -> int:
        """Number of chosen frames, over all windows."""
        return len(self.timestamps)

    def windows(self) -> Iterator[torch.FloatTensor]:
        """
        Decodes and preprocesses window after window; each call starts anew.

        In memory are one window and, of a file, the few frames that threads have decoded ahead: the next window is
        being decoded while this one is used.

        Yields:
            `torch.FloatTensor` of shape `(frames_in_window, 3, height, width)`, float32, on the CPU.

        Raises:
            VideoDecodingError: when no frame of a file can be decoded.
        """
        frames, window = self._read_frames(), None
        for position, frame in enumerate(frames):
            row = position % self.frames_per_window
            if window is None:
                window = torch.empty(min(self.frames_per_window, self.num_frames - position), *frame.shape)
            # In NumPy: after each of torch's parallel loops its threads wait busily, on the cores that decode.
            values = np.multiply(frame.numpy(), self._scale, out=window[row].numpy(), dtype=np.float32)
            values += self._shift
            if row + 1 == len(window):
                yield window
                window = None


class VJepaQwenVideoProcessor(BaseVideoProcessor):
    r"""
    Reads videos with a decoder of its own (PyAV), samples whole windows, resizes, crops and normalises.

    Args:
        size (`dict[str, int]`, *optional*):
            `{"shortest_edge": ...}` (keeps the shape) or `{"height": ..., "width": ...}`. Defaults to 256/224 of the
            crop, rounded down, as V-JEPA 2 was trained: 292 for 256.
        crop_size (`dict[str, int]` or `int`, *optional*, defaults to 256): The centre that the tower sees.
        frames_per_clip (`int`, *optional*, defaults to 64): Frames in one window of the tower.
        tubelet_size (`int`, *optional*, defaults to 2): Frames in one temporal step.
        max_window_seconds (`float`, *optional*, defaults to 64.0):
            A video gets one window for each span of this length that it begins, unless `num_frames` or `fps` is given:
            with 64 frames, one window up to 64 seconds, more beyond, and always at least one frame per second.
        kwargs: As of every video processor of transformers.
    """

    valid_kwargs = VJepaQwenVideosKwargs
    model_input_names = ["pixel_values_videos"]
    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    crop_size = 256
    default_to_square = False  # `size=292` is the shortest edge
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_sample_frames = True
    frames_per_clip = 64
    tubelet_size = 2
    max_window_seconds = 64.0

    def __init__(self, **kwargs: Unpack[VJepaQwenVideosKwargs]):
        super().__init__(**kwargs)
        if self.size is None:
            self.size = SizeDict(shortest_edge=int(self.crop_size["height"] * 256 / 224))
        if not self.size.shortest_edge and not (self.size.height and self.size.width):
            raise ValueError(
                f"size ({dict(self.size)}) must have a 'shortest_edge', or a 'height' and a 'width'; try "
                '{"shortest_edge": 292}'
            )
        if self.tubelet_size < 1 or self.frames_per_clip < 1 or self.frames_per_clip % self.tubelet_size:
            raise ValueError(
                f"frames_per_clip ({self.frames_per_clip}) must be a multiple of tubelet_size ({self.tubelet_size}), "
                "both at least 1; try 64 and 2"
            )
        if self.resample != PILImageResampling.BILINEAR:
            raise ValueError(
                f"resample ({self.resample}) must be {PILImageResampling.BILINEAR.value} (bilinear), which files are "
                "resized with while they are decoded"
            )
        if not 0 < self.max_window_seconds < math.inf:
            raise ValueError(f"max_window_seconds ({self.max_window_seconds}) must be greater than 0; try 64.0")

    # Sampling

    def sample(
        self,
        video,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        video_metadata: VideoMetadata | dict | None = None,
        do_sample_frames: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
    ) -> SampledVideo:
        """
        Chooses frames of one video. A file is scanned for the times of its frames; they are decoded later.

        Args:
            video:
                Path, `file://` or http(s) URL, bytes, binary file object; or frames: an array or tensor of shape
                `(num_frames, height, width, channels)` or `(num_frames, channels, height, width)`, uint8 (or float in
                0..1 or 0..255), or a list of PIL images or of arrays for one frame each.
            num_frames (`int`, *optional*):
                Exactly so many frames: a multiple of `tubelet_size` up to `frames_per_clip`, beyond that a multiple of
                `frames_per_clip`. A video with fewer frames repeats them.
            fps (`float`, *optional*):
                At least so many frames per second: rounded up to a number that `num_frames` may have.
            video_metadata (`VideoMetadata` or `dict`, *optional*):
                Times of a video given as frames: `fps` (with `frames_indices` if they are not all frames from the
                first on), or `timestamps` in seconds; `duration`. Without, 24 frames per second are assumed, with a
                warning. Files have times of their own, which count.
            do_sample_frames (`bool`, *optional*): `False` takes all frames as they are.
            input_data_format (`str`, *optional*):
                `"channels_first"` or `"channels_last"` where the shape of an array does not tell.
            start_seconds, end_seconds (`float`, *optional*):
                The part to look at, in seconds from the start of the video: frames are spread over it and counted for
                it alone. Of a file little else is decoded. Defaults to the whole video, and so does an end beyond it.

        Returns:
            `SampledVideo`

        Raises:
            VideoDecodingError: for what is no readable video.
            ValueError: for a number of frames that makes no whole windows, for arrays that are no videos, and for a
                part that the video does not have.
        """
        if num_frames is None and fps is None:
            num_frames, fps = self.num_frames, self.fps
        if num_frames is not None and fps is not None:
            raise ValueError(f"num_frames ({num_frames}) and fps ({fps}) must not be given together; choose one")
        if is_frames(video):
            frames = self._to_tensor(video, input_data_format)
            times, duration_seconds = frame_times(video_metadata, len(frames))
            height, width = frames.shape[-2:]
        else:
            decoder = VideoDecoder(video)
            frames, times, duration_seconds = None, decoder.timestamps, decoder.duration_seconds
            height, width = decoder.height, decoder.width
        start, end = _part(start_seconds, end_seconds, duration_seconds)
        if self.do_sample_frames if do_sample_frames is None else do_sample_frames:
            if num_frames is None:
                num_frames = self._default_num_frames(end - start, fps)
            self._check_num_frames(num_frames, "num_frames")
            targets = start + (np.arange(num_frames) + 0.5) * ((end - start) / num_frames) + TIME_TOLERANCE_SECONDS
            indices = np.maximum(np.searchsorted(times, targets, side="right") - 1, 0)
        else:
            # Those that are on show at some time of the part.
            first = max(np.searchsorted(times, start + TIME_TOLERANCE_SECONDS, side="right") - 1, 0)
            indices = np.arange(first, max(np.searchsorted(times, end - TIME_TOLERANCE_SECONDS), first + 1))
            self._check_num_frames(len(indices), "number of frames of a video, with do_sample_frames=False,")
        size = self._resized_size(height, width)

        def read_frames() -> Iterator[torch.Tensor]:
            if frames is None:
                crop = (self.crop_size.height, self.crop_size.width) if self.do_center_crop else None
                images = map(torch.from_numpy, decoder.frames(indices.tolist(), size=size, crop=crop))
            else:
                images = (self._resize_frame(frames[index].cpu(), size) for index in indices.tolist())
            return map(self._crop_frame, images)

        metadata = VideoMetadata(
            total_num_frames=len(times),
            fps=len(times) / duration_seconds,
            width=width,
            height=height,
            duration=duration_seconds,
            video_backend="pyav" if frames is None else None,
            frames_indices=indices.tolist(),
        )
        return SampledVideo(
            times[indices], duration_seconds, metadata, self.frames_per_clip, read_frames, *self._scale_and_shift()
        )

    def _default_num_frames(self, duration_seconds: float, fps: float | None) -> int:
        if fps is None:
            num_windows = math.ceil(duration_seconds / self.max_window_seconds - TIME_TOLERANCE_SECONDS)
            return max(num_windows, 1) * self.frames_per_clip
        if not 0 < fps < math.inf:
            raise ValueError(f"fps ({fps}) must be greater than 0; try 1.0")
        num_frames = max(math.ceil(duration_seconds * fps - TIME_TOLERANCE_SECONDS), 1)
        unit = self.tubelet_size if num_frames <= self.frames_per_clip else self.frames_per_clip
        return math.ceil(num_frames / unit) * unit

    def _check_num_frames(self, num_frames: int, name: str):
        unit = self.tubelet_size if num_frames <= self.frames_per_clip else self.frames_per_clip
        if num_frames >= 1 and num_frames % unit == 0:
            return
        below = num_frames // unit * unit
        nearest = f"{below} or {below + unit}" if below > 0 else unit
        raise ValueError(
            f"{name} ({num_frames}) must be a multiple of {self.tubelet_size} (tubelet_size) up to "
            f"{self.frames_per_clip} (frames_per_clip), and a multiple of {self.frames_per_clip} beyond; try {nearest}"
        )

    # Pixels

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if not self.do_resize:
            return height, width
        if self.size.height and self.size.width:
            return self.size.height, self.size.width
        edge = self.size.shortest_edge
        return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)

    def _resize_frame(self, frame: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if tuple(frame.shape[-2:]) == size:
            return frame
        return self.resize(frame, SizeDict(height=size[0], width=size[1]), resample=self.resample)

    def _crop_frame(self, frame: torch.Tensor) -> torch.Tensor:
        return self.center_crop(frame, self.crop_size) if self.do_center_crop else frame

    def _scale_and_shift(self) -> tuple[np.ndarray, np.ndarray]:
        """What `rescale_and_normalize` multiplies each channel by and adds to it, `(3, 1, 1)` float32."""
        black, white = self.rescale_and_normalize(
            torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1),
            self.do_rescale,
            self.rescale_factor,
            self.do_normalize,
            self.image_mean,
            self.image_std,
        ).numpy()
        return (white - black) / 255, black

    def _to_tensor(self, video, input_data_format: str | ChannelDimension | None) -> torch.Tensor:
        """Frames in any form to a tensor (num_frames, 3, height, width), uint8 or float in 0..255."""
        if is_pil_image(video):
            video = [video]
        if isinstance(video, (list, tuple)):
            video = stack_frames(video)
        elif not isinstance(video, torch.Tensor):
            video = from_numpy(video)
        if video.ndim == 3:
            video = video[None]
        if len(video) == 0:
            raise ValueError(f"video (shape {tuple(video.shape)}) must have at least one frame")
        if input_data_format is None:
            try:
                input_data_format = infer_channel_dimension_format(video, num_channels=(1, 3, 4))
            except ValueError as error:
                raise ValueError(
                    f"video (shape {tuple(video.shape)}) must be (num_frames, height, width, channels) or "
                    "(num_frames, channels, height, width) with 1, 3 or 4 channels; several videos go into a list"
                ) from error
        if input_data_format == ChannelDimension.LAST:
            video = video.permute(0, 3, 1, 2)
        video = video.detach()
        if video.dtype != torch.uint8:
            video = self._scale_to_bytes(video)
        if video.shape[1] != 3:
            video = self.convert_to_rgb(video)
        return video

    def _scale_to_bytes(self, video: torch.Tensor) -> torch.Tensor:
        if not self.do_rescale:
            return video.float()
        low, high = video.min().item(), video.max().item()
        if not 0 <= low <= high <= 255:
            raise ValueError(
                f"video (values {low:g} to {high:g}) must be in 0..255, or in 0..1 as float; pass do_rescale=False "
                "for frames that are scaled already"
            )
        if not video.is_floating_point():
            return video.to(torch.uint8)
        return video.float() / self.rescale_factor if high <= 1 else video.float()

    # transformers' own call

    def preprocess(self, videos, **kwargs: Unpack[VJepaQwenVideosKwargs]) -> BatchFeature:
        """
        Reads, samples and preprocesses videos.

        Args:
            videos: A video in any form that [`~VJepaQwenVideoProcessor.sample`] takes, or a list of them.
            num_frames, fps, video_metadata, do_sample_frames, input_data_format, start_seconds, end_seconds:
                As in [`~VJepaQwenVideoProcessor.sample`]; `video_metadata` may be a list, one entry for each video.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `None` gives a list with one tensor for each video, which may then differ in length.
            return_metadata (`bool`, *optional*): Adds `video_metadata`, a list of `VideoMetadata`.
            device (*optional*): Where the result goes.
            kwargs: Replace the attributes of this name for this call: `size`, `crop_size`, `do_normalize`, ...

        Returns:
            `BatchFeature`: `pixel_values_videos` of shape `(num_videos, num_frames, 3, height, width)`, float32.

        Raises:
            VideoDecodingError: for what is no readable video.
            ValueError: as [`~VJepaQwenVideoProcessor.sample`]; and for videos of different length in one tensor.
        """
        return_tensors = kwargs.pop("return_tensors", "pt")
        video_metadata = kwargs.pop("video_metadata", None)
        validate_typed_dict(self.valid_kwargs, kwargs)
        return_metadata = kwargs.pop("return_metadata", None) or self.return_metadata
        device = kwargs.pop("device", None) or self.device
        if kwargs.pop("data_format", None) not in (None, ChannelDimension.FIRST):
            raise ValueError("data_format must be 'channels_first', which is what the tower takes")
        names = ("num_frames", "fps", "do_sample_frames", "input_data_format", "start_seconds", "end_seconds")
        sampling_kwargs = {name: kwargs.pop(name, None) for name in names}
        # A copy with this call's attributes.
        processor = type(self).from_dict(self.to_dict(), **kwargs) if kwargs else self
        videos = flatten_videos(videos)
        if not videos:
            raise ValueError("videos ([]) must hold at least one video")
        sampled = [
            processor.sample(video, video_metadata=metadata, **sampling_kwargs)
            for video, metadata in zip(videos, metadata_per_video(video_metadata, len(videos)), strict=True)
        ]
        num_frames = [video.num_frames for video in sampled]
        if return_tensors is not None and len(set(num_frames)) > 1:
            raise ValueError(
                f"videos ({num_frames} frames) must have the same number of frames to be one tensor; pass "
                "num_frames=, or return_tensors=None for a list"
            )
        # One window, or one video, is not copied again.
        windows = [list(video.windows()) for video in sampled]
        pixel_values = [torch.cat(parts) if len(parts) > 1 else parts[0] for parts in windows]
        if device is not None:
            pixel_values = [video.to(device) for video in pixel_values]
        if return_tensors is not None:
            pixel_values = torch.stack(pixel_values) if len(pixel_values) > 1 else pixel_values[0][None]
        data = {"pixel_values_videos": pixel_values}
        if return_metadata:
            data["video_metadata"] = [video.metadata for video in sampled]
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=["video_metadata"])


def flatten_videos(videos) -> list:
    """
    One video, a list of videos or a list of lists of videos (as prompts give them), as a list of videos.

    A list of images or of arrays for one frame each is one video; an array with five dimensions is a batch.
    """
    if is_frames(videos):
        return list(videos) if num_dimensions(videos) == 5 else [videos]
    if isinstance(videos, (list, tuple)):
        return [video for item in videos for video in flatten_videos(item)]
    return [videos]


def metadata_per_video(video_metadata, num_videos: int) -> list:
    """One entry for each video, from None, one metadata for all, or a list of them (nested in prompts or not)."""
    if not isinstance(video_metadata, (list, tuple)):
        return [video_metadata] * num_videos
    flat = []
    for item in video_metadata:
        flat.extend(item if isinstance(item, (list, tuple)) else [item])
    if len(flat) != num_videos:
        raise ValueError(
            f"video_metadata ({len(flat)} entries) must have one entry for each of the {num_videos} videos"
        )
    return flat


def _part(start_seconds: float | None, end_seconds: float | None, duration_seconds: float) -> tuple[float, float]:
    """Start and end of the part to look at, within the video."""
    start = 0.0 if start_seconds is None else start_seconds
    end = duration_seconds if end_seconds is None else min(end_seconds, duration_seconds)
    if not 0 <= start < duration_seconds:
        raise ValueError(
            f"start_seconds ({start_seconds}) must be at least 0 and before the end of the video, which is "
            f"{duration_seconds:.3f} seconds long"
        )
    if not start < end:
        raise ValueError(f"end_seconds ({end_seconds}) must be greater than start_seconds ({start})")
    return start, end


VJepaQwenVideoProcessor.register_for_auto_class()

__all__ = ["SampledVideo", "VJepaQwenVideoProcessor", "flatten_videos", "metadata_per_video"]
