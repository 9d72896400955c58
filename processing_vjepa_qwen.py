"""VJepaQwenProcessor: text and videos in, the model's inputs out, one placeholder for each event.

Events are cut here, so the processor needs features of the vision tower. They come from one of three places:

* bound, `processor.bind(model)`: the model's own tower, adapters included. `frame_features` are returned and nothing
  is encoded twice.
* unbound: the tower is read from the processor's own checkpoint when the first video arrives (no other weight is
  read). It decides the spans only; the frames are returned and the model encodes them with whatever adapters it has.
* precomputed: `frame_features=...`, or a `VideoEvents` from `processor.segment` in the place of a video.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import AutoTokenizer, BatchFeature, PreTrainedConfig, VideosKwargs
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import logging
from transformers.video_utils import VideoMetadata

from .event_segmentation import EventSegmenter, count_events
from .modeling_vjepa_qwen import VJepaQwenVisionTower
from .video_encoding import VideoFeatures, encode_videos
from .video_events import Event, VideoEvents
from .video_processing_vjepa_qwen import VJepaQwenVideoProcessor, flatten_videos, metadata_per_video
from .vision_tower_access import load_vision_tower

logger = logging.get_logger(__name__)

# Of a call, passed on to `VJepaQwenVideoProcessor.sample`.
SAMPLING_OPTIONS = ("num_frames", "fps", "start_seconds", "end_seconds", "do_sample_frames", "input_data_format")


class VJepaQwenVideosKwargs(VideosKwargs, total=False):
    """
    return_frame_features (`bool`, *optional*):
        Whether to return the tower's features (`True`) or the frames (`False`), against the processor's own choice.
    start_seconds, end_seconds (`float`, *optional*):
        The part of the video to look at; the whole by default.
    """

    return_frame_features: bool | None
    start_seconds: float | None
    end_seconds: float | None


class VJepaQwenProcessorKwargs(ProcessingKwargs, total=False):
    videos_kwargs: VJepaQwenVideosKwargs
    # Read by `prepare_inputs_layout`; declared here so that they count as known arguments.
    frame_features: list | torch.Tensor | None
    frame_event_ids: list | torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _EncodedVideo:
    """One video on its way to the model: always the spans, and the frames or the features or both."""

    frame_event_ids: torch.LongTensor
    frame_features: torch.FloatTensor | None
    pixel_values: torch.FloatTensor | None = None
    metadata: VideoMetadata | None = None


@dataclass(frozen=True, eq=False)
class _CutVideo:
    """A video whose spans are known: its frames are needed, and no tower."""

    video: object
    frame_event_ids: torch.LongTensor


class VJepaQwenProcessor(ProcessorMixin):
    r"""
    Tokenizer, video processor and event segmentation in one.

    Args:
        video_processor (`VJepaQwenVideoProcessor`): Decodes, samples and normalises.
        tokenizer (`PreTrainedTokenizerBase`): The language model's tokenizer; it must know `video_token`.
        chat_template (`str`, *optional*): Defaults to the tokenizer's.
        event_segmentation (`dict`, *optional*):
            Parameters of [`EventSegmenter`], saved with the processor. Defaults to the class's.
        video_token (`str`, *optional*, defaults to `"<|video_pad|>"`):
            The placeholder in the text, one for each video in the prompt and one for each event in `input_ids`.
        event_tower (`str`, *optional*, defaults to `"adapted"`):
            Which features a video is cut by when the bound tower carries a LoRA: `"adapted"`, those it encodes with,
            or `"base"`, those without the LoRA. Training stores its rule here, so that inference cuts as it did.
    """

    valid_processor_kwargs = VJepaQwenProcessorKwargs
    text_kwargs = {"padding": True, "padding_side": "left", "return_token_type_ids": False}

    def __init__(
        self,
        video_processor=None,
        tokenizer=None,
        chat_template=None,
        event_segmentation: dict | None = None,
        video_token: str = "<|video_pad|>",
        event_tower: str = "adapted",
    ):
        if event_tower not in ("adapted", "base"):
            raise ValueError(f"event_tower ({event_tower!r}) must be 'adapted' or 'base'")
        self.event_tower = event_tower
        self.segmenter = EventSegmenter(**(event_segmentation or {}))
        self.event_segmentation = event_segmentation or {}
        self.video_token = video_token
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        if self.video_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(
                f"video_token ({video_token!r}) must be a token of the tokenizer's vocabulary; add it with "
                f"`tokenizer.add_special_tokens({{'additional_special_tokens': [{video_token!r}]}})`"
            )
        self._vision_tower = None
        self._is_bound = False
        self._checkpoint = None
        super().__init__(video_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, dtype: str | torch.dtype = "auto", **kwargs):
        """
        As every processor. The place is remembered: the vision tower is read from there when it is first needed.

        Args:
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                What that tower computes in. `"auto"` is the dtype of the checkpoint, as for models, but float32 where
                the hardware has no bfloat16.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        processor._checkpoint = (
            pretrained_model_name_or_path,
            {name: kwargs[name] for name in names if kwargs.get(name) is not None},
            dtype,
        )
        return processor

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # The base class goes through AutoVideoProcessor, and AutoTokenizer through AutoConfig: both would ask to trust
        # the code that is running already. The tokenizer's own files say what it is.
        return [
            VJepaQwenVideoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, config=PreTrainedConfig(), **kwargs),
        ]

    def to_dict(self) -> dict:
        # The base class copies every attribute deeply before it picks those to save; a tower is not to be copied.
        tower, self._vision_tower = self._vision_tower, None
        try:
            return super().to_dict()
        finally:
            self._vision_tower = tower

    # Vision

    def bind(self, model) -> "VJepaQwenProcessor":
        """
        Lets `model`'s own vision tower encode, adapters included, so that each video is encoded once.

        Args:
            model (`VJepaQwenForConditionalGeneration`, `VJepaQwenModel`, or either wrapped by PEFT or accelerate).

        Returns:
            `VJepaQwenProcessor`: itself.

        Raises:
            ValueError: when the model has no V-JEPA 2 tower, or one made for other frames than the video processor's.
        """
        # By name: in remote-code mode model and processor may come from different copies of the module.
        towers = [module for module in model.modules() if type(module).__name__ == VJepaQwenVisionTower.__name__]
        if not towers:
            raise ValueError(
                f"model ({type(model).__name__}) must hold a VJepaQwenVisionTower; pass a VJepaQwen model"
            )
        self._set_vision_tower(towers[0])
        self._is_bound = True
        return self

    def _set_vision_tower(self, tower):
        expected = {
            "crop_size": self.video_processor.crop_size["height"],
            "frames_per_clip": self.video_processor.frames_per_clip,
            "tubelet_size": self.video_processor.tubelet_size,
        }
        for name, value in expected.items():
            if getattr(tower.config, name) != value:
                raise ValueError(
                    f"{name} of the vision tower ({getattr(tower.config, name)}) must be the video processor's "
                    f"({value}); load the processor that is saved with the model"
                )
        self._vision_tower = tower

    def _get_vision_tower(self):
        if self._vision_tower is None:
            if self._checkpoint is None:
                raise ValueError(
                    "This processor was made from parts and has no vision tower to find events with: call "
                    "`processor.bind(model)`, load it with `from_pretrained`, or pass `frame_features=`"
                )
            self._set_vision_tower(load_vision_tower(*self._checkpoint))
        return self._vision_tower

    def segment(
        self,
        videos,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        video_metadata=None,
        return_exceptions: bool = False,
    ) -> list["VideoEvents | Exception"]:
        """
        Finds the events of videos, without any language model. The videos are decoded side by side, and each while the
        tower is at work; what comes out is the same as for each alone.

        Args:
            videos: A video or a list of them: path, URL, bytes, file object, frames as array or list of images.
            num_frames (`int`, *optional*): Frames to look at, see [`VJepaQwenVideoProcessor.sample`].
            fps (`float`, *optional*): Frames per second to look at, instead.
            start_seconds, end_seconds (`float`, *optional*): The part to look at; the whole video by default.
            video_metadata (*optional*): Of videos given as frames, see [`VJepaQwenVideoProcessor.sample`].
            return_exceptions (`bool`, *optional*, defaults to `False`):
                Whether a video that cannot be read leaves its exception in the list, as in `asyncio.gather`, and does
                not end the call.

        Returns:
            `list[VideoEvents]`: One for each video, in order.

        Raises:
            ValueError: for what is no readable video; the error names it.
        """
        return list(
            self.iter_segment(
                videos,
                num_frames=num_frames,
                fps=fps,
                start_seconds=start_seconds,
                end_seconds=end_seconds,
                video_metadata=video_metadata,
                return_exceptions=return_exceptions,
            )
        )

    def iter_segment(
        self,
        videos,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        video_metadata=None,
        return_exceptions: bool = False,
        on_window: Callable[[int, int, int], None] | None = None,
    ) -> Iterator["VideoEvents | Exception"]:
        """
        As [`~VJepaQwenProcessor.segment`], one video after the other: for more videos than their features fit into
        memory, or to use the first while the next are decoded.

        Args:
            on_window (callable, *optional*):
                For a progress bar: `on_window(video_index, num_windows_done, num_windows)` after each step of a video.

        Yields:
            `VideoEvents`, in order.
        """
        videos = flatten_videos(videos)
        options = {"num_frames": num_frames, "fps": fps, "start_seconds": start_seconds, "end_seconds": end_seconds}
        encoded_videos = self._encode_videos(videos, video_metadata, options, on_window=on_window)
        with closing(encoded_videos):
            for encoded in encoded_videos:
                if not isinstance(encoded, Exception):
                    yield self._cut(encoded, start_seconds, end_seconds)
                elif return_exceptions:
                    yield encoded
                else:
                    raise encoded

    def _encode_videos(self, videos: list, video_metadata, sampling_options: dict, **options):
        """See [`encode_videos`]."""
        open_videos = [
            partial(self.video_processor.sample, video, video_metadata=metadata, **sampling_options)
            for video, metadata in zip(videos, metadata_per_video(video_metadata, len(videos)), strict=True)
        ]
        spans_without_adapters = self.event_tower == "base"
        return encode_videos(
            self._get_vision_tower(), open_videos, spans_without_adapters=spans_without_adapters, **options
        )

    def _segment_features(self, frame_features):
        steps_per_window = self.video_processor.frames_per_clip // self.video_processor.tubelet_size
        return self.segmenter(frame_features, steps_per_window=steps_per_window)

    def _cut(self, encoded: VideoFeatures, start_seconds: float | None, end_seconds: float | None) -> VideoEvents:
        sampled, segmentation = encoded.sampled, self._segment_features(encoded.span_features)
        first_steps = np.concatenate([[0], segmentation.boundaries])
        starts = sampled.timestamps[first_steps * self.video_processor.tubelet_size]
        starts[0] = start_seconds or 0.0  # the first frame that is sampled is not the first that is shown
        end = sampled.duration_seconds if end_seconds is None else min(end_seconds, sampled.duration_seconds)
        ends = np.append(starts[1:], end)
        return VideoEvents(
            events=[
                Event(float(a), float(b), float(s)) for a, b, s in zip(starts, ends, segmentation.scores, strict=True)
            ],
            distances=segmentation.distances,
            boundaries=segmentation.boundaries,
            frame_event_ids=torch.from_numpy(segmentation.frame_event_ids),
            frame_features=encoded.frame_features,
            timestamps=sampled.timestamps,
            duration_seconds=sampled.duration_seconds,
        )

    # Hooks of ProcessorMixin

    def prepare_inputs_layout(
        self, images=None, text=None, videos=None, audio=None, frame_features=None, frame_event_ids=None, **kwargs
    ):
        if frame_features is not None:
            if videos is not None:
                raise ValueError("videos and frame_features must not be given together; frame_features replace videos")
            videos = self._precomputed_videos(frame_features, frame_event_ids)
        elif videos is not None:
            videos = flatten_videos(videos)
            if frame_event_ids is not None:  # the frames are wanted, cut by spans that are known
                if len(frame_event_ids) != len(videos):
                    raise ValueError(
                        f"frame_event_ids ({len(frame_event_ids)}) must be one for each of the {len(videos)} videos"
                    )
                videos = [_CutVideo(v, torch.as_tensor(ids)) for v, ids in zip(videos, frame_event_ids, strict=True)]
        return super().prepare_inputs_layout(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _precomputed_videos(self, frame_features, frame_event_ids) -> list[_EncodedVideo]:
        frame_features = [torch.as_tensor(features) for features in frame_features]
        if any(features.ndim != 2 for features in frame_features):
            raise ValueError(
                f"frame_features ({[tuple(features.shape) for features in frame_features]}) must be a list with one "
                "(num_steps, hidden) tensor for each video, or one (num_videos, num_steps, hidden) tensor"
            )
        if frame_event_ids is None:
            frame_event_ids = [self._segment_features(features).frame_event_ids for features in frame_features]
        frame_event_ids = [torch.as_tensor(event_ids) for event_ids in frame_event_ids]
        num_ids, num_steps = [len(ids) for ids in frame_event_ids], [len(features) for features in frame_features]
        if num_ids != num_steps:
            raise ValueError(
                f"frame_event_ids ({num_ids} steps) must have one id for each step of frame_features ({num_steps} "
                "steps), video by video"
            )
        return [_EncodedVideo(ids, features) for ids, features in zip(frame_event_ids, frame_features, strict=True)]

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if images is not None or audio is not None:
            raise ValueError("VJepaQwen takes videos and text: images and audio must not be given")
        # Without `videos`: the base class would flatten them by rules that know nothing of paths and VideoEvents.
        if text is not None and videos is not None:
            num_placeholders = sum(sample.count(self.video_token) for sample in text)
            if num_placeholders != len(videos):
                raise ValueError(
                    f"The prompts have {num_placeholders} video placeholders ({self.video_token}) for {len(videos)} "
                    "videos: each video needs one; apply_chat_template writes them"
                )
            return
        super().validate_inputs(text=text, videos=videos, **kwargs)

    def _process_videos(
        self,
        videos: list,
        video_metadata=None,
        return_frame_features: bool | None = None,
        return_metadata: bool | None = None,
        return_tensors=None,
        **kwargs,
    ):
        sampling_options = {name: kwargs.pop(name) for name in SAMPLING_OPTIONS if name in kwargs}
        if kwargs:
            raise ValueError(
                f"{', '.join(kwargs)} must not change from call to call: the tower and the saved events rest on it; "
                "set it on `processor.video_processor`"
            )
        encoded = self._encode_for_model(videos, video_metadata, sampling_options)
        has_all_frames = all(video.pixel_values is not None for video in encoded)
        if return_frame_features is None:
            is_cut = any(video.frame_features is None for video in encoded)
            return_frame_features = not is_cut and (self._is_bound or not has_all_frames)
        if not return_frame_features and not has_all_frames:
            raise ValueError(
                "return_frame_features (False) must be True or left out here: a video given as features has no frames "
                f"to return, and one longer than a window ({self.video_processor.frames_per_clip} frames) is encoded "
                "window by window so that its frames need not fit into memory; num_frames= looks at fewer"
            )
        frame_event_ids = _pad([video.frame_event_ids for video in encoded], padding_value=-1)
        data = {"frame_event_ids": frame_event_ids}
        if return_frame_features:
            data["frame_features"] = _pad([video.frame_features for video in encoded])
        else:
            data["pixel_values_videos"] = _pad([video.pixel_values for video in encoded])
        if return_metadata:
            data["video_metadata"] = [video.metadata for video in encoded]
        replacements = [self.replace_video_token(data, video_idx) for video_idx in range(len(encoded))]
        return BatchFeature(data), replacements

    def _encode_for_model(self, videos: list, video_metadata, sampling_options: dict) -> list[_EncodedVideo]:
        metadata = metadata_per_video(video_metadata, len(videos))
        results = [_as_encoded(video) for video in videos]
        for index, video in enumerate(videos):
            if isinstance(video, _CutVideo):
                results[index] = self._read_cut_video(video, video_metadata=metadata[index], **sampling_options)
        positions = [index for index, result in enumerate(results) if result is None]
        if not positions:
            return results
        encoded_videos = self._encode_videos(
            [videos[index] for index in positions],
            [metadata[index] for index in positions],
            sampling_options,
            keep_frames=lambda sampled: sampled.num_frames <= sampled.frames_per_window,
        )
        with closing(encoded_videos):
            for index, encoded in zip(positions, encoded_videos, strict=True):
                if isinstance(encoded, Exception):
                    raise encoded
                event_ids = torch.from_numpy(self._segment_features(encoded.span_features).frame_event_ids)
                sampled = encoded.sampled
                results[index] = _EncodedVideo(event_ids, encoded.frame_features, encoded.frames, sampled.metadata)
                if encoded.frames is None and not self._is_bound:
                    logger.warning_once(
                        f"A video is longer than one window of the tower ({sampled.num_frames} frames, a window is "
                        f"{self.video_processor.frames_per_clip}): its features come from the processor's own tower, "
                        "without any adapter that only the model carries. Call `processor.bind(model)` to use the "
                        "model's tower."
                    )
        return results

    def _read_cut_video(self, cut: _CutVideo, **sampling_kwargs) -> _EncodedVideo:
        sampled = self.video_processor.sample(cut.video, **sampling_kwargs)
        num_steps = sampled.num_frames // self.video_processor.tubelet_size
        if num_steps != len(cut.frame_event_ids) or sampled.num_frames > self.video_processor.frames_per_clip:
            raise ValueError(
                f"frame_event_ids ({len(cut.frame_event_ids)} steps) must have one id for each of the {num_steps} "
                "steps of the video, and the video one window of the tower at most "
                f"({self.video_processor.frames_per_clip} frames, not {sampled.num_frames}); "
                "pass num_frames= to look at fewer"
            )
        return _EncodedVideo(cut.frame_event_ids, None, torch.cat(list(sampled.windows())), sampled.metadata)

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        return self.video_token * count_events(video_inputs["frame_event_ids"][video_idx : video_idx + 1])[0]

    @property
    def model_input_names(self) -> list[str]:
        return super().model_input_names + ["frame_features", "frame_event_ids"]

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """
        As [`ProcessorMixin.apply_chat_template`], with thinking off unless `enable_thinking=True` is passed: a
        description needs none, and a short `max_new_tokens` would be spent on it.

        `num_frames`, `fps`, `start_seconds`, `end_seconds`, `video_metadata` and `return_frame_features` go into
        `processor_kwargs`.
        """
        if "enable_thinking" in self._resolve_chat_template(chat_template):
            kwargs.setdefault("enable_thinking", False)
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)


def _as_encoded(video) -> _EncodedVideo | None:
    """What is encoded already, None for what is still to be encoded."""
    if isinstance(video, _EncodedVideo):
        return video
    # By name, as in `bind`: another copy of this module may have made it.
    if type(video).__name__ == VideoEvents.__name__:
        return _EncodedVideo(video.frame_event_ids, video.frame_features)
    return None


def _pad(tensors: list[torch.Tensor], padding_value: int = 0) -> torch.Tensor:
    """Stacks tensors of different length; what pads a video is marked by -1 in `frame_event_ids` and never encoded."""
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding_value)


VJepaQwenProcessor.register_for_auto_class()

__all__ = ["Event", "VJepaQwenProcessor", "VideoEvents"]
