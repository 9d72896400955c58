"""Event segmentation: features of each temporal step in; distance curve, boundaries, event ids and scores out.

    segmenter = EventSegmenter(max_events=12)
    segmentation = segmenter(frame_features)                  # (num_steps, hidden)
    segmentation.frame_event_ids                              # (num_steps,): 0 0 0 1 1 2 2 2 ...
    segmenter.segment_distances(segmentation.distances)       # other thresholds, without the features

Score first, decide second. The score of a step is the cosine distance between the mean features left and right of its
start. Boundaries are the peaks of that curve: high enough, prominent enough, far enough from each other, and neither
too few nor too many in each window. No weights, no randomness: equal features give equal events.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.signal import find_peaks, peak_prominences

# Rows that are worked on at a time: with 1024 features they fit into a core's cache.
CHUNK_STEPS = 512


@dataclass(frozen=True, eq=False)
class EventSegmentation:
    """
    Attributes:
        distances (`np.ndarray` of shape `(num_steps,)`, float32):
            Cosine distance (0 equal, 2 opposite) of what lies left and right of each step's start; 0 for the first.
        boundaries (`np.ndarray` of shape `(num_events - 1,)`, int64): Steps at which a new event starts, ascending.
        frame_event_ids (`np.ndarray` of shape `(num_steps,)`, int64): Event of each step, from 0.
        scores (`np.ndarray` of shape `(num_events,)`, float32):
            Distance at the boundary that opens each event; 0 for the first.
    """

    distances: np.ndarray
    boundaries: np.ndarray
    frame_event_ids: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, kw_only=True)
class EventSegmenter:
    """
    Cuts a video where its features change. A temporal step is one tubelet of the tower (2 frames; 32 steps are one
    window of V-JEPA 2).

    Where peaks are too close or too many, those that pass threshold and prominence stay before others, then the
    higher, then the earlier. The defaults reach F1 0.96 on made-up clips of 32 steps, 8 to 13 scenes (see the test);
    a lower threshold reaches 0.99, but cuts more where little happens, and a higher one misses weak changes.

    Args:
        window_steps (`int`, *optional*, defaults to 1):
            Steps left and right of a boundary whose means are compared. 1 compares neighbours and finds cuts; more
            finds slow changes and is robust to flashes.
        smoothing_steps (`int`, *optional*, defaults to 1):
            Width, odd, of a moving average over the distances before peaks are looked for. 1 is none.
        threshold_deviations (`float`, *optional*, defaults to 0.0):
            A boundary is at least this many standard deviations above the mean of the video's distances.
        prominence_deviations (`float`, *optional*, defaults to 0.25):
            A boundary stands out from the valleys beside it by at least this many standard deviations.
        min_distance (`float`, *optional*, defaults to 0.001):
            Below this cosine distance nothing is a boundary, however quiet the rest: a static clip is one event.
        min_event_steps (`int`, *optional*, defaults to 1): Shortest event, in steps. The strongest boundary wins.
        min_events (`int`, *optional*, defaults to 8):
            When fewer events begin in a window, the strongest other peaks above `min_distance` become boundaries too.
        max_events (`int`, *optional*, defaults to 15): At most so many events begin in a window; the strongest stay.

    Raises:
        ValueError: for a parameter out of its range.
    """

    window_steps: int = 1
    smoothing_steps: int = 1
    threshold_deviations: float = 0.0
    prominence_deviations: float = 0.25
    min_distance: float = 1e-3
    min_event_steps: int = 1
    min_events: int = 8
    max_events: int = 15

    def __post_init__(self):
        for name in ("window_steps", "smoothing_steps", "min_event_steps", "min_events", "max_events"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} ({value!r}) must be a whole number of at least 1")
        if self.smoothing_steps % 2 == 0:
            width = self.smoothing_steps
            raise ValueError(f"smoothing_steps ({width}) must be odd, to leave a peak in its place; try {width + 1}")
        if self.max_events < self.min_events:
            raise ValueError(f"max_events ({self.max_events}) must be >= min_events ({self.min_events}); set both")
        for name, least in (("threshold_deviations", -np.inf), ("prominence_deviations", 0), ("min_distance", 0)):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and np.isfinite(value) and value >= least):
                rule = "a finite number" if least else "a finite number of at least 0"
                raise ValueError(f"{name} ({value!r}) must be {rule}")

    def __call__(
        self, features: np.ndarray | torch.Tensor, *, steps_per_window: int | None = None
    ) -> EventSegmentation:
        """
        Args:
            features (`np.ndarray` or `torch.Tensor` of shape `(num_steps, hidden)`): Of any float type.
            steps_per_window (`int`, *optional*):
                Steps in one window of the tower, for the bounds on the number of events. Defaults to all steps.

        Raises:
            ValueError: for another shape, for no steps, and for features that are not finite.
        """
        distances = cosine_distances(features, window_steps=self.window_steps)
        return self.segment_distances(distances, steps_per_window=steps_per_window)

    def segment_distances(self, distances: np.ndarray, *, steps_per_window: int | None = None) -> EventSegmentation:
        """Decides again on a known curve of shape `(num_steps,)`: to tune thresholds without encoding again."""
        distances = np.asarray(distances, dtype=np.float32)
        if distances.ndim != 1 or len(distances) == 0 or not np.isfinite(distances).all():
            raise ValueError(f"distances (shape {distances.shape}) must be finite, of shape (num_steps,), not empty")
        if steps_per_window is not None and steps_per_window < 1:
            raise ValueError(f"steps_per_window ({steps_per_window}) must be at least 1, or None")
        boundaries = self._find_boundaries(distances, steps_per_window or len(distances))
        starts_event = np.zeros(len(distances), dtype=np.int64)
        starts_event[boundaries] = 1
        return EventSegmentation(
            distances=distances,
            boundaries=boundaries,
            frame_event_ids=np.cumsum(starts_event),
            scores=np.concatenate([np.zeros(1, dtype=np.float32), distances[boundaries]]),
        )

    def _find_boundaries(self, distances: np.ndarray, steps_per_window: int) -> np.ndarray:
        if len(distances) == 1:
            return np.empty(0, dtype=np.int64)
        curve = _moving_average(distances[1:].astype(np.float64), self.smoothing_steps)
        mean, deviation = curve.mean(), curve.std()
        # Zeros at both ends, so that the first and the last boundary can be peaks; index i is now the start of step i.
        curve = np.pad(curve, 1)
        steps, _ = find_peaks(curve, height=max(self.min_distance, np.finfo(np.float32).tiny))
        steps = steps[(steps >= self.min_event_steps) & (steps <= len(distances) - self.min_event_steps)]
        is_strong = curve[steps] >= mean + self.threshold_deviations * deviation
        is_strong &= peak_prominences(curve, steps)[0] >= self.prominence_deviations * deviation
        # Who stays where peaks are too close or too many: strong ones first, then the higher, then the earlier.
        order = np.lexsort((steps, -curve[steps], ~is_strong))
        num_weak = len(steps) - np.count_nonzero(is_strong)
        # With priorities for heights and zeros between, find_peaks drops what is too close to a better one.
        priority = np.zeros_like(curve)
        priority[steps[order]] = np.arange(len(steps), 0, -1)
        steps, _ = find_peaks(priority, distance=self.min_event_steps)

        windows = steps // steps_per_window
        order = np.lexsort((-priority[steps], windows))
        # Windows are ascending, in `steps` and in `order`.
        rank = np.arange(len(steps)) - np.searchsorted(windows, windows)
        num_strong = np.bincount(windows, weights=priority[steps] > num_weak, minlength=1)[windows]
        # The event with which the video starts has no boundary and counts in the first window.
        has_first_event = windows == 0
        num_kept = np.clip(num_strong, self.min_events - has_first_event, self.max_events - has_first_event)
        return np.sort(steps[order[rank < num_kept]]).astype(np.int64)


def cosine_distances(features: np.ndarray | torch.Tensor, *, window_steps: int = 1) -> np.ndarray:
    """
    Cosine distance between the means of the `window_steps` steps left and right of the start of each step; at the ends
    of the video a window holds what is there. For features of shape `(num_steps, hidden)`, of any float type, an array
    of shape `(num_steps,)`, float32; the first is 0.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features (shape {tuple(features.shape)}) must have shape (num_steps, hidden), not empty")
    num_steps = len(features)
    window_steps = min(window_steps, num_steps)
    distances = np.empty(num_steps, dtype=np.float32)
    for start in range(0, num_steps, CHUNK_STEPS):
        stop = min(start + CHUNK_STEPS, num_steps)
        first, last = start - window_steps, stop + window_steps - 1
        rows = _to_float32(features[max(first, 0) : last])
        if first < 0 or last > num_steps:  # zeros beyond the ends add nothing to the sums
            rows = np.pad(rows, ((max(-first, 0), max(last - num_steps, 0)), (0, 0)))
        sums = _sliding_sums(rows, window_steps)  # instead of means: a cosine does not see the length
        squares = np.einsum("ij,ij->i", sums, sums)
        if not np.isfinite(squares).all():
            step = max(first + int(np.argmin(np.isfinite(squares))), 0)
            raise ValueError(f"features near step {step} must be finite numbers; try bfloat16 instead of float16")
        dots = np.einsum("ij,ij->i", sums[:-window_steps], sums[window_steps:])
        left, right = squares[:-window_steps], squares[window_steps:]
        norms = np.sqrt(left) * np.sqrt(right)
        # Nothing differs from nothing by 0, and from something by 1.
        distances[start:stop] = np.where(norms > 0, 1 - dots / np.where(norms > 0, norms, 1), left != right)
    distances[0] = 0
    return np.clip(distances, 0, 2)


