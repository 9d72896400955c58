"""Event segmentation: hand-made curves and features, bounds, edge cases, errors."""

import itertools

import numpy as np
import pytest
import torch

from vjepa_qwen.event_segmentation import CHUNK_STEPS, EventSegmenter, cosine_distances, count_events

# Finds every peak; tests change one parameter.
PLAIN = {"threshold_deviations": -10.0, "prominence_deviations": 0.0, "min_events": 1, "max_events": 1000}


def scenes(lengths, seed=0, noise=0.02, size=64):
    """Features of scenes: a random direction each, with noise."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(rng.standard_normal((len(lengths), size)), lengths, axis=0)
    return (centres + noise * rng.standard_normal(centres.shape)).astype(np.float32)


def naive_distances(features, window_steps):
    expected = np.zeros(len(features))
    for step in range(1, len(features)):
        left = features[max(step - window_steps, 0) : step].mean(axis=0)
        right = features[step : step + window_steps].mean(axis=0)
        expected[step] = 1 - left @ right / np.sqrt((left @ left) * (right @ right))
    return expected


@pytest.mark.parametrize("window_steps", [1, 2, 5, 7, 40])
@pytest.mark.parametrize("num_steps", [1, 2, 7, CHUNK_STEPS, CHUNK_STEPS + 1, 2 * CHUNK_STEPS + 3])
def test_distances_are_those_of_the_definition(num_steps, window_steps):
    features = np.random.default_rng(0).standard_normal((num_steps, 16)).astype(np.float32)
    actual = cosine_distances(features, window_steps=window_steps)
    np.testing.assert_allclose(actual, naive_distances(features.astype(np.float64), window_steps), atol=2e-6)


def test_cuts_are_found_where_they_are():
    segmentation = EventSegmenter(min_events=1)(scenes([5, 7, 4, 16]))
    assert segmentation.boundaries.tolist() == [5, 12, 16]
    assert segmentation.frame_event_ids.tolist() == [0] * 5 + [1] * 7 + [2] * 4 + [3] * 16
    assert segmentation.scores[0] == 0
    assert segmentation.scores[1:].tolist() == segmentation.distances[[5, 12, 16]].tolist()


@pytest.mark.parametrize("num_scenes", range(8, 16))
@pytest.mark.parametrize("seed", range(10))
def test_defaults_find_8_to_15_events_of_varied_strength_in_a_window(num_scenes, seed):
    """32 steps: what a clip of 64 frames has. Changes from a half to the whole way to a new direction."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, 16), num_scenes - 1, replace=False) * 2)
    directions = rng.standard_normal((num_scenes, 256))
    for i in range(1, num_scenes):
        share = rng.uniform(0.5, 1)
        directions[i] = share * directions[i] + (1 - share) * directions[i - 1]
    features = np.repeat(directions, np.diff([0, *cuts, 32]), axis=0)
    features += 0.05 * rng.standard_normal(features.shape)
    segmentation = EventSegmenter()(features.astype(np.float32), steps_per_window=32)
    num_events = len(segmentation.scores)
    assert 8 <= num_events <= 15
    true, found = set(cuts.tolist()), set(segmentation.boundaries.tolist())
    assert len(true & found) >= 0.75 * len(true)


@pytest.mark.parametrize("noise", [0.0, 1e-2])
def test_static_clip_is_one_event(noise):
    """Noise of a hundredth is a cosine distance of 1e-4."""
    features = scenes([32], noise=noise)
    assert EventSegmenter()(features).frame_event_ids.tolist() == [0] * 32


