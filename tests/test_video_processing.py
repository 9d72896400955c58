"""The video processor: which frames are chosen, what the tower gets, and every form in which videos arrive."""

import json

import numpy as np
import pytest
import torch
from clips import draw_frame, read_number, write_audio, write_clip
from PIL import Image
from transformers import AutoVideoProcessor, VJEPA2VideoProcessor
from transformers.video_utils import VideoMetadata

from vjepa_qwen import VideoDecodingError, VJepaQwenVideoProcessor
from vjepa_qwen.video_decoding import VideoDecoder, decode

CROP_FRACTION = 224 / 256


@pytest.fixture
def video_processor():
    """A small tower's: 64 pixels, windows of 8 frames."""
    return VJepaQwenVideoProcessor(crop_size=64, frames_per_clip=8, max_window_seconds=1.0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """30 numbered frames in one second."""
    return str(write_clip(tmp_path_factory.mktemp("processing") / "clip.mp4", num_frames=30))


def frames_of_clip(num_frames=30, height=90, width=160):
    return np.stack([draw_frame(number, height, width) for number in range(num_frames)])


def numbers(pixel_values):
    """Frame numbers of a normalised (num_frames, 3, height, width) tensor."""
    return [read_number(frame, CROP_FRACTION) for frame in pixel_values]


# Which frames


def test_frames_are_those_in_the_middle_of_equal_spans(video_processor, clip):
    """Frame i of n is the one on show at (i + 0.5) / n of the video, with its own time."""
    sampled = video_processor.sample(clip)
    expected = [int((index + 0.5) * 30 / 8) for index in range(8)]
    assert sampled.metadata.frames_indices == expected
    np.testing.assert_allclose(sampled.timestamps, np.array(expected) / 30, atol=1e-9)
    assert sampled.timestamps.dtype == np.float64
    assert sampled.duration_seconds == pytest.approx(1.0)
    assert numbers(torch.cat(list(sampled.windows()))) == expected


def test_a_frame_that_begins_at_a_target_counts_as_shown(video_processor, clip):
    """Where targets fall exactly on the times of frames, rounding does not decide: it is always the later frame."""
    video_processor.frames_per_clip = 30
    sampled = video_processor.sample(clip, num_frames=10)
    assert sampled.metadata.frames_indices == [1, 4, 7, 10, 13, 16, 19, 22, 25, 28]
    video_processor.frames_per_clip = 64
    for num_frames in (2, 6, 10, 14, 18, 30):
        frames = np.zeros((num_frames * 2, 8, 8, 3), dtype=np.uint8)
        for fps in (1, 24, 29.97, 30):
            sampled = video_processor.sample(frames, num_frames=num_frames, video_metadata={"fps": fps})
            assert sampled.metadata.frames_indices == list(range(1, num_frames * 2, 2))


def test_variable_frame_rate_is_sampled_by_time(video_processor, tmp_path):
    """A frame that is on show for most of the clip fills most of the window."""
    milliseconds = [0, 10, 20, 30, 900]
    path = write_clip(tmp_path / "vfr.mkv", num_frames=5, frame_milliseconds=milliseconds)
    sampled = video_processor.sample(path)
    assert sampled.metadata.frames_indices.count(3) >= 6
    assert set(sampled.timestamps) <= {0.0, 0.03, 0.9}
    assert numbers(torch.cat(list(sampled.windows()))) == sampled.metadata.frames_indices


def test_windows_follow_the_length_of_the_video(video_processor, tmp_path):
    """One window for each `max_window_seconds` that the video begins, decoded one by one and again when asked."""
    path = write_clip(tmp_path / "long.mp4", num_frames=75)  # 2.5 seconds
    sampled = video_processor.sample(path)
    assert sampled.num_frames == 24
    windows = sampled.windows()
    first = next(windows)
    assert first.shape == (8, 3, 64, 64) and first.dtype == torch.float32
    rest = list(windows)
    assert [len(window) for window in rest] == [8, 8]
    assert numbers(torch.cat([first, *rest])) == [int((index + 0.5) * 75 / 24) for index in range(24)]
    assert torch.equal(torch.cat(list(sampled.windows())), torch.cat([first, *rest]))
    assert video_processor.sample(write_clip(tmp_path / "one.mp4", num_frames=30)).num_frames == 8


def test_a_window_is_decoded_when_it_is_asked_for(video_processor, tmp_path, monkeypatch):
    """Choosing frames decodes nothing, and the first window only what threads may be ahead: not the whole file."""
    decoded = []

    def count(packets, stream):
        for frame in decode(packets, stream):
            decoded.append(frame.pts)
            yield frame

    path = write_clip(tmp_path / "long.mp4", num_frames=600)
    sampled = video_processor.sample(path)
    monkeypatch.setattr("vjepa_qwen.video_decoding.MAX_READERS", 2)
    monkeypatch.setattr("vjepa_qwen.video_decoding.MAX_FRAMES_AHEAD", 4)
    monkeypatch.setattr("vjepa_qwen.video_decoding.decode", count)
    windows = sampled.windows()
    assert decoded == []
    next(windows)
    windows.close()
    assert 0 < len(decoded) < 150


def test_a_part_of_a_video_is_sampled_alone(video_processor, tmp_path):
    """Frames are chosen as of a video that is only that part; times stay the file's."""
    path = write_clip(tmp_path / "long.mp4", num_frames=120)  # 4 seconds
    sampled = video_processor.sample(path, start_seconds=1.0, end_seconds=3.0)
    expected = [int(30 + (index + 0.5) * 60 / 16) for index in range(16)]
    assert sampled.metadata.frames_indices == expected
    np.testing.assert_allclose(sampled.timestamps, np.array(expected) / 30, atol=1e-9)
    assert sampled.duration_seconds == pytest.approx(4.0)
    assert numbers(torch.cat(list(sampled.windows()))) == expected
    assert video_processor.sample(path, start_seconds=3.5).num_frames == 8
    assert video_processor.sample(path, end_seconds=2.0).metadata.frames_indices[-1] < 60
    beyond = video_processor.sample(path, start_seconds=3.0, end_seconds=99.0)
    assert beyond.metadata.frames_indices == video_processor.sample(path, start_seconds=3.0).metadata.frames_indices
    frames = frames_of_clip(120)
    of_array = video_processor.sample(frames, video_metadata={"fps": 30}, start_seconds=1.0, end_seconds=3.0)
    assert of_array.metadata.frames_indices == expected
    batch = video_processor([path, path], num_frames=8, start_seconds=1.0, end_seconds=2.0)
    assert numbers(batch.pixel_values_videos[1]) == [int(30 + (index + 0.5) * 30 / 8) for index in range(8)]
    whole = video_processor.sample(path, start_seconds=1.0, end_seconds=1.0 + 16 / 30, do_sample_frames=False)
    assert whole.metadata.frames_indices == list(range(30, 46))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"start_seconds": 1.0}, r"start_seconds \(1.0\) must be at least 0 and before the end .* 1.000 seconds"),
        ({"start_seconds": -0.1}, r"start_seconds \(-0.1\) must be at least 0"),
        ({"start_seconds": float("nan")}, r"start_seconds \(nan\) must be"),
        (
            {"start_seconds": 0.5, "end_seconds": 0.5},
            r"end_seconds \(0.5\) must be greater than start_seconds \(0.5\)",
        ),
        ({"end_seconds": 0}, r"end_seconds \(0\) must be greater than start_seconds \(0.0\)"),
    ],
)
def test_parts_that_do_not_exist_are_refused(video_processor, clip, part, message):
    """The error names the value and the length of the video."""
    with pytest.raises(ValueError, match=message):
        video_processor.sample(clip, **part)


