"""Streaming: decoding ahead of the tower, in bounds; many videos in order; bad files, interruption, dtypes."""

import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import VISION_CONFIG, make_model
from transformers import VJEPA2Config
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vjepa_qwen.video_encoding
from vjepa_qwen import VideoDecodingError, VJepaQwenProcessor
from vjepa_qwen.video_encoding import encode_videos
from vjepa_qwen.vision_tower_access import load_vision_tower

FRAMES = 16
# The tokens of a window are few: so many windows go through the tower at once.
WINDOWS_PER_BATCH = vjepa_qwen.video_encoding.CPU_TOKENS // (8 * 4)
PATIENCE_SECONDS = 60  # of a test that would otherwise wait for ever


@pytest.fixture
def bound(processor, model):
    return processor.bind(model)


@pytest.fixture(params=[1, 3, 64], ids=lambda count: f"{count}-cores")
def any_number_of_cores(monkeypatch, request):
    monkeypatch.setattr("os.cpu_count", lambda: request.param)


class Tower(torch.nn.Module):
    """Stands in for the real one; its features are the first pixels."""

    def __init__(self):
        super().__init__()
        self.config, self.device = VJEPA2Config(**VISION_CONFIG), torch.device("cpu")
        self.num_encoded = 0

    def forward(self, windows):
        self.num_encoded += len(windows)
        return BaseModelOutputWithPooling(pooler_output=windows[:, ::2, 0, 0, :2])


@dataclass
class Video:
    """Stands in for a `SampledVideo` of so many windows; counts what has been decoded and whether it was closed."""

    num_windows: int
    num_decoded: int = 0
    is_closed: bool = False
    frames_per_window: int = FRAMES

    @property
    def num_frames(self):
        return self.num_windows * FRAMES

    def windows(self):
        try:
            for number in range(self.num_windows):
                self.num_decoded += 1
                yield torch.full((FRAMES, 3, 32, 32), float(number))
        finally:
            self.is_closed = True