def test_defaults_are_where_the_experiment_puts_them():
    """Boundary F1 on clips of 32 steps. What the docstring of `EventSegmenter` says about its defaults."""

    def f1(num_scenes, **parameters):
        matched = found = true = 0
        for count, seed, noise in itertools.product(num_scenes, range(20), (0.02, 0.1, 0.3, 0.5)):
            rng = np.random.default_rng([count, seed])
            lengths = 2 + rng.multinomial(32 - 2 * count, np.full(count, 1 / count))
            directions = rng.standard_normal((count, 256))
            for i in range(1, count):
                share = rng.uniform(0.3, 1)
                directions[i] = share * directions[i] + (1 - share) * directions[i - 1]
            features = np.repeat(directions, lengths, axis=0)
            features += noise * rng.standard_normal(features.shape)
            cuts = set(np.cumsum(lengths)[:-1].tolist())
            boundaries = EventSegmenter(**parameters)(features.astype(np.float32)).boundaries.tolist()
            matched, found, true = matched + len(cuts & set(boundaries)), found + len(boundaries), true + len(cuts)
        return 2 * matched / (found + true)

    busy, calm = range(8, 14), range(2, 6)
    assert f1(busy) >= 0.95
    assert f1(busy) > f1(busy, threshold_deviations=0.5) + 0.02
    assert f1(busy) < f1(busy, threshold_deviations=-0.5) < f1(busy) + 0.05
    assert f1(calm, min_events=1) > f1(calm, min_events=1, threshold_deviations=-0.5) + 0.02


def test_one_step_is_one_event():
    segmentation = EventSegmenter()(np.ones((1, 8), dtype=np.float32))
    assert segmentation.frame_event_ids.tolist() == [0]
    assert segmentation.boundaries.tolist() == []
    assert segmentation.scores.tolist() == [0]


def test_black_steps_differ_from_others_and_not_from_each_other():
    features = np.zeros((6, 4), dtype=np.float32)
    features[4:] = 1
    assert cosine_distances(features).tolist() == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_float_type_gives_the_same_events(dtype):
    features = torch.from_numpy(scenes([5, 7, 4, 16])).to(dtype)
    assert EventSegmenter(min_events=1)(features).boundaries.tolist() == [5, 12, 16]


def test_features_with_gradient_are_taken():
    features = torch.from_numpy(scenes([5, 7])).requires_grad_()
    assert EventSegmenter(min_events=1)(features).boundaries.tolist() == [5]


def test_first_and_last_step_can_be_events_of_their_own():
    assert EventSegmenter(**PLAIN)(scenes([1, 6, 1], noise=0)).boundaries.tolist() == [1, 7]


def test_threshold_is_mean_plus_deviations():
    distances = np.array([0, 0, 0.2, 0, 0.9, 0, 0.4, 0], dtype=np.float32)
    curve = distances[1:].astype(np.float64)
    for deviations in (-1.0, 0.0, 0.5, 1.5):
        found = EventSegmenter(**{**PLAIN, "threshold_deviations": deviations}).segment_distances(distances)
        expected = [step for step in (2, 4, 6) if distances[step] >= curve.mean() + deviations * curve.std()]
        assert found.boundaries.tolist() == expected


def test_prominence_leaves_out_ripples_on_a_slope():
    distances = np.array([0, 0.1, 0.5, 0.48, 0.52, 0.9, 0.1, 0.1], dtype=np.float32)
    assert EventSegmenter(**PLAIN).segment_distances(distances).boundaries.tolist() == [2, 5]
    prominent = EventSegmenter(**{**PLAIN, "prominence_deviations": 0.5})
    assert prominent.segment_distances(distances).boundaries.tolist() == [5]


def test_window_finds_slow_changes_that_neighbours_do_not_show():
    turn = np.concatenate([np.zeros(10), np.linspace(0, np.pi / 2, 8), np.full(10, np.pi / 2)])
    features = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    found = EventSegmenter(**{**PLAIN, "window_steps": 8})(features).boundaries
    assert found.tolist() == [14]


def test_smoothing_merges_a_double_peak():
    distances = np.array([0, 0, 0, 0.8, 0.2, 0.8, 0, 0, 0], dtype=np.float32)
    assert EventSegmenter(**PLAIN).segment_distances(distances).boundaries.tolist() == [3, 5]
    assert EventSegmenter(**PLAIN, smoothing_steps=3).segment_distances(distances).boundaries.tolist() == [4]


