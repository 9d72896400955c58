"""What phones, browsers, cameras and broadcasters write: each case by its name, right or refused with one clear error.

pytest tests/test_video_corpus.py
"""

import struct
import subprocess
import sys
import threading
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import ColorPrimaries, ColorTrc
from clips import draw_frame, read_number, write_clip, write_live_clip
from PIL import Image

from vjepa_qwen.video_decoding import VideoDecoder, VideoDecodingError, _can_skip
from vjepa_qwen.video_pixels import tone_map


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        # Every picture is found, whatever refers to what.
        ("b_pyramid.mp4", {"codec_options": {"x264-params": "keyint=20:bframes=7:b-pyramid=normal:b-adapt=0"}}),
        ("open_gop.mkv", {"codec_options": {"x264-params": "open-gop=1:keyint=10:bframes=3"}}),
        ("open_gop.ts", {"codec_options": {"x264-params": "open-gop=1:keyint=10:bframes=3"}}),
        ("intra_refresh.mkv", {"codec_options": {"x264-params": "intra-refresh=1:keyint=10"}}),
        ("all_intra.mp4", {"codec_options": {"g": "1"}}),
        ("one_group.mp4", {"codec_options": {"g": "1000", "bf": "3"}}),
        ("no_b_frames.mp4", {"codec_options": {"tune": "zerolatency", "g": "15"}}),
        ("interlaced.mp4", {"height": 96, "codec_options": {"x264-params": "tff=1:keyint=12"}}),
        ("interlaced.ts", {"height": 96, "codec_options": {"x264-params": "tff=1:keyint=12"}}),
        ("h264_10_bit.mkv", {"pixel_format": "yuv420p10le"}),
        ("h264_gray.mp4", {"pixel_format": "gray"}),
        ("flash.flv", {}),
        ("avi.avi", {"codec_options": {"bf": "0", "g": "12"}}),
        (
            "hevc_open_gop.mp4",
            {"codec": "libx265", "codec_options": {"x265-params": "keyint=10:open-gop=1:bframes=4"}},
        ),
        ("hevc_layers.mp4", {"codec": "libx265", "codec_options": {"x265-params": "keyint=16:temporal-layers=2"}}),
        ("hevc_layers.mkv", {"codec": "libx265", "codec_options": {"x265-params": "keyint=16:temporal-layers=2"}}),
        ("hevc.ts", {"codec": "libx265", "codec_options": {"x265-params": "keyint=16"}}),
        ("hevc_10_bit.mov", {"codec": "libx265", "pixel_format": "yuv420p10le"}),
        (
            "vp9_hidden.webm",
            {"codec": "libvpx-vp9", "codec_options": {"cpu-used": "8", "lag-in-frames": "16", "g": "20"}},
        ),
        ("vp9.mp4", {"codec": "libvpx-vp9", "codec_options": {"cpu-used": "8", "deadline": "realtime", "g": "12"}}),
        ("av1.mp4", {"codec": "libsvtav1", "codec_options": {"preset": "12", "g": "16"}}),
        ("mpeg2.ts", {"codec": "mpeg2video", "codec_options": {"bf": "2", "g": "12", "q": "2"}}),
        ("mpeg4.mp4", {"codec": "mpeg4", "codec_options": {"bf": "2", "g": "12", "q": "2"}}),
        ("prores_alpha.mov", {"codec": "prores_ks", "pixel_format": "yuva444p10le"}),
        ("animated.png", {"codec": "apng", "pixel_format": "rgb24", "container_format": "apng"}),
        ("animated_alpha.png", {"codec": "apng", "pixel_format": "rgba", "container_format": "apng"}),
        ("animated.gif", {"codec": "gif", "pixel_format": "rgb8", "rate": 25}),
    ],
)
def test_every_frame_is_exact(tmp_path, warnings_of, name, options):
    """All frames, and few of them in any order: the number that a frame carries is the one that was asked for."""
    if options.get("codec") == "libx265":
        options["codec_options"] = {"preset": "ultrafast", **options.get("codec_options", {})}
    decoder = VideoDecoder(write_clip(tmp_path / name, num_frames=48, **options))
    assert decoder.num_frames == 48
    np.testing.assert_allclose(decoder.timestamps, np.arange(48) / options.get("rate", 30), atol=0.0011)
    assert numbers(decoder) == list(range(48))
    for indices in ([1, 9, 11, 22, 34, 47], [5], [47], [40, 3, 3, 20]):
        assert numbers(decoder, indices) == indices
    assert warnings_of == []