@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_short_clips_repeat_frames(video_processor, tmp_path, num_frames):
    """A clip with fewer frames than a window fills the window, in order."""
    path = write_clip(tmp_path / "short.mp4", num_frames=num_frames)
    sampled = video_processor.sample(path)
    assert sampled.metadata.frames_indices == [int((index + 0.5) * num_frames / 8) for index in range(8)]
    assert numbers(next(sampled.windows())) == sampled.metadata.frames_indices


@pytest.mark.parametrize(
    ("fps", "expected"), [(1, 2), (2, 2), (3, 4), (7.5, 8), (8, 8), (8.1, 16), (16, 16), (30, 32), (0.1, 2)]
)
def test_fps_is_at_least_what_is_asked(video_processor, clip, fps, expected):
    """Rounded up to whole temporal steps within a window, and to whole windows beyond."""
    assert video_processor.sample(clip, fps=fps).num_frames == expected


@pytest.mark.parametrize("num_frames", [2, 4, 8, 16, 64])
def test_num_frames_is_exact(video_processor, clip, num_frames):
    """As many frames as asked for, in windows of at most `frames_per_clip`."""
    sampled = video_processor.sample(clip, num_frames=num_frames)
    windows = list(sampled.windows())
    assert sampled.num_frames == len(sampled.timestamps) == sum(map(len, windows)) == num_frames
    assert all(len(window) == min(num_frames, 8) for window in windows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 3}, r"num_frames \(3\) must be a multiple of 2 .* try 2 or 4"),
        ({"num_frames": 1}, r"num_frames \(1\) must be .* try 2$"),
        ({"num_frames": 0}, r"num_frames \(0\) must be .* try 2$"),
        ({"num_frames": 12}, r"num_frames \(12\) must be .* a multiple of 8 beyond; try 8 or 16"),
        ({"num_frames": 8, "fps": 2}, r"num_frames \(8\) and fps \(2\) must not be given together"),
        ({"fps": 0}, r"fps \(0\) must be greater than 0"),
        ({"fps": float("nan")}, r"fps \(nan\) must be greater than 0"),
        ({"do_sample_frames": False}, r"number of frames of a video.* \(30\) must be .* try 24 or 32"),
    ],
)
def test_numbers_that_make_no_windows_are_refused(video_processor, clip, arguments, message):
    """The error names the value, the rule and the nearest values that work."""
    with pytest.raises(ValueError, match=message):
        video_processor.sample(clip, **arguments)