@pytest.mark.parametrize("min_event_steps", [1, 2, 3, 4])
def test_no_event_is_shorter_than_the_minimum(min_event_steps):
    distances = np.random.default_rng(3).random(200).astype(np.float32)
    segmentation = EventSegmenter(**PLAIN, min_event_steps=min_event_steps).segment_distances(distances)
    lengths = np.bincount(segmentation.frame_event_ids)
    assert len(lengths) > 10 and lengths.min() >= min_event_steps


def test_minimum_keeps_the_stronger_of_two_boundaries():
    distances = np.array([0, 0, 0, 0.5, 0, 0.9, 0, 0, 0], dtype=np.float32)
    assert EventSegmenter(**PLAIN, min_event_steps=3).segment_distances(distances).boundaries.tolist() == [5]


def test_of_equal_boundaries_too_close_the_earlier_stays():
    distances = np.array([0, 0, 0, 0.5, 0, 0.5, 0, 0, 0], dtype=np.float32)
    found = EventSegmenter(**PLAIN, min_event_steps=3).segment_distances(distances).boundaries
    assert found.tolist() == [3]


def test_a_ripple_beside_a_peak_does_not_cost_the_boundary_that_follows():
    """Step 8 is high but no peak of its own; step 10 is one, and far enough from step 5."""
    distances = np.array([0, 0, 0, 0, 0, 0.9, 0.8, 0.79, 0.8, 0.2, 0.75, 0, 0, 0, 0], dtype=np.float32)
    found = EventSegmenter(min_events=1, min_event_steps=3).segment_distances(distances)
    assert found.boundaries.tolist() == [5, 10]