@pytest.mark.parametrize("container_format", ["matroska", "mpegts", "flv"])
def test_live_streams_without_an_index(container_format, warnings_of):
    """Written in one go, read at random."""
    decoder = VideoDecoder(write_live_clip(container_format, num_frames=60))
    assert numbers(decoder, [3, 30, 59, 1]) == [3, 30, 59, 1]
    assert warnings_of == []


@pytest.mark.parametrize("first", [-2000, -40, 7000])
def test_a_start_before_or_after_zero(tmp_path, first, warnings_of):
    """The first frame that shows is at 0, and random access finds what sequential reading finds."""
    path = tmp_path / "start.ts"
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled", "muxdelay": "0"}) as container:
        _add_frames(container, range(40), first_milliseconds=first)
    decoder = VideoDecoder(path)
    np.testing.assert_allclose(decoder.timestamps, np.arange(40) / 25, atol=1e-4)
    assert numbers(decoder) == list(range(40))
    assert numbers(decoder, [35, 2]) == [35, 2]
    assert warnings_of == []


def test_the_duration_of_the_header_may_be_absurd(tmp_path):
    """Times come from the packets: a header that claims 300 years changes nothing."""
    contents = bytearray(write_clip(tmp_path / "absurd.mkv", num_frames=30).read_bytes())
    position = contents.index(b"\x44\x89\x88") + 3  # element "Duration" with 8 bytes
    contents[position : position + 8] = struct.pack(">d", 1e13)
    decoder = VideoDecoder(contents)
    assert decoder.num_frames == 30
    assert decoder.duration_seconds == pytest.approx(1.0, abs=0.002)
    assert numbers(decoder, [0, 29]) == [0, 29]


@pytest.mark.parametrize("name", ["two.mkv", "two.mp4"])
def test_of_several_video_streams_the_one_that_plays_is_read(tmp_path, name):
    """Not the small preview before it: the one marked as default, or else the largest."""
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        preview = container.add_stream("libx264", rate=25)
        preview.width, preview.height, preview.pix_fmt = 32, 32, "yuv420p"
        stream = _add_stream(container, 90, 160)
        stream.disposition = Disposition.default
        if name.endswith("mp4"):
            preview.disposition = Disposition.default
        for number in range(10):
            blank = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            blank.pts, blank.time_base = number, Fraction(1, 25)
            container.mux(preview.encode(blank))
            container.mux(stream.encode(_numbered_frame(number, 90, 160)))
        container.mux(preview.encode(None))
        container.mux(stream.encode(None))
    decoder = VideoDecoder(path)
    assert (decoder.height, decoder.width) == (90, 160)
    assert numbers(decoder) == list(range(10))


def test_the_resolution_may_change_on_the_way(tmp_path):
    """A call whose bandwidth changed: all frames come in the size of the first, exact and in order."""
    path = tmp_path / "call.ts"
    parts = []
    for part, (height, width) in enumerate([(90, 160), (180, 320), (48, 80)]):
        parts.append(tmp_path / f"part{part}.ts")
        with av.open(
            str(parts[-1]), "w", options={"mpegts_copyts": "1", "avoid_negative_ts": "disabled"}
        ) as container:
            _add_frames(container, range(part * 12, part * 12 + 12), height=height, width=width)
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    decoder = VideoDecoder(path)
    assert (decoder.height, decoder.width) == (90, 160)
    assert numbers(decoder) == list(range(36))
    assert numbers(decoder, [30, 14, 2], size=(60, 100)) == [30, 14, 2]


# Colour