def test_all_frames_can_be_taken_as_they_are(video_processor, clip):
    """`do_sample_frames=False` keeps frames that somebody else has chosen."""
    frames = frames_of_clip(16)
    sampled = video_processor.sample(frames, do_sample_frames=False, video_metadata={"fps": 4})
    assert sampled.metadata.frames_indices == list(range(16))
    np.testing.assert_allclose(sampled.timestamps, np.arange(16) / 4)
    assert numbers(torch.cat(list(sampled.windows()))) == list(range(16))


# Pixels


@pytest.mark.parametrize("pixel_format", ["bgr0", "yuv420p"])
@pytest.mark.parametrize(("height", "width"), [(240, 320), (320, 240), (181, 301), (40, 50), (1080, 1920)])
def test_resizing_while_decoding_is_resizing_afterwards(tmp_path, height, width, pixel_format):
    """libswscale while decoding against torchvision on whole frames: the same geometry and nearly the same levels.

    RGB: within a tenth of a level on average. Video with subsampled chroma: within one level, and most at the edges of
    colours, because chroma is resized once in the one case and twice in the other.
    """
    video_processor = VJepaQwenVideoProcessor(do_rescale=False, do_normalize=False)
    path = write_clip(
        tmp_path / "x.mkv", num_frames=2, height=height, width=width, codec="ffv1", pixel_format=pixel_format
    )
    decoded = video_processor(path, num_frames=2).pixel_values_videos
    frames = np.stack(list(VideoDecoder(path).frames([0, 1])))
    resized = video_processor(frames, num_frames=2, video_metadata={"fps": 30}).pixel_values_videos
    assert decoded.shape == (1, 2, 3, 256, 256)
    difference = (decoded - resized).abs()
    assert difference.mean() <= (0.1 if pixel_format == "bgr0" else 1.0)
    assert difference.quantile(0.99) <= (2 if pixel_format == "bgr0" else 10)


def test_preprocessing_is_that_of_v_jepa_2(clip):
    """The same numbers as transformers' own video processor on the same frames."""
    frames = frames_of_clip(8, 270, 480)
    expected = VJEPA2VideoProcessor()(frames, return_tensors="pt").pixel_values_videos
    video_processor = VJepaQwenVideoProcessor()
    actual = video_processor(frames, do_sample_frames=False, video_metadata={"fps": 8}).pixel_values_videos
    assert actual.shape == expected.shape == (1, 8, 3, 256, 256)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert video_processor.size == VJEPA2VideoProcessor().size