def expected_boundaries(segmenter, distances, steps_per_window):
    """The definition, one step at a time."""
    half, num_steps = segmenter.smoothing_steps // 2, len(distances)
    curve = distances[1:].astype(np.float64)
    curve = np.array([curve[max(i - half, 0) : i + half + 1].mean() for i in range(num_steps - 1)])
    if num_steps == 1:
        return []
    threshold = curve.mean() + segmenter.threshold_deviations * curve.std()
    least_prominence = segmenter.prominence_deviations * curve.std()
    curve = np.concatenate([[0], curve, [0]])

    def middle_of_peak(step):
        right = step
        while right < num_steps - 1 and curve[right + 1] == curve[step]:
            right += 1
        return (step + right) // 2 if curve[step - 1] < curve[step] > curve[right + 1] else None

    def prominence(peak):
        valleys = []
        for side in (curve[: peak + 1][::-1], curve[peak:]):
            higher = np.flatnonzero(side > curve[peak])
            valleys.append(side[: higher[0] if len(higher) else None].min())
        return curve[peak] - max(valleys)

    peaks = {middle_of_peak(step) for step in range(1, num_steps)} - {None}
    peaks = [peak for peak in peaks if curve[peak] >= segmenter.min_distance]
    peaks = [p for p in peaks if segmenter.min_event_steps <= p <= num_steps - segmenter.min_event_steps]
    strong = {p for p in peaks if curve[p] >= threshold and prominence(p) >= least_prominence}
    kept = []
    for peak in sorted(peaks, key=lambda p: (p not in strong, -curve[p], p)):
        if all(abs(peak - other) >= segmenter.min_event_steps for other in kept):
            kept.append(peak)
    boundaries = []
    for window in range((num_steps - 1) // steps_per_window + 1):
        inside = [peak for peak in kept if peak // steps_per_window == window]  # in the order of `kept`
        num_strong = len(strong.intersection(inside))
        first = window == 0
        boundaries += inside[: min(max(num_strong, segmenter.min_events - first), segmenter.max_events - first)]
    return sorted(boundaries)


def test_random_curves_are_cut_as_the_definition_says():
    rng = np.random.default_rng(0)
    for _ in range(500):
        num_levels = rng.choice([3, 10, 1000])  # few: many ties and plateaus
        distances = (rng.integers(0, num_levels, rng.integers(1, 120)) / num_levels).astype(np.float32)
        distances[0] = 0
        min_events = int(rng.integers(1, 6))
        segmenter = EventSegmenter(
            smoothing_steps=int(rng.choice([1, 1, 3])),
            threshold_deviations=float(rng.choice([-1, 0, 0.5])),
            prominence_deviations=float(rng.choice([0, 0.25, 1])),
            min_event_steps=int(rng.choice([1, 2, 3, 5])),
            min_events=min_events,
            max_events=min_events + int(rng.integers(0, 8)),
        )
        steps_per_window = int(rng.choice([8, 32, 200]))
        found = segmenter.segment_distances(distances, steps_per_window=steps_per_window).boundaries
        assert found.tolist() == expected_boundaries(segmenter, distances, steps_per_window), (segmenter, distances)


def test_too_many_events_keep_the_strongest():
    distances = np.zeros(12, dtype=np.float32)
    distances[[1, 3, 5, 7, 9]] = [0.5, 0.9, 0.4, 0.8, 0.7]
    segmenter = EventSegmenter(**{**PLAIN, "max_events": 3})
    assert segmenter.segment_distances(distances).boundaries.tolist() == [3, 7]


def test_equal_peaks_keep_the_earlier():
    distances = np.zeros(12, dtype=np.float32)
    distances[[1, 3, 5, 7, 9]] = 0.5
    segmenter = EventSegmenter(**{**PLAIN, "max_events": 3})
    assert segmenter.segment_distances(distances).boundaries.tolist() == [1, 3]


def test_too_few_events_add_the_strongest_below_the_threshold():
    distances = np.zeros(12, dtype=np.float32)
    distances[[1, 3, 5, 7, 9]] = [0.05, 0.9, 0.04, 0.08, 0.0005]
    options = {"threshold_deviations": 1.0, "prominence_deviations": 0.0, "max_events": 8}
    assert EventSegmenter(**options, min_events=1).segment_distances(distances).boundaries.tolist() == [3]
    assert EventSegmenter(**options, min_events=3).segment_distances(distances).boundaries.tolist() == [3, 7]
    # What lies below `min_distance` is no change at all, however few events there are.
    assert EventSegmenter(**options, min_events=8).segment_distances(distances).boundaries.tolist() == [1, 3, 5, 7]


def test_bounds_hold_for_the_events_that_begin_in_each_window():
    rng = np.random.default_rng(0)
    distances = rng.random(32 * 20).astype(np.float32)
    distances[32 * 5 : 32 * 6] *= 0.1  # a quiet window, all of it below the threshold
    segmenter = EventSegmenter(min_events=3, max_events=6, threshold_deviations=0.5)
    segmentation = segmenter.segment_distances(distances, steps_per_window=32)
    starts = np.concatenate([[0], segmentation.boundaries])
    counts = np.bincount(starts // 32, minlength=20)
    assert counts.min() == 3 and counts.max() == 6
    assert counts[5] == 3


@pytest.mark.parametrize("window_steps", [1, 3])
@pytest.mark.parametrize("size", [64, 33])
def test_distances_are_the_same_to_the_last_bit_whatever_the_chunks_and_the_layout(monkeypatch, window_steps, size):
    features = scenes([30] * 40, noise=0.3, size=size)
    expected = cosine_distances(features, window_steps=window_steps)
    padded = torch.zeros(2, 1300, size)
    padded[1, :1200] = torch.from_numpy(features)
    for same in (padded[1, :1200], np.asfortranarray(features), features.astype(np.float64), features.copy()):
        assert np.array_equal(cosine_distances(same, window_steps=window_steps), expected)
    monkeypatch.setattr("vjepa_qwen.event_segmentation.CHUNK_STEPS", 100)
    assert np.array_equal(cosine_distances(features, window_steps=window_steps), expected)


@pytest.mark.parametrize("window_steps", [2, 3, 8])
def test_a_black_stretch_after_a_bright_one_has_no_distance(window_steps):
    """A running total would leave a rest of rounding there, and the direction of that rest is anything."""
    features = np.concatenate([scenes([20]) * 1e3, np.zeros((30, 64), dtype=np.float32)])
    distances = cosine_distances(features, window_steps=window_steps)
    assert distances[20 + window_steps :].tolist() == [0] * (30 - window_steps)


def test_error_on_long_ids_is_short():
    with pytest.raises(ValueError, match="of video 0 ") as error:
        count_events(np.ones((1, 100_000), dtype=np.int64))
    assert len(str(error.value)) < 300


def test_known_distances_give_the_same_events_as_features():
    features = scenes([5, 7, 4, 16], noise=0.3)
    segmenter = EventSegmenter()
    first = segmenter(features, steps_per_window=16)
    again = segmenter.segment_distances(first.distances, steps_per_window=16)
    assert np.array_equal(first.frame_event_ids, again.frame_event_ids)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_events": 0}, r"max_events \(0\) must be a whole number of at least 1"),
        ({"window_steps": 1.5}, r"window_steps \(1.5\) must be a whole number"),
        ({"min_event_steps": True}, r"min_event_steps \(True\) must be a whole number"),
        ({"smoothing_steps": 2}, r"smoothing_steps \(2\) must be odd.*try 3"),
        ({"min_events": 20}, r"max_events \(15\) must be >= min_events \(20\); set both"),
        ({"threshold_deviations": float("nan")}, r"threshold_deviations \(nan\) must be a finite number$"),
        ({"threshold_deviations": "high"}, r"threshold_deviations \('high'\) must be a finite number$"),
        ({"prominence_deviations": -1.0}, r"prominence_deviations \(-1.0\) must be a finite number of at least 0"),
        ({"min_distance": -0.1}, r"min_distance \(-0.1\) must be a finite number of at least 0"),
    ],
)
def test_bad_parameters_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        EventSegmenter(**parameters)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((0, 8)), r"features \(shape \(0, 8\)\) must have shape \(num_steps, hidden\), not empty"),
        (np.zeros(8), r"features \(shape \(8,\)\) must have shape"),
        (torch.zeros(2, 3, 8), r"features \(shape \(2, 3, 8\)\) must have shape"),
        (np.array([[1.0, 2], [np.nan, 1]]), "near step 1 must be finite numbers"),
        (torch.tensor([[1.0, float("inf")], [1, 2]]), "near step 0 must be finite numbers"),
    ],
)
def test_bad_features_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        EventSegmenter()(features)


