"""What [`VJepaQwenProcessor.segment`] finds in a video: events in seconds, and all that they were found with."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Event:
    """A span of a video in which little changes.

    Attributes:
        start_seconds (`float`): Presentation time of the event's first frame.
        end_seconds (`float`): Where the next event starts, or the video ends.
        score (`float`): Cosine distance at the boundary that opens the event; 0 for the first event of a video.
    """

    start_seconds: float
    end_seconds: float
    score: float


@dataclass(frozen=True, eq=False)
class VideoEvents:
    """
    What [`VJepaQwenProcessor.segment`] finds in one video. It can take the place of a video in
    [`VJepaQwenProcessor.apply_chat_template`] and in a processor call: nothing is encoded again then.

    Attributes:
        events (`list[Event]`): The events in order; they cover the video without gaps.
        distances (`np.ndarray` of shape `(num_steps,)`, float32):
            The distance curve; kept so that thresholds can be tuned without encoding again
            (`EventSegmenter(...).segment_distances(distances)`).
        boundaries (`np.ndarray` of shape `(num_events - 1,)`, int64): Steps at which a new event starts.
        frame_event_ids (`torch.LongTensor` of shape `(num_steps,)`): Event of each temporal step.
        frame_features (`torch.FloatTensor` of shape `(num_steps, hidden)`, float32): Mean-pooled tower output.
        timestamps (`np.ndarray` of shape `(num_frames,)`, float64): Presentation time of each frame, in seconds.
        duration_seconds (`float`): Length of the video.
    """

    events: list[Event]
    distances: np.ndarray
    boundaries: np.ndarray
    frame_event_ids: torch.LongTensor
    frame_features: torch.FloatTensor
    timestamps: np.ndarray
    duration_seconds: float

    @property
    def num_events(self) -> int:
        """Number of events, which is the number of tokens that the video costs."""
        return len(self.events)


__all__ = ["Event", "VideoEvents"]