def test_every_step_of_preprocessing_can_be_left_out(video_processor, clip):
    """Also for one call only: size, crop, scaling and normalising obey their arguments."""
    raw = video_processor(clip, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    assert raw.pixel_values_videos.shape == (1, 8, 3, 90, 160)
    assert raw.pixel_values_videos.dtype == torch.float32
    assert raw.pixel_values_videos.max() > 200
    scaled = video_processor(clip, do_normalize=False).pixel_values_videos
    assert 0 <= scaled.min() and 0.9 < scaled.max() <= 1
    assert video_processor(clip, size={"height": 40, "width": 50}, do_center_crop=False).pixel_values_videos.shape == (
        1, 8, 3, 40, 50,
    )  # fmt: skip
    assert video_processor(clip, size=100, crop_size=32).pixel_values_videos.shape == (1, 8, 3, 32, 32)
    assert video_processor(clip).pixel_values_videos.shape == (1, 8, 3, 64, 64)


# Forms of input


def test_frames_in_every_form_are_the_same_video(video_processor):
    """Arrays and tensors in either layout, lists of arrays, of tensors and of images, and floats."""
    frames = frames_of_clip(16)
    channels_first = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
    read_only = frames.copy()
    read_only.flags.writeable = False
    forms = {
        "numpy": frames,
        "channels first": channels_first,
        "read-only": read_only,
        "reversed view": frames[::-1].copy()[::-1],
        "torch": torch.from_numpy(frames),
        "torch channels first": torch.from_numpy(channels_first),
        "int64": frames.astype(np.int64),
        "float in 0..255": frames.astype(np.float64),
        "float in 0..1": frames.astype(np.float32) / 255,
        "list of arrays": list(frames),
        "tuple of tensors": tuple(torch.from_numpy(channels_first)),
        "list of images": [Image.fromarray(frame) for frame in frames],
        "with alpha": np.concatenate([frames, np.full_like(frames[..., :1], 255)], axis=-1),
    }
    expected = None
    for name, form in forms.items():
        pixel_values = video_processor(form, video_metadata={"fps": 16}).pixel_values_videos
        expected = pixel_values if expected is None else expected
        assert numbers(pixel_values[0]) == list(range(1, 16, 2)), name
        # Floats are not rounded to levels after resizing.
        torch.testing.assert_close(pixel_values, expected, rtol=0, atol=0.03 if "float" in name else 1e-6, msg=name)


def test_gray_frames_and_single_images(video_processor):
    """Frames without colour get three equal channels; one image is a video of one frame."""
    gray = frames_of_clip(8).mean(axis=-1).astype(np.uint8)
    for form in (list(gray), gray[..., None], [Image.fromarray(frame) for frame in gray]):
        pixel_values = video_processor(form, do_normalize=False, video_metadata={"fps": 8}).pixel_values_videos
        assert torch.equal(pixel_values[:, :, 0], pixel_values[:, :, 2])
        assert numbers(pixel_values[0]) == list(range(8))
    single = draw_frame(5, 90, 160)
    for form in (single, Image.fromarray(single), [Image.fromarray(single)]):
        assert numbers(video_processor(form, video_metadata={"fps": 8}).pixel_values_videos[0]) == [5] * 8


def test_files_in_every_form_are_the_same_video(video_processor, clip, tmp_path):
    """Path, URL, bytes, file object and a path object, alone and in nested lists, as prompts give them."""
    expected = video_processor(clip).pixel_values_videos
    with open(clip, "rb") as file:
        contents = file.read()
        for form in (f"file://{clip}", contents, file, tmp_path.joinpath(clip), [clip], [[clip]], ([], [clip])):
            assert torch.equal(video_processor(form).pixel_values_videos, expected)


def test_a_batch_is_its_videos_one_by_one(video_processor, clip, tmp_path):
    """Files, arrays and lists of images of different sizes in one call, each as if alone."""
    portrait = write_clip(tmp_path / "portrait.mp4", num_frames=12, height=150, width=100)
    frames = frames_of_clip(10)
    images = [Image.fromarray(frame) for frame in frames_of_clip(6, 64, 80)]
    videos = [clip, frames, images, str(portrait)]
    metadata = [None, {"fps": 10}, VideoMetadata(total_num_frames=6, fps=6.0), None]
    batch = video_processor(videos, video_metadata=metadata, return_metadata=True)
    assert batch.pixel_values_videos.shape == (4, 8, 3, 64, 64)
    for index, (video, one_metadata) in enumerate(zip(videos, metadata, strict=True)):
        alone = video_processor(video, video_metadata=one_metadata)
        assert torch.equal(alone.pixel_values_videos[0], batch.pixel_values_videos[index])
    assert [metadata.total_num_frames for metadata in batch["video_metadata"]] == [30, 10, 6, 12]
    assert [(metadata.height, metadata.width) for metadata in batch["video_metadata"]][-1] == (150, 100)
    five_dimensions = np.stack([frames, frames[::-1]])
    assert video_processor(five_dimensions, video_metadata={"fps": 10}).pixel_values_videos.shape[0] == 2


def test_videos_of_different_length_are_no_tensor(video_processor, clip, tmp_path):
    """A clear error, and a list where that is asked for."""
    videos = [clip, str(write_clip(tmp_path / "long.mp4", num_frames=60))]
    with pytest.raises(ValueError, match=r"videos \(\[8, 16\] frames\) must have the same number of frames"):
        video_processor(videos)
    listed = video_processor(videos, return_tensors=None).pixel_values_videos
    assert [video.shape[0] for video in listed] == [8, 16]
    assert video_processor(videos, num_frames=4, return_tensors="np").pixel_values_videos.shape == (2, 4, 3, 64, 64)


def test_times_of_frames_come_from_the_metadata(video_processor, monkeypatch):
    """fps, indices of frames already chosen, explicit times; and the assumption where there is nothing."""
    warnings = []
    monkeypatch.setattr("vjepa_qwen.video_arrays.logger.warning_once", warnings.append)
    frames = frames_of_clip(8)

    def sample(**metadata):
        sampled = video_processor.sample(frames, num_frames=8, video_metadata=metadata or None)
        return sampled.timestamps.tolist(), sampled.duration_seconds

    assert sample(fps=2) == ([index / 2 for index in range(8)], 4.0)
    assert sample(duration=16.0) == ([index * 2.0 for index in range(8)], 16.0)
    indices = [4, 12, 20, 28, 36, 44, 52, 60]
    assert sample(fps=16, frames_indices=indices, total_num_frames=64) == ([index / 16 for index in indices], 4.0)
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 7.0]
    assert sample(timestamps=times, duration=8.0) == ([0.5, *[0.6] * 6, 7.0], 8.0)
    assert warnings == []
    assert sample() == ([index / 24 for index in range(8)], pytest.approx(8 / 24))
    assert len(warnings) == 1 and "24 frames per second" in warnings[0] and 'video_metadata={"fps"' in warnings[0]