@pytest.mark.parametrize("distances", [[], [[0.0, 1.0]], [0.0, float("nan")]])
def test_bad_distances_are_refused(distances):
    with pytest.raises(ValueError, match=r"distances \(shape .* must be finite, of shape \(num_steps,\), not empty"):
        EventSegmenter().segment_distances(distances)


def test_events_are_counted_per_video():
    event_ids = [[0, 0, 1, 2], [0, 0, 0, 0], [0, 1, -1, -1]]
    assert count_events(np.array(event_ids)) == count_events(torch.tensor(event_ids)) == [3, 1, 2]


@pytest.mark.parametrize(
    "event_ids",
    [[1, 1, 2, 2], [0, 2, 2, 2], [0, 1, 0, 1], [0, -1, 1, 1], [-1, -1, -1, -1], [0, 0, -2, -2]],
    ids=["not from 0", "empty event", "falls", "padding inside", "nothing", "other negative"],
)
def test_bad_event_ids_name_the_video(event_ids):
    with pytest.raises(ValueError, match="frame_event_ids of video 1 "):
        count_events(torch.tensor([[0, 0, 1, 1], event_ids]))


def test_event_ids_of_another_type_or_shape_are_refused():
    with pytest.raises(ValueError, match="must be integers of shape"):
        count_events(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must be integers of shape"):
        count_events(torch.zeros(3, dtype=torch.int64))