def _to_float32(rows: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(rows, torch.Tensor):
        rows = rows.detach().to("cpu", torch.float32).numpy()
    # Contiguous: the order of additions, and with it the last bit, must not depend on the layout.
    return np.ascontiguousarray(rows, dtype=np.float32)


def _sliding_sums(rows: np.ndarray, width: int) -> np.ndarray:
    """
    Sums of each `width` neighbouring rows, in about log2(width) additions. Not as differences of a running total: its
    rounding would depend on where the chunk starts, and the zeros of a black clip would not come back as zeros.
    """
    if width == 1:
        return rows
    half = width // 2
    sums = _sliding_sums(rows, half)
    sums = sums[:-half] + sums[half:]
    return sums if width % 2 == 0 else sums[:-1] + rows[width - 1 :]


def _moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Centred; at the ends over the values that are there."""
    if width == 1:
        return values
    counts, sums = (np.convolve(terms, np.ones(width)) for terms in (np.ones(len(values)), values))
    return (sums / counts)[width // 2 : width // 2 + len(values)]


def count_events(frame_event_ids: np.ndarray | torch.Tensor) -> list[int]:
    """
    Number of events of each video: the one place where events, and with them placeholders, are counted.

    Args:
        frame_event_ids (`np.ndarray` or `torch.Tensor` of shape `(num_videos, num_steps)`, integer):
            Event of each step: 0 0 1 1 1 2 ..., then -1 for padding. Another form is a `ValueError` naming the video.

    Returns:
        `list[int]`: One number for each video, at least 1.
    """
    event_ids = np.asarray(frame_event_ids.cpu() if isinstance(frame_event_ids, torch.Tensor) else frame_event_ids)
    if event_ids.ndim != 2 or event_ids.shape[1] == 0 or not np.issubdtype(event_ids.dtype, np.integer):
        raise ValueError(
            f"frame_event_ids (shape {event_ids.shape}, {event_ids.dtype}) must be integers of shape "
            "(num_videos, num_steps), with a step"
        )
    is_padding = event_ids < 0
    increments = np.diff(event_ids, axis=1)
    is_valid = (event_ids[:, 0] == 0) & (event_ids >= -1).all(axis=1)
    is_valid &= (is_padding[:, 1:] | (~is_padding[:, :-1] & ((increments == 0) | (increments == 1)))).all(axis=1)
    if not is_valid.all():
        video = int(np.argmin(is_valid))
        ids = np.array2string(event_ids[video], threshold=100, max_line_width=1000)
        raise ValueError(
            f"frame_event_ids of video {video} ({ids}) must start at 0, rise by 0 or 1 from step to step, and end in "
            "-1 for padding only"
        )
    return (event_ids.max(axis=1) + 1).tolist()


def pool_events(frame_features: torch.FloatTensor, event_ids: torch.LongTensor, num_events: int) -> torch.FloatTensor:
    """
    Mean of the steps of each event of one video.

    Args:
        frame_features (`torch.FloatTensor` of shape `(num_steps, hidden)`): Features of each temporal step.
        event_ids (`torch.LongTensor` of shape `(num_steps,)`): Event of each step, -1 for padding.
        num_events (`int`): Number of events of the video.

    Returns:
        `torch.FloatTensor` of shape `(num_events, hidden)`, float32.
    """
    membership = event_ids == torch.arange(num_events, device=event_ids.device).unsqueeze(1)
    membership = membership.to(frame_features.device, torch.float32)
    return (membership @ frame_features.float()) / membership.sum(dim=1, keepdim=True)


__all__ = ["EventSegmentation", "EventSegmenter", "cosine_distances", "count_events", "pool_events"]
