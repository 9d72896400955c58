"""The benchmarks in small: what they compare is right. Their figures are no matter of tests."""

import json

import numpy as np
from transformers.video_utils import VideoMetadata

from vjepa_qwen.benchmarks import cuts, segmentation, tokens


def test_the_plain_loop_computes_the_same_curve(tmp_path):
    features = segmentation.make_features(200)
    expected = segmentation.cosine_distances(features)
    np.testing.assert_allclose(segmentation.loop_distances(features), expected, atol=1e-5)
    output = tmp_path / "segmentation.json"
    segmentation.main(["--steps", "200", "--rounds", "2", "--output", str(output)])
    cases = json.loads(output.read_text())["cases"]
    assert all(len(runs) == 2 for contenders in cases.values() for runs in contenders.values())


def test_counts_of_qwens_tokens_are_those_of_its_video_processor():
    size, num_frames, fps = {"longest_edge": 64 * 64 * 8, "shortest_edge": 4096}, 60, tokens.FRAMES_PER_SECOND
    video_processor = tokens.Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    frames = np.zeros((num_frames, 120, 160, 3), dtype=np.uint8)
    metadata = VideoMetadata(total_num_frames=num_frames, fps=fps)
    grid = video_processor(frames, video_metadata=[metadata], return_tensors="pt").video_grid_thw
    num_visual, num_tokens = tokens.count_qwen(num_frames // fps, 120, 160, size=size, cap_pixels_per_frame=False)
    assert num_visual == int(grid.prod()) // 4
    # "<0.3 seconds>" and two markers for each pair of frames
    assert num_tokens >= num_visual + 5 * int(grid[0, 0])


def test_a_token_for_each_event_of_each_window():
    assert [tokens.count_ours(seconds) for seconds in (1, 64, 65, 600)] == [15, 15, 30, 150]


def test_splices_have_the_cuts_that_they_say(tmp_path):
    clip = cuts.make_splices(tmp_path, 1)[0]
    frames = np.stack(cuts._read(clip.path)).astype(float)
    assert len(frames) == round(clip.duration_seconds * cuts.SPLICE_FPS)
    differences = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    starts = {round(seconds * cuts.SPLICE_FPS) for seconds in clip.cut_seconds}
    assert starts and starts <= set(np.argsort(differences)[::-1][: 2 * len(starts)] + 1)
    assert all(0 <= seconds < clip.duration_seconds for seconds in cuts.find_ours(clip.path))
