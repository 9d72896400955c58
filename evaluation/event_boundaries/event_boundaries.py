"""Precision, recall and F1 of event boundaries, as a module of the library `evaluate`.

metric = evaluate.load("evaluation/event_boundaries")
metric.compute(predictions=[[1.0, 2.2]], references=[[1.1]], durations=[4.0], tolerance_seconds=0.25)
"""

import datasets
import evaluate

_DESCRIPTION = """
A predicted boundary is right when it matches a true one that is at most a tolerance away; each matches one other at
most, and as many as possible are matched (both lists sorted, each true boundary takes the first one still free: for
intervals of one width that is the maximum).

precision = matched / predicted, recall = matched / true, f1 = 2 matched / (predicted + true), from counts over all
videos

Two kinds of tolerance: seconds, and *relative distance*, a share of the video's duration, 0.05, 0.10, ... 0.50, with
the mean of the ten F1 scores, after Kinetics-GEBD (Shou et al., "Generic Event Boundary Detection: A Benchmark for
Event Segmentation", ICCV 2021). There several people annotated each video and the one that agrees best counts; here
there is one annotation.
"""

_INPUTS = """
Args:
    predictions (`list[list[float]]`): Boundaries found in each video, in seconds; the start of the video is none.
    references (`list[list[float]]`): The true ones.
    durations (`list[float]`): Of each video, in seconds.
    tolerance_seconds (`float`, *optional*, defaults to 0.5)

Returns:
    `dict`: `precision`, `recall`, `f1` within `tolerance_seconds`; `f1_at_0.05` ... `f1_at_0.50` and `mean_f1`; and
    the counts, which add up over data sets: `num_matched`, `num_matched_at_0.05` ..., `num_predicted`, `num_true`.
    A ratio whose denominator is 0 is 0, but 1 for F1 when there is nothing to find and nothing was found.

Raises:
    ValueError: for a tolerance or a duration that is not positive.
"""

RELATIVE_DISTANCES = [f"{percent / 100:.2f}" for percent in range(5, 55, 5)]


class EventBoundaries(evaluate.Metric):
    def _info(self):
        boundaries = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": boundaries, "references": boundaries}),
        )

    def _compute(self, predictions, references, durations, tolerance_seconds=0.5):
        if tolerance_seconds <= 0 or len(durations) != len(references) or min(durations, default=0) <= 0:
            raise ValueError(
                f"tolerance_seconds ({tolerance_seconds}) and durations ({durations}) must be positive, one duration "
                f"for each of the {len(references)} videos"
            )
        pairs = [(sorted(found), sorted(true)) for found, true in zip(predictions, references, strict=True)]
        num_predicted, num_true = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
        num_matched = sum(count_matches(found, true, tolerance_seconds) for found, true in pairs)
        result = {
            "precision": num_matched / num_predicted if num_predicted else 0.0,
            "recall": num_matched / num_true if num_true else 0.0,
            "f1": _f1(num_matched, num_predicted, num_true),
            "num_matched": num_matched,
            "num_predicted": num_predicted,
            "num_true": num_true,
        }
        for distance in RELATIVE_DISTANCES:
            tolerances = [float(distance) * duration for duration in durations]
            matched = sum(count_matches(*pair, width) for pair, width in zip(pairs, tolerances, strict=True))
            result[f"num_matched_at_{distance}"] = matched
            result[f"f1_at_{distance}"] = _f1(matched, num_predicted, num_true)
        result["mean_f1"] = sum(result[f"f1_at_{name}"] for name in RELATIVE_DISTANCES) / len(RELATIVE_DISTANCES)
        return result


def _f1(num_matched: int, num_predicted: int, num_true: int) -> float:
    return 2 * num_matched / (num_predicted + num_true) if num_predicted + num_true else 1.0


def count_matches(found: list[float], true: list[float], tolerance: float) -> int:
    """Most one-to-one pairs of a found and a true time, both sorted, that are at most `tolerance` apart."""
    matches, index = 0, 0
    for time in true:
        while index < len(found) and found[index] < time - tolerance - 1e-6:
            index += 1
        if index < len(found) and found[index] <= time + tolerance + 1e-6:
            matches, index = matches + 1, index + 1
    return matches