def test_the_next_windows_are_decoded_while_these_are_encoded():
    """The tower waits for the decoder to go on: without overlap it would wait in vain."""
    went_on = [threading.Event() for _ in range(4)]

    class WatchedVideo(Video):
        def windows(self):
            for number, window in enumerate(super().windows()):
                if number % WINDOWS_PER_BATCH == 0:
                    went_on[number // WINDOWS_PER_BATCH].set()
                yield window

    class WaitingTower(Tower):
        def forward(self, windows):
            batch = self.num_encoded // WINDOWS_PER_BATCH
            assert went_on[min(batch + 1, 3)].wait(PATIENCE_SECONDS)
            return super().forward(windows)

    (video,) = encode_videos(WaitingTower(), [lambda: WatchedVideo(4 * WINDOWS_PER_BATCH)])
    assert torch.equal(video.frame_features[::8, 0], torch.arange(4.0 * WINDOWS_PER_BATCH))


def test_no_more_than_two_batches_of_a_video_are_in_memory():
    video = Video(10 * WINDOWS_PER_BATCH)
    ahead = []

    class CountingTower(Tower):
        def forward(self, windows):
            ahead.append(video.num_decoded - self.num_encoded)
            return super().forward(windows)

    list(encode_videos(CountingTower(), [lambda: video]))
    assert len(ahead) == 10
    assert max(ahead) <= 2 * WINDOWS_PER_BATCH


def test_no_more_videos_are_open_than_there_are_cores(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    videos = [Video(1) for _ in range(9)]
    for index, _ in enumerate(encode_videos(Tower(), [lambda video=video: video for video in videos])):
        assert sum(video.num_decoded for video in videos) <= index + 3


def test_progress_counts_windows():
    reports = []
    videos = [lambda: Video(2 * WINDOWS_PER_BATCH + 1), lambda: Video(1)]
    list(encode_videos(Tower(), videos, on_window=lambda *report: reports.append(report)))
    total = 2 * WINDOWS_PER_BATCH + 1
    assert reports == [(0, WINDOWS_PER_BATCH, total), (0, total - 1, total), (0, total, total), (1, 1, 1)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=["Ctrl-C", "out of memory"])
def test_what_ends_the_tower_ends_everything_and_leaves_it_as_it_was(monkeypatch, error):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    videos = [Video(5 * WINDOWS_PER_BATCH) for _ in range(6)]

    class FailingTower(Tower):
        def forward(self, windows):
            assert not self.training
            if self.num_encoded:
                raise error
            return super().forward(windows)

    tower = FailingTower().train()
    threads = threading.active_count()
    with pytest.raises(error):
        list(encode_videos(tower, [lambda video=video: video for video in videos]))
    assert threading.active_count() == threads
    assert all(video.is_closed for video in videos[:4])
    assert [video.num_decoded for video in videos[4:]] == [0, 0]
    assert tower.training


def test_an_iterator_that_is_left_closes_its_files():
    videos = [Video(3 * WINDOWS_PER_BATCH), Video(3 * WINDOWS_PER_BATCH)]
    iterator = encode_videos(Tower(), [lambda video=video: video for video in videos])
    next(iterator)
    assert torch.is_grad_enabled()
    threads = threading.active_count()
    iterator.close()
    assert threading.active_count() <= threads
    assert videos[0].is_closed
    assert videos[1].is_closed or videos[1].num_decoded == 0


def test_windows_of_one_video_in_one_pass_are_as_one_by_one(bound, model, clips):
    sampled = bound.video_processor.sample(clips[2], num_frames=5 * FRAMES)
    with torch.no_grad():
        alone = torch.cat([model.model.vision_tower(window[None]).pooler_output[0] for window in sampled.windows()])
    video = bound.segment(clips[2], num_frames=5 * FRAMES)[0]
    torch.testing.assert_close(video.frame_features, alone, atol=1e-5, rtol=1e-5)
    assert np.array_equal(bound._segment_features(alone).boundaries, video.boundaries)


def test_many_videos_are_in_order_and_each_as_alone(bound, clips, any_number_of_cores):
    videos = [clips[i % 3] for i in range(10)]
    for num_frames in (None, 4 * FRAMES):
        alone = {clip: bound.segment(clip, num_frames=num_frames)[0] for clip in clips}
        together = bound.segment(videos, num_frames=num_frames)
        assert len(together) == len(videos)
        for clip, video in zip(videos, together, strict=True):
            assert video.events == alone[clip].events
            assert torch.equal(video.frame_features, alone[clip].frame_features)


def test_a_bad_file_costs_only_itself(bound, clips, tmp_path, any_number_of_cores):
    bad = [tmp_path / "missing.mp4", tmp_path / "empty.mp4"]
    bad[1].touch()
    videos = [clips[0], bad[0], bad[1], clips[1], clips[2]]
    results = bound.segment(videos, return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["VideoEvents"] + ["VideoDecodingError"] * 2 + [
        "VideoEvents"
    ] * 2
    assert results[3].events == bound.segment(clips[1])[0].events
    assert all(str(path) in str(results[index]) for index, path in zip((1, 2), bad, strict=True))
    with pytest.raises(VideoDecodingError, match="missing.mp4"):
        bound.segment(videos)
    iterator = bound.iter_segment(videos)
    assert next(iterator).events == results[0].events
    with pytest.raises(VideoDecodingError, match="missing.mp4"):
        next(iterator)


def test_nothing_to_do_is_nothing(bound):
    assert bound.segment([]) == []


def test_a_part_of_a_video_keeps_the_times_of_the_whole(bound, clips):
    """Four scenes of a second each: the middle two."""
    video = bound.segment(clips[2], start_seconds=1.0, end_seconds=3.0)[0]
    assert 1.0 <= video.timestamps[0] and video.timestamps[-1] < 3.0
    assert (video.events[0].start_seconds, video.events[-1].end_seconds) == (1.0, 3.0)
    assert video.duration_seconds == pytest.approx(4.0)
    to_the_end = bound.segment(clips[2], start_seconds=2.5, end_seconds=100.0)[0]
    assert (to_the_end.events[0].start_seconds, to_the_end.events[-1].end_seconds) == (2.5, pytest.approx(4.0))
    inputs = bound(videos=clips[2], start_seconds=1.0, end_seconds=3.0)
    assert torch.equal(inputs["frame_features"][0], video.frame_features)
    with pytest.raises(ValueError, match=r"start_seconds \(5\)"):
        bound.segment(clips[2], start_seconds=5)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_the_processors_own_tower_computes_as_it_was_saved_where_the_hardware_can(
    tokenizer, processor, tmp_path, monkeypatch, saved, has_bfloat16
):
    monkeypatch.setattr("vjepa_qwen.vision_tower_access._has_bfloat16", lambda device: has_bfloat16)
    make_model(tokenizer).to(saved).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_vision_tower(tmp_path, {}).dtype == (saved if has_bfloat16 else torch.float32)
    asked = VJepaQwenProcessor.from_pretrained(tmp_path, dtype="bfloat16")
    assert asked._get_vision_tower().dtype == torch.bfloat16