def _one_picture(path, array, pixel_format, *, codec="ffv1", container_format=None, **attributes):
    """Writes one frame from an array, with colour properties that only name how the array is coded."""
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = array.shape[1], array.shape[0], pixel_format
        frame = av.VideoFrame.from_ndarray(array, format=pixel_format)
        for name, value in attributes.items():
            setattr(stream.codec_context, name, value)
            setattr(frame, name, value)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return next(VideoDecoder(path).frames([0])).astype(int)


# Codes of 65535 in PQ (SMPTE ST 2084) and HLG (BT.2100), by cd/m2.
PQ = {0: 0, 20.3: 23481, 203: 38055, 1000: 49271, 4000: 59150}
HLG_REFERENCE_WHITE = 49151  # 75 %


@pytest.mark.parametrize("transfer", [ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67])
def test_hdr_becomes_sdr(transfer):
    """Black stays black, shadows keep their light, brighter stays brighter up to 1000 cd/m2, which is white."""
    code = np.arange(0, 65536, 255, dtype=np.uint16)[None, None].repeat(3, axis=0)
    levels = tone_map(code, transfer, True)
    assert levels.dtype == np.uint8 and levels.shape == code.shape
    assert np.all(np.abs(np.diff(levels.astype(int), axis=0)) <= 1)  # gray stays gray
    steps = np.diff(levels[1, 0].astype(int))
    assert levels[1, 0, 0] == 0 and np.all(steps >= 0) and steps.max() <= 4
    if transfer == ColorTrc.SMPTE2084:
        codes = np.array(list(PQ.values()), dtype=np.uint16)[None, None].repeat(3, axis=0)
        black, dim, white, peak, beyond = tone_map(codes, transfer, True)[1, 0].astype(int)
        assert black == 0 and peak == beyond == 255
        assert dim == pytest.approx(255 * 0.1 ** (1 / 2.4), abs=1)  # a tenth of white, as SDR codes it
        assert 180 < white < 235
    else:
        assert levels[1, 0, -1] == 255
        white = tone_map(np.full((3, 1, 1), HLG_REFERENCE_WHITE, np.uint16), transfer, True)
        assert 180 < white.min() and white.max() < 235