@pytest.mark.parametrize(
    ("video", "metadata", "message"),
    [
        (np.zeros((4, 7, 8, 9), np.uint8), None, r"video \(shape \(4, 7, 8, 9\)\) must be .*channels"),
        (np.zeros(9), None, r"video \(shape \(9,\)\) must be"),
        (np.zeros((0, 8, 8, 3), np.uint8), None, "must have at least one frame"),
        (np.full((4, 8, 8, 3), -1.0), None, r"video \(values -1 to -1\) must be in 0..255"),
        (np.full((4, 8, 8, 3), np.nan), None, "must be in 0..255"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], None, "must have one shape"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"fps": 0}, r"fps of video_metadata \(0\) must be greater than 0"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"timestamps": [0, 1]}, "must have one entry for each of the 4 frames"),
        (np.zeros((4, 8, 8, 3), np.uint8), {"timestamps": [0, 2, 1, 3]}, "must be in ascending order"),
        ([], None, "must hold at least one video"),
        ({"a": 1}, None, r"source \(dict\) must be a path"),
    ],
)
def test_what_is_no_video_is_refused(video_processor, video, metadata, message):
    """The error names the value and the rule."""
    with pytest.raises(ValueError, match=message):
        video_processor(video, video_metadata=metadata)


def test_unreadable_files_are_named(video_processor, clip, tmp_path):
    """Also in a batch."""
    sound = write_audio(tmp_path / "sound.wav")
    with pytest.raises(VideoDecodingError, match=f"^{sound}: has no video stream"):
        video_processor([clip, str(sound)])
    with pytest.raises(VideoDecodingError, match="^missing.mp4: no such file$"):
        video_processor("missing.mp4")


