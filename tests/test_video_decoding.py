"""The right frames at the right times, or one clear error, for every kind of file that people have."""

import functools
import http.server
import io
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from clips import draw_frame, read_number, write_audio, write_clip, write_live_clip

from vjepa_qwen.video_decoding import VideoDecoder, VideoDecodingError, decode

VP9 = {"codec": "libvpx-vp9", "codec_options": {"deadline": "realtime", "cpu-used": "8", "g": "12"}}


@pytest.fixture(autouse=True)
def codec_threads(monkeypatch):
    """The clips are small: they are decoded with as many threads as large ones."""
    monkeypatch.setattr("vjepa_qwen.video_decoding.MIN_THREADED_PIXELS", 0)


@pytest.fixture
def warnings_of(monkeypatch):
    """Collects what the decoder logs as warnings."""
    messages = []
    monkeypatch.setattr("vjepa_qwen.video_decoding.logger.warning", messages.append)
    return messages


def numbers(decoder, indices=None, **kwargs):
    indices = range(decoder.num_frames) if indices is None else indices
    return [read_number(frame) for frame in decoder.frames(indices, **kwargs)]


# Exactness in every container


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip.mp4", {}),
        ("open_gop.mp4", {"codec_options": {"preset": "veryfast", "x264-params": "open-gop=1:keyint=10:bframes=3"}}),
        ("fragmented.mp4", {"container_options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("clip.mov", {}),
        ("clip.mkv", {}),
        ("clip.ts", {}),
        ("hevc.mp4", {"codec": "libx265", "codec_options": {"preset": "ultrafast", "x265-params": "keyint=12"}}),
        ("av1.webm", {"codec": "libsvtav1", "codec_options": {"preset": "12", "g": "12"}}),
        ("mpeg2.mpg", {"codec": "mpeg2video", "codec_options": {"bf": "2", "g": "12", "q": "2"}}),
        ("prores.mov", {"codec": "prores_ks", "pixel_format": "yuv422p10le"}),
        ("clip.webm", VP9),
        ("hidden_frames.webm", {"codec": "libvpx", "codec_options": {"auto-alt-ref": "1", "lag-in-frames": "16"}}),
        ("clip.avi", {"codec": "mpeg4", "codec_options": {"bf": "2", "g": "12", "q": "2"}}),
        ("intra.avi", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
        ("clip.gif", {"codec": "gif", "pixel_format": "rgb8", "rate": 25}),
        ("raw.h264", {"rate": 25}),
    ],
)
def test_every_frame_is_found(tmp_path, warnings_of, name, options):
    """Count, times, order and random access are exact, with B-frames, without frame count, and without times."""
    decoder = VideoDecoder(write_clip(tmp_path / name, num_frames=40, **options))
    rate = options.get("rate", 30)
    assert decoder.num_frames == 40
    # Matroska and WebM round to milliseconds.
    np.testing.assert_allclose(decoder.timestamps, np.arange(40) / rate, atol=0.0011)
    assert decoder.duration_seconds == pytest.approx(40 / rate, abs=0.0021)
    assert decoder.frames_per_second == pytest.approx(rate, rel=0.002)
    assert (decoder.height, decoder.width) == (90, 160)
    assert numbers(decoder) == list(range(40))
    indices = [39, 0, 0, 13, 12, 12, 30, 38, 5]
    assert numbers(decoder, indices) == indices
    assert warnings_of == []


@pytest.mark.parametrize(("container_format", "options"), [("matroska", {}), ("webm", VP9)])
def test_live_recordings_have_exact_frames(container_format, options, warnings_of):
    """A file written in one go has neither duration nor frame count nor index; frames and times are exact anyway."""
    decoder = VideoDecoder(write_live_clip(container_format, num_frames=40, **options))
    assert decoder.num_frames == 40
    np.testing.assert_allclose(decoder.timestamps, np.arange(40) / 30, atol=0.0011)
    assert numbers(decoder, [3, 20, 39, 1]) == [3, 20, 39, 1]
    assert warnings_of == []


def test_frames_far_apart_are_found_by_seeking(tmp_path, monkeypatch):
    """Ten frames out of 600 are exact, and little more than their groups of pictures is decoded."""
    decoder = VideoDecoder(write_clip(tmp_path / "long.mp4", num_frames=600))
    decoded = []

    def count(packets, stream):
        for frame in decode(packets, stream):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr("vjepa_qwen.video_decoding.decode", count)
    indices = list(range(30, 600, 60))
    assert numbers(decoder, indices) == indices
    assert len(decoded) < 200


def test_frames_that_do_not_exist_are_refused(tmp_path):
    """An index beyond the end is the caller's mistake, not the last frame."""
    decoder = VideoDecoder(write_clip(tmp_path / "clip.mp4", num_frames=3))
    for index in (3, -1):
        with pytest.raises(IndexError, match=rf"index \({index}\) must be in 0..2"):
            list(decoder.frames([index]))


# Times


def test_variable_frame_rate_keeps_the_times_of_the_file(tmp_path):
    """Each frame has its own time, and the last one its own length."""
    milliseconds = [0, 10, 500, 520, 540, 2000, 2010, 2500]
    decoder = VideoDecoder(write_clip(tmp_path / "vfr.mkv", num_frames=8, frame_milliseconds=milliseconds))
    np.testing.assert_allclose(decoder.timestamps, np.array(milliseconds) / 1000)
    assert decoder.duration_seconds > 2.5
    assert numbers(decoder) == list(range(8))


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv"])
def test_times_count_from_the_first_frame(tmp_path, name):
    """A file whose first frame is shown at 5 s begins at 0."""
    milliseconds = [5000 + 40 * number for number in range(20)]
    decoder = VideoDecoder(write_clip(tmp_path / name, num_frames=20, rate=25, frame_milliseconds=milliseconds))
    np.testing.assert_allclose(decoder.timestamps, np.arange(20) * 0.04, atol=1e-9)
    assert decoder.duration_seconds == pytest.approx(0.8, abs=0.01)
    assert numbers(decoder) == list(range(20))


def test_a_recording_may_begin_between_keyframes(tmp_path, warnings_of):
    """What the decoder cannot show before the first keyframe is not there: the first frame that shows is at 0."""
    contents = write_clip(tmp_path / "broadcast.ts", num_frames=40, codec_options={"g": "12", "bf": "2"}).read_bytes()
    decoder = VideoDecoder(contents[len(contents) // 188 // 6 * 188 :])
    shown = numbers(decoder)
    assert shown == list(range(shown[0], 40)) and 0 < shown[0] < 40
    np.testing.assert_allclose(decoder.timestamps, np.arange(len(shown)) / 30, atol=1e-6)
    assert warnings_of == []


def test_frames_cut_away_at_the_start_do_not_exist(tmp_path, warnings_of):
    """What an editor has trimmed without encoding again is decoded but not shown: it has no number and no time."""
    source, trimmed = write_clip(tmp_path / "whole.mp4", num_frames=40), tmp_path / "trimmed.mp4"
    with av.open(str(source)) as original, av.open(str(trimmed), "w") as container:
        stream = container.add_stream_from_template(original.streams.video[0])
        container_start = 17 * 512
        for packet in original.demux(video=0):
            if packet.size > 0 and packet.pts >= 12 * 512:
                packet.pts -= container_start
                packet.dts -= container_start
                packet.stream = stream
                container.mux(packet)
    with av.open(str(trimmed)) as container:
        num_discarded = sum(packet.is_discard for packet in container.demux(video=0))
    decoder = VideoDecoder(trimmed)
    assert num_discarded > 0
    assert decoder.timestamps[0] == 0
    assert numbers(decoder) == list(range(17, 40))
    assert numbers(decoder, [15, 3]) == [32, 20]
    assert warnings_of == []


def test_frames_cut_away_at_the_end_do_not_exist(tmp_path, warnings_of):
    """An edit list that ends before the recording does; nothing is missing, so nobody is warned."""
    contents = bytearray(write_clip(tmp_path / "whole.mp4", num_frames=40).read_bytes())
    # Box: size, "elst", version and flags, number of entries, then the length of the first one in milliseconds.
    position = contents.index(b"elst") + 12
    assert int.from_bytes(contents[position : position + 4], "big") == 1334
    contents[position : position + 4] = (650).to_bytes(4, "big")
    decoder = VideoDecoder(contents)
    assert numbers(decoder) == list(range(20))
    assert decoder.duration_seconds == pytest.approx(20 / 30, abs=0.002)
    assert warnings_of == []


@pytest.mark.parametrize("num_frames", [1, 2])
@pytest.mark.parametrize("name", ["short.mp4", "short.mkv"])
def test_very_short_clips(tmp_path, name, num_frames):
    """One frame is a video, with a length."""
    decoder = VideoDecoder(write_clip(tmp_path / name, num_frames=num_frames))
    assert decoder.duration_seconds == pytest.approx(num_frames / 30, abs=0.002)
    assert numbers(decoder) == list(range(num_frames))


# Geometry and colour


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_phone_videos_stand_upright(tmp_path, rotation, mirrored):
    """The display matrix is applied, mirroring included; size and bar code are those that a player shows."""
    path = write_clip(tmp_path / "phone.mp4", num_frames=3, height=160, width=96, rotation=rotation, mirrored=mirrored)
    decoder = VideoDecoder(path)
    assert (decoder.height, decoder.width) == (160, 96)
    frames = list(decoder.frames([2], size=(80, 48)))
    assert frames[0].shape == (3, 80, 48)
    assert read_number(frames[0]) == 2
    expected = draw_frame(2, 160, 96)[::2, ::2].transpose(2, 0, 1).astype(float)
    assert np.abs(frames[0] - expected).mean() < 12


@pytest.mark.parametrize("pixel_aspect", [Fraction(4, 3), Fraction(1, 2)])
def test_pixels_that_are_not_square_are_stretched(tmp_path, pixel_aspect):
    """Anamorphic video has the shape that a player shows; it is enlarged, never reduced."""
    path = write_clip(tmp_path / "anamorphic.mp4", num_frames=2, height=96, width=160, pixel_aspect=pixel_aspect)
    decoder = VideoDecoder(path)
    assert decoder.width / decoder.height == pytest.approx(160 / 96, rel=0.02)
    assert decoder.height >= 96
    assert numbers(decoder) == [0, 1]


@pytest.mark.parametrize(("height", "width"), [(91, 161), (16, 400), (400, 16), (34, 34)])
def test_odd_sizes(tmp_path, height, width):
    """Sizes that no block fits keep their shape and their content."""
    path = write_clip(
        tmp_path / "odd.mkv", num_frames=3, height=height, width=width, codec="ffv1", pixel_format="yuv444p"
    )
    decoder = VideoDecoder(path)
    assert (decoder.height, decoder.width) == (height, width)
    assert numbers(decoder, size=(height * 2 + 1, width * 2 + 1)) == [0, 1, 2]


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuvj420p", "yuv444p", "gray", "yuv420p10le"])
def test_black_and_white_stay_black_and_white(tmp_path, pixel_format):
    """Limited and full range, chroma or none, eight bits or ten: levels are kept."""
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    image[:, 32:] = 255
    path = write_clip(
        tmp_path / "levels.mkv",
        num_frames=1,
        codec="ffv1" if "j" not in pixel_format else "mjpeg",
        image=image,
        pixel_format=pixel_format,
        height=64,
        width=64,
    )
    frame = next(VideoDecoder(path).frames([0])).astype(int)
    assert frame[:, 8:-8, 4:24].max() <= 3
    assert frame[:, 8:-8, 40:60].min() >= 252


@pytest.mark.parametrize("colorspace", ["ITU601", "ITU709"])
def test_colours_follow_the_matrix_that_the_file_names(tmp_path, colorspace):
    """BT.601 and BT.709 give the same red, green and blue back."""
    image = np.zeros((48, 96, 3), dtype=np.uint8)
    for index, color in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        image[:, index * 32 : index * 32 + 32] = color
    path = tmp_path / "colours.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "yuv444p"
        # AVColorSpace: 1 is BT.709, 6 is BT.601 (SMPTE 170M).
        stream.codec_context.colorspace = 1 if colorspace == "ITU709" else 6
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv444p", dst_colorspace=colorspace)))
        container.mux(stream.encode(None))
    decoded = next(VideoDecoder(path).frames([0])).transpose(1, 2, 0).astype(int)
    assert np.abs(decoded - image).max() <= 3


# Sources


def test_every_kind_of_source_gives_the_same_frames(tmp_path, monkeypatch):
    """Path, URL, bytes and file object are one video; a stream that cannot go back is copied first."""
    path = write_clip(tmp_path / "a clip: 1%d.mp4", num_frames=5)
    contents = path.read_bytes()

    class OneWay(io.BytesIO):
        def seekable(self):
            return False

        def seek(self, *args):
            raise io.UnsupportedOperation("seek")

    with open(path, "rb") as file:
        file.read(100)
        for source in (str(path), path, path.as_uri(), contents, bytearray(contents), file, OneWay(contents)):
            assert numbers(VideoDecoder(source)) == list(range(5))
            assert VideoDecoder(path).name == str(path)


def test_http_urls_are_downloaded_once(tmp_path, monkeypatch):
    """A URL is fetched once however often it is read, and leaves no file behind; a missing one is named."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    write_clip(tmp_path / "clip.mp4", num_frames=5)
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            requests.append((self.path, int(code)))

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        decoder = VideoDecoder(f"{base}/clip.mp4?token=1")
        assert numbers(decoder) == numbers(decoder) == list(range(5))
        assert requests == [("/clip.mp4?token=1", 200)]
        del decoder
        assert list((tmp_path / "temporary").iterdir()) == []
        with pytest.raises(VideoDecodingError, match=f"^{base}/none.mp4: cannot be downloaded .*404"):
            VideoDecoder(f"{base}/none.mp4")
        server.shutdown()


# Damage


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mkv"])
def test_the_readable_part_of_a_truncated_file_is_used(tmp_path, warnings_of, name):
    """A download that broke off: the frames that are there, all exact, and a warning that says how many."""
    path = write_clip(tmp_path / name, num_frames=60, container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    decoder = VideoDecoder(path)
    assert 20 < decoder.num_frames < 50
    assert numbers(decoder) == list(range(decoder.num_frames))
    assert len(warnings_of) == 1
    how_much = f"{decoder.num_frames} of 60 frames" if name.endswith("mp4") else "of 2.00 seconds"
    assert "cut" in warnings_of[0] and "truncated" in warnings_of[0] and how_much in warnings_of[0]


def test_damage_in_the_middle_costs_the_frames_there(tmp_path, warnings_of):
    """Frames that cannot be decoded are replaced by the one before, with a warning; the others are exact."""
    path = write_clip(tmp_path / "damaged.mkv", num_frames=40, codec="mjpeg", pixel_format="yuvj420p")
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size > 0]
    contents = bytearray(path.read_bytes())
    for position, size in packets[10:13]:
        contents[position + 30 : position + size] = bytes(size - 30)
    decoder = VideoDecoder(bytes(contents))
    assert decoder.num_frames == 40
    frames = list(decoder.frames(range(40)))
    assert len(frames) == 40
    assert [read_number(frame) for frame in frames[:10]] == list(range(10))
    assert [read_number(frame) for frame in frames[13:]] == list(range(13, 40))
    assert len(warnings_of) == 1 and "3 of 40 frames could not be decoded" in warnings_of[0]


def test_what_is_no_video_is_one_clear_error(tmp_path):
    """One line that names the file and the reason, for everything that people pass by mistake."""
    write_audio(tmp_path / "sound.wav")
    _write_audio_with_cover(tmp_path / "album.mp3")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "notes.txt").write_text("not a video\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    complete = write_clip(tmp_path / "complete.mp4")
    (tmp_path / "no_header.mp4").write_bytes(complete.read_bytes()[: complete.stat().st_size // 2])
    (tmp_path / "no_frames.y4m").write_bytes(b"YUV4MPEG2 W16 H16 F30:1 Ip A1:1 C420jpeg\n")
    reasons = {
        "sound.wav": "has no video stream (only audio)",
        "album.mp3": "has no video stream (only audio with a cover picture)",
        "empty.mp4": "is empty (0 bytes)",
        "noise.mp4": "is no readable video",
        "notes.txt": "is a text file, no video",
        "folder.mp4": "is a directory",
        "missing.mp4": "no such file",
        "no_header.mp4": "or is truncated",
        "no_frames.y4m": "has no frames",
    }
    for name, reason in reasons.items():
        with pytest.raises(VideoDecodingError) as caught:
            VideoDecoder(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: ") and reason in message and "\n" not in message
    for source, reason in [
        (b"", "is empty"),
        (b"abc", "<3 bytes>: is no readable video"),
        (io.StringIO("abc"), "binary mode"),
        ("rtsp://camera/stream", "only file://, http:// and https:// URLs"),
        (7, r"source \(int\) must be a path"),
    ]:
        with pytest.raises(VideoDecodingError, match=reason):
            VideoDecoder(source)


def test_a_cover_picture_is_not_the_video(tmp_path):
    """The stream that plays is chosen, wherever in the file it is."""
    path = tmp_path / "cover_first.mp4"
    with av.open(str(path), "w") as container:
        cover = _add_cover(container)
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 160, 90, "yuv420p"
        container.mux(cover.encode(av.VideoFrame(300, 300, "yuvj420p")))
        for number in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw_frame(number, 90, 160), format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
    assert numbers(VideoDecoder(path)) == list(range(5))


def _add_cover(container):
    cover = container.add_stream("mjpeg", rate=1)
    cover.width = cover.height = 300
    cover.pix_fmt = "yuvj420p"
    cover.disposition = Disposition.attached_pic
    return cover


def _write_audio_with_cover(path):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("libmp3lame", rate=44100, layout="mono")
        cover = _add_cover(container)
        container.mux(cover.encode(av.VideoFrame(300, 300, "yuvj420p")))
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