def test_hdr_files_are_recognised(tmp_path):
    """The mean level of a PQ file is that of its tone map; the same samples without a tag are taken as they are."""
    array = np.full((32, 32, 3), PQ[203], dtype=np.uint16)
    array = av.VideoFrame.from_ndarray(array, format="rgb48le").reformat(format="gbrp16le")
    array = array.to_ndarray()
    tagged = _one_picture(
        tmp_path / "pq.mkv",
        array,
        "gbrp16le",
        color_trc=int(ColorTrc.SMPTE2084),
        color_primaries=int(ColorPrimaries.BT2020),
    )
    plain = _one_picture(tmp_path / "plain.mkv", array, "gbrp16le")
    assert np.abs(plain - PQ[203] // 257).max() <= 1
    assert np.abs(tagged - tone_map(np.full((3, 1, 1), PQ[203], np.uint16), ColorTrc.SMPTE2084, True)).max() <= 1
    assert tagged.min() > plain.max() + 30


def test_what_is_transparent_is_white(tmp_path):
    """As in a browser: the colour below full transparency does not show, half of it shows half."""
    array = np.zeros((32, 96, 4), dtype=np.uint8)
    array[..., 0] = 255
    array[:, 32:64, 3], array[:, 64:, 3] = 128, 255
    rgb = _one_picture(tmp_path / "alpha.png", array, "rgba", codec="apng", container_format="apng")
    assert rgb[:, 16, 16].tolist() == [255, 255, 255]
    assert np.abs(rgb[:, 16, 48] - [255, 127, 127]).max() <= 1
    assert rgb[:, 16, 80].tolist() == [255, 0, 0]


def test_a_transparent_gif_is_white(tmp_path):
    """Palettes have transparent entries."""
    images = [Image.new("RGBA", (32, 32), (255, 0, 0, 255 * (number % 2))) for number in range(4)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100, disposal=2)
    frames = list(VideoDecoder(tmp_path / "a.gif").frames([0, 1]))
    assert frames[0].min() == 255
    assert frames[1][:, 16, 16].tolist() == [255, 0, 0]


def test_skipping_and_threads_change_no_pixel(tmp_path, monkeypatch):
    """Few frames of many, side by side, are those of decoding everything one after the other, bit by bit."""
    path = write_clip(
        tmp_path / "clip.mp4", num_frames=200, codec_options={"preset": "veryfast", "g": "40", "bf": "3"}
    )
    with av.open(str(path)) as container:
        everything = [frame.to_ndarray(format="gbrp") for frame in container.decode(video=0)]
    indices = list(range(0, 200, 7))
    for num_readers, min_threaded_pixels in ((1, 0), (2, 0), (4, 0), (1, 1 << 16)):
        monkeypatch.setattr("vjepa_qwen.video_decoding.MAX_READERS", num_readers)
        monkeypatch.setattr("vjepa_qwen.video_decoding.MIN_THREADED_PIXELS", min_threaded_pixels)
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        for index, frame in zip(indices, VideoDecoder(path).frames(indices), strict=True):
            assert np.abs(frame.transpose(1, 2, 0).astype(int) - everything[index]).max() <= 1


# Damage


def test_a_broadcast_may_break_off_anywhere(tmp_path):
    """A transport stream says nowhere how long it should be: what is there is exact."""
    contents = write_clip(tmp_path / "cut.ts", num_frames=60, codec_options={"g": "12", "bf": "2"}).read_bytes()
    decoder = VideoDecoder(contents[: int(len(contents) * 0.7)])
    found = numbers(decoder)
    assert found == list(range(len(found))) and 30 < len(found) < 60


def test_changed_bits_in_the_middle_cost_only_their_group(tmp_path, warnings_of):
    """Noise over one group of pictures of an MP4: the others are exact, the number of frames stays, with a warning."""
    path = write_clip(
        tmp_path / "noise.mp4", num_frames=60, codec_options={"g": "12", "bf": "0", "preset": "veryfast"}
    )
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size > 0]
    contents = bytearray(path.read_bytes())
    for position, size in packets[24:36]:
        contents[position + 4 : position + size] = b"\xff" * (size - 4)
    decoder = VideoDecoder(contents)
    assert decoder.num_frames == 60
    frames = list(decoder.frames(range(60)))
    assert [read_number(frame) for frame in frames[:24]] == list(range(24))
    assert [read_number(frame) for frame in frames[36:]] == list(range(36, 60))
    assert len(warnings_of) == 1 and "damaged, 12 of 60 frames could not be decoded" in warnings_of[0]


# Refused


def _png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [(13, header), (len(data) - 4, data), (0, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", size) + chunk + struct.pack(">I", zlib.crc32(chunk)) for size, chunk in chunks
    )


HUGE = """
import resource, sys
from vjepa_qwen.video_decoding import VideoDecoder, VideoDecodingError, _can_skip
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    VideoDecoder(sys.argv[1])
except VideoDecodingError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["huge.png", "huge.y4m", "huge.mp4"])
def test_huge_sizes_are_refused_before_memory_is_taken(tmp_path, name):
    """A header of a few bytes must not take gigabytes."""
    path = tmp_path / name
    if name == "huge.png":
        path.write_bytes(_png_header(20000, 20000))
    elif name == "huge.y4m":
        path.write_bytes(b"YUV4MPEG2 W20000 H20000 F30:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(1000))
    else:
        contents = bytearray(write_clip(path, num_frames=2, codec="mpeg4").read_bytes())
        position = contents.index(b"mp4v") + 28  # the sample entry: width and height of two bytes each
        contents[position : position + 4] = struct.pack(">HH", 60000, 60000)
        path.write_bytes(contents)
    result = subprocess.run([sys.executable, "-c", HUGE, str(path)], capture_output=True, text=True, check=True)
    *message, added_kilobytes = result.stdout.splitlines()
    if name != "huge.mp4":  # an MPEG-4 stream has its own size, which counts
        assert len(message) == 1 and message[0].startswith(f"{path}: ")
    assert int(added_kilobytes) < 200_000


def test_animated_webp_is_refused(tmp_path):
    """PyAV's FFmpeg cannot read it: one clear error that says what to do."""
    images = [Image.fromarray(draw_frame(number, 90, 160)) for number in range(5)]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=100, lossless=True)
    with pytest.raises(VideoDecodingError, match=r"a.webp: no frame .*animated WebP, try GIF"):
        VideoDecoder(tmp_path / "a.webp")