def test_metadata_must_fit_the_videos(video_processor, clip):
    """One entry for each video, or one for all."""
    with pytest.raises(ValueError, match=r"video_metadata \(3 entries\) must have one entry for each of the 2 videos"):
        video_processor([clip, clip], video_metadata=[None, None, None])


# Saving and loading


def test_everything_is_saved_and_loaded(tmp_path):
    """The size follows the crop unless it is given; either way it round trips, and nothing else is lost."""
    assert VJepaQwenVideoProcessor().size == {"shortest_edge": 292}
    assert VJepaQwenVideoProcessor().crop_size == {"height": 256, "width": 256}
    assert VJepaQwenVideoProcessor(crop_size=384).size == {"shortest_edge": 438}
    for arguments in (
        {"crop_size": 64},
        {"crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 100}},
        {"crop_size": 64, "size": {"height": 70, "width": 80}, "frames_per_clip": 16, "max_window_seconds": 8.0},
        {"num_frames": 8, "do_normalize": False, "image_mean": [0.5, 0.5, 0.5]},
        {"fps": 2.0, "tubelet_size": 4},
    ):
        video_processor = VJepaQwenVideoProcessor(**arguments)
        video_processor.save_pretrained(tmp_path)
        loaded = VJepaQwenVideoProcessor.from_pretrained(tmp_path)
        assert loaded.to_dict() == video_processor.to_dict()
        for name, value in arguments.items():
            if name != "crop_size":
                assert getattr(loaded, name) == (tuple(value) if isinstance(value, list) else value)
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert saved["auto_map"] == {"AutoVideoProcessor": "video_processing_vjepa_qwen.VJepaQwenVideoProcessor"}
    assert (tmp_path / "video_decoding.py").exists()
    assert VJepaQwenVideoProcessor.from_pretrained(tmp_path, crop_size=128, size={"shortest_edge": 130}).size == {
        "shortest_edge": 130
    }


def test_auto_class_loads_it_as_remote_code(tmp_path, clip, video_processor):
    """The saved folder is enough: the same pixels without this package's class."""
    video_processor.save_pretrained(tmp_path)
    remote = AutoVideoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(remote).__name__ == "VJepaQwenVideoProcessor"
    assert type(remote) is not VJepaQwenVideoProcessor
    assert torch.equal(remote(clip).pixel_values_videos, video_processor(clip).pixel_values_videos)


def test_defaults_for_sampling_can_be_saved(clip):
    """`num_frames` or `fps` of the processor holds where the call names neither."""
    assert VJepaQwenVideoProcessor(num_frames=8).sample(clip).num_frames == 8
    assert VJepaQwenVideoProcessor(fps=4).sample(clip).num_frames == 4
    assert VJepaQwenVideoProcessor(fps=4).sample(clip, num_frames=16).num_frames == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames_per_clip": 7}, r"frames_per_clip \(7\) must be a multiple of tubelet_size \(2\)"),
        ({"tubelet_size": 0}, r"multiple of tubelet_size \(0\)"),
        ({"max_window_seconds": 0.0}, r"max_window_seconds \(0.0\) must be greater than 0"),
        ({"resample": 3}, r"resample \(3\) must be 2 \(bilinear\)"),
        ({"size": {"longest_edge": 100}}, r"size \({'longest_edge': 100}\) must have a 'shortest_edge'"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, message):
    """When the processor is made, not at the first video."""
    with pytest.raises(ValueError, match=message):
        VJepaQwenVideoProcessor(**arguments)
