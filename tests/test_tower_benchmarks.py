"""The benchmarks of the tower, of long videos and of a GPU, in sizes that a CPU does in seconds."""

import json
import math

import av
import numpy as np
import pytest

from vjepa_qwen.benchmarks import gpu, long_video, tower


def test_gpu_benchmark_measures_every_part(tmp_path):
    results = gpu.main(["--tiny", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path)])
    parts = {result.part for result in results}
    assert parts == {"peak", "tower", "prefill", "prefill and generation", "training step"}
    assert all(math.isfinite(result.milliseconds) and result.milliseconds > 0 for result in results)
    document = json.loads((tmp_path / "gpu_CPU.json").read_text())
    assert document["tiny"] and len(document["measurements"]) == len(results)


def test_full_size_is_refused_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "a GPU is needed" in capsys.readouterr().err


def test_long_videos_are_the_loop_again_and_again(tmp_path):
    loop, path = str(tmp_path / "loop.mp4"), str(tmp_path / "long.mp4")
    long_video.write_loop(loop)
    long_video.repeat(loop, path, 30)
    with av.open(path) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    assert len(times) == 30 * long_video.FRAMES_PER_SECOND
    assert np.allclose(np.diff(times), 1 / long_video.FRAMES_PER_SECOND, atol=1e-3)


def test_all_towers_of_the_benchmark_have_the_same_weights(tmp_path):
    for name in ("ours, float32", "ours, bfloat16", tower.REFERENCE):
        tower.make_model.cache_clear()
        tower.encode(name, 4, 1, str(tmp_path))  # warms up, as in a fresh process
        tower.encode(name, 4, 1, str(tmp_path))
        assert np.load(tmp_path / f"{name}.npy").shape == (2, 1024)
    expected, exact, rounded = (
        np.load(tmp_path / f"{name}.npy") for name in (tower.REFERENCE, "ours, float32", "ours, bfloat16")
    )
    np.testing.assert_allclose(exact, expected, atol=1e-4)
    assert 0 < np.linalg.norm(rounded - expected) < 0.02 * np.linalg.norm(expected)


def test_equal_boundaries_are_counted():
    counts = tower.count_equal_boundaries(2)
    assert all(count["float32"] == 2 for count in counts.values())
    assert all(0 <= value <= 2 for count in counts.values() for value in count.values())