def test_a_header_without_frames_is_refused(tmp_path):
    """A recording that was stopped before the first frame."""
    for name in ("none.mp4", "none.mkv"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = _add_stream(container, 90, 160)
            container.start_encoding()
            container.mux(stream.encode(None))
        with pytest.raises(VideoDecodingError, match=f"{name}: "):
            VideoDecoder(tmp_path / name)


def _add_stream(container, height, width):
    stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "g": "12", "bf": "2"})
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    return stream


def _numbered_frame(number, height, width, milliseconds=None):
    frame = av.VideoFrame.from_ndarray(draw_frame(number, height, width), format="rgb24")
    frame.pts = number * 40 if milliseconds is None else milliseconds
    frame.time_base = Fraction(1, 1000)
    return frame


def _add_frames(container, frame_numbers, *, height=90, width=160, first_milliseconds=0):
    stream = _add_stream(container, height, width)
    stream.codec_context.time_base = Fraction(1, 1000)
    for number in frame_numbers:
        frame = _numbered_frame(number, height, width, first_milliseconds + number * 40)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


# How it is read


def test_a_file_object_is_read_at_two_places_at_once(tmp_path):
    """Threads share one file object, each with a place of its own, and leave it usable."""
    path = write_clip(tmp_path / "clip.mp4", num_frames=200)
    with open(path, "rb") as file:
        decoder = VideoDecoder(file)
        assert len(decoder._groups(list(range(200)))) > 2
        assert numbers(decoder) == list(range(200))
        assert numbers(decoder, [150, 20]) == [150, 20]


def test_a_container_without_seeking_is_read_once(tmp_path, monkeypatch):
    """Where no keyframe can be reached there is one group from the beginning, and not one for each keyframe."""
    path = write_clip(tmp_path / "clip.mp4", num_frames=100)

    def fail(*arguments):
        return None

    monkeypatch.setattr("vjepa_qwen.video_decoding._packets_from", fail)
    decoder = VideoDecoder(path)
    assert len(decoder._groups(list(range(0, 100, 9)))) == 1
    assert numbers(decoder, range(0, 100, 9)) == list(range(0, 100, 9))


def test_a_reader_that_is_left_early_leaves_no_thread_and_no_open_file(tmp_path):
    """Whoever stops after the first frame waits for nothing else."""
    decoder = VideoDecoder(write_clip(tmp_path / "clip.mp4", num_frames=300))
    before = set(threading.enumerate())
    frames = decoder.frames(range(300))
    assert read_number(next(frames)) == 0
    assert len(set(threading.enumerate()) - before) >= 1
    frames.close()
    assert set(threading.enumerate()) <= before


def test_an_error_in_a_thread_arrives_where_frames_are_taken(tmp_path):
    """A file that disappears between choosing and reading."""
    path = write_clip(tmp_path / "clip.mp4", num_frames=30)
    decoder = VideoDecoder(path)
    path.unlink()
    with pytest.raises(VideoDecodingError, match="clip.mp4"):
        list(decoder.frames([0, 20]))


@pytest.mark.parametrize(("layers", "may_skip"), [("1", True), ("2", False)])
def test_pictures_are_dropped_only_where_no_layer_refers_to_them(tmp_path, layers, may_skip):
    """HEVC with temporal layers: a picture that its own layer does not need may be needed by the next."""
    parameters = {"preset": "ultrafast", "x265-params": f"temporal-layers={layers}:keyint=20:bframes=3"}
    path = write_clip(tmp_path / "layers.mp4", num_frames=40, codec="libx265", codec_options=parameters)
    with av.open(str(path)) as container:
        assert _can_skip(container.streams.video[0].codec_context) == may_skip
    assert numbers(VideoDecoder(path), [7, 19, 33]) == [7, 19, 33]
