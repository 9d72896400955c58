"""Exact video frames at exact times, through PyAV (FFmpeg), whatever the container says about itself.

    decoder = VideoDecoder("clip.mp4")
    decoder.timestamps                                  # seconds at which each frame is shown, from the packets' pts
    for frame in decoder.frames([0, 10, 20], size=(292, 519)):
        ...                                             # uint8, (3, height, width), RGB

A first pass over the file reads packets without decoding them. That gives the true number of frames and their times
also where the header has none (WebM, live MKV) or where the frame rate varies. A second pass decodes from the nearest
keyframe on, and converts to RGB at the wanted size in one step of libswscale.
"""

import http.client
import io
import os
import re
import shutil
import tempfile
import urllib.request
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from urllib.parse import urlparse

import av
import numpy as np
from av.stream import Disposition
from transformers.utils import logging

logger = logging.get_logger(__name__)

DOWNLOAD_TIMEOUT_SECONDS = 60
# Jumping to a keyframe flushes the decoder, which costs about as much as this many frames.
SEEK_COST_FRAMES = 8
# Keyframes to try, each before the last, until decoding from the beginning of the file is the safer way.
SEEK_ATTEMPTS = 3
# Shown for this long when neither a packet's duration nor a frame rate says how long the only frame lasts.
FALLBACK_FRAME_SECONDS = 1 / 25


class VideoDecodingError(ValueError):
    """A source that is no readable video. The message is one line that names the source and the reason."""


class VideoDecoder:
    """
    Random access to the frames of a video.

    Args:
        source (`str`, `os.PathLike`, `bytes`, or a binary file object):
            Path, `file://` URL, http(s) URL (downloaded once, into a temporary file), the file's contents, or an open
            file. A file object is read from its beginning and must stay open while frames are read.

    Attributes:
        name (`str`): What errors call the source.
        timestamps (`np.ndarray` of shape `(num_frames,)`, float64):
            Seconds at which each frame is shown, counted from the first frame (a file that starts at 5 s starts at 0).
        duration_seconds (`float`): From the start of the first to the end of the last frame.
        height, width (`int`): Size of the picture as a player shows it: rotated, with square pixels.

    Raises:
        VideoDecodingError: for whatever cannot be read as a video.
    """

    def __init__(self, source):
        self._source = _Source(source)
        self.name = self._source.name
        self._scan()
        self._read_geometry()

    @property
    def num_frames(self) -> int:
        """Number of frames that can be read."""
        return len(self.timestamps)

    @property
    def frames_per_second(self) -> float:
        """Average frame rate."""
        return self.num_frames / self.duration_seconds

    # First pass: which frames there are

    def _scan(self):
        """Reads the time of every frame, from the packets alone where these have times."""
        with self._source.open() as container:
            stream = _video_stream(container, self.name)
            num_packets, seconds_per_tick = 0, float(stream.time_base)
            pts, durations, keyframe_pts, first_keyframe_pts, has_times = [], [], [], None, True
            for packet in _demux(container, stream):
                num_packets += 1
                if packet.pts is None:
                    has_times = False
                    break
                if first_keyframe_pts is None and packet.is_keyframe:
                    first_keyframe_pts = packet.pts
                # A recording may begin in the middle of a group of pictures: nothing shows what came before.
                if first_keyframe_pts is None or packet.pts < first_keyframe_pts:
                    continue
                if _is_hidden(packet, stream.codec_context.name):
                    continue
                pts.append(packet.pts)
                durations.append(packet.duration or 0)
                if packet.is_keyframe:
                    keyframe_pts.append(packet.pts)
            # What the header promises. Of an MP4 not its sample count, which includes what edit lists cut away.
            declared_frames = len(stream.index_entries) if "mp4" in container.format.name else 0
            declared_seconds = _declared_seconds(stream)
            frame_seconds = 1 / float(stream.average_rate or stream.guessed_rate or 1 / FALLBACK_FRAME_SECONDS)
        # `_pts` is None when frames must be counted because they carry no times of their own.
        self._pts = None
        if has_times and pts:
            self._pts, order = np.unique(np.array(pts, dtype=np.int64), return_index=True)
            self._keyframe_pts = np.intersect1d(np.array(keyframe_pts, dtype=np.int64), self._pts)
            timestamps = (self._pts - self._pts[0]) * seconds_per_tick
            last_seconds = durations[order[-1]] * seconds_per_tick
        else:
            timestamps, num_packets = self._scan_by_decoding(frame_seconds)
            last_seconds = 0.0
        if len(timestamps) == 0:
            raise VideoDecodingError(f"{self.name}: the video stream has no frames")
        if last_seconds <= 0:
            last_seconds = float(np.median(np.diff(timestamps))) if len(timestamps) > 1 else frame_seconds
        self.timestamps = timestamps
        self.duration_seconds = float(timestamps[-1] + last_seconds)
        if 0 < num_packets < declared_frames:
            logger.warning(
                f"{self.name}: damaged or truncated, {len(timestamps)} of {declared_frames} frames can be read"
            )
        elif declared_seconds > self.duration_seconds + max(0.25, 2 * last_seconds):
            logger.warning(
                f"{self.name}: damaged or truncated, {self.duration_seconds:.2f} of {declared_seconds:.2f} seconds "
                "can be read"
            )

    def _scan_by_decoding(self, frame_seconds: float) -> tuple[np.ndarray, int]:
        """For containers without times (raw streams, some AVI): counts frames by decoding them all."""
        with self._source.open() as container:
            stream = _video_stream(container, self.name)
            times = [frame.time for frame in _decode(_demux(container, stream), stream)]
        if None in times or np.any(np.diff(times) <= 0):
            return np.arange(len(times)) * frame_seconds, len(times)
        return np.array(times, dtype=np.float64) - (times[0] if times else 0), len(times)

    def _read_geometry(self):
        """Decodes one frame, which knows size and rotation better than the header."""
        with self._source.open() as container:
            stream = _video_stream(container, self.name)
            frame = next(_decode(_demux(container, stream), stream), None)
            if frame is None:
                raise VideoDecodingError(f"{self.name}: no frame can be decoded (codec {stream.codec_context.name})")
            pixel_aspect = float(stream.sample_aspect_ratio or 1) or 1.0
        self._orientation = _Orientation(frame)
        # Enlarges, never reduces: no detail is lost before the resize that follows.
        stored_height = frame.height if pixel_aspect >= 1 else round(frame.height / pixel_aspect)
        stored_width = round(frame.width * pixel_aspect) if pixel_aspect >= 1 else frame.width
        self.height, self.width = self._orientation.displayed_size(stored_height, stored_width)

    # Second pass: the frames themselves

    def frames(self, indices: Iterable[int], *, size: tuple[int, int] | None = None) -> Iterator[np.ndarray]:
        """
        Decodes frames one after the other; at most a few are in memory.

        Args:
            indices (iterable of `int`): Which frames, best in ascending order; the same one may come several times.
            size (`tuple[int, int]`, *optional*):
                `(height, width)` to resize to while decoding (bilinear, antialiased). Defaults to the size of the
                video. On average within one level (of 255) of what torchvision makes of whole frames.

        Yields:
            `np.ndarray` of shape `(3, height, width)`, uint8: red, green and blue. A frame that is damaged is replaced
            by the one before it, with a warning at the end.

        Raises:
            VideoDecodingError: when not a single frame can be decoded.
            IndexError: for a frame that does not exist.
        """
        size = size or (self.height, self.width)
        reader = _FrameReader(self)
        num_asked, num_replaced = 0, 0
        position, image = None, None
        try:
            for index in indices:
                if not 0 <= index < self.num_frames:
                    raise IndexError(f"index ({index}) must be in 0..{self.num_frames - 1}, the frames of {self.name}")
                found, frame = reader.frame_shown_at(index)
                num_asked += 1
                num_replaced += found != index
                if found != position:
                    position, image = found, self._orientation.to_rgb(frame, size)
                yield image
        finally:
            reader.close()
            if num_replaced:
                logger.warning(
                    f"{self.name}: damaged, {num_replaced} of {num_asked} frames could not be decoded and were "
                    "replaced by the frame before"
                )

    def _keyframe_before(self, index: int) -> int:
        """Index of the last keyframe at or before a frame; 0 where there is no seeking."""
        if self._pts is None:
            return 0
        keyframes = self._keyframe_pts[: np.searchsorted(self._keyframe_pts, self._pts[index], side="right")]
        return int(np.searchsorted(self._pts, keyframes[-1])) if len(keyframes) else 0


class _FrameReader:
    """One open file and a place in it: decodes on, or jumps to a keyframe, whichever is nearer."""

    def __init__(self, decoder: VideoDecoder):
        self._decoder = decoder
        self._container = None
        # Pairs (index, frame): those to come, the one on show, and the one that the codec has given beyond it.
        self._frames, self._current, self._ahead = None, None, None

    def close(self):
        # The generators refer to this object: without them it and its temporary file go at once.
        self._frames, self._current, self._ahead = None, None, None
        if self._container is not None:
            self._container.close()
            self._container = None

    def frame_shown_at(self, index: int) -> tuple[int, av.VideoFrame]:
        """The frame with this index; if it is damaged the nearest before it, or else the first after it."""
        position = -1 if self._current is None else self._current[0]
        is_far = self._decoder._keyframe_before(index) - position > SEEK_COST_FRAMES
        if self._frames is None or index < position or is_far:
            self._start_near(index)
        while self._current is None or self._current[0] < index:
            if self._ahead is None:
                self._ahead = next(self._frames, None)
            if self._ahead is None or (self._ahead[0] > index and self._current is not None):
                break
            self._current, self._ahead = self._ahead, None
        if self._current is None:
            raise VideoDecodingError(f"{self._decoder.name}: no frame can be decoded")
        return self._current

    def _start_near(self, index: int):
        """Makes `_frames` begin at the keyframe before a frame, or where that fails at the beginning of the file."""
        keyframe_before = self._decoder._keyframe_before
        keyframe = keyframe_before(index)
        for _ in range(SEEK_ATTEMPTS):
            if keyframe == 0:
                break
            self._current, self._ahead = None, self._seek(keyframe)
            # Some containers seek into the middle of a picture, and decoding starts only with the next keyframe.
            if self._ahead is not None and keyframe_before(self._ahead[0]) == self._ahead[0] <= index:
                return
            keyframe = keyframe_before(keyframe - 1)
        self.close()
        self._open()
        self._frames = self._number(_demux(self._container, self._stream), 0)

    def _open(self):
        self._container = self._decoder._source.open()
        self._stream = _video_stream(self._container, self._decoder.name)

    def _seek(self, keyframe: int) -> tuple[int, av.VideoFrame] | None:
        """Makes `_frames` begin at a keyframe and returns the first of them, or None where that does not succeed."""
        if self._container is None:
            self._open()
        keyframe_pts = int(self._decoder._pts[keyframe])
        try:
            self._container.seek(keyframe_pts, stream=self._stream)
        except av.FFmpegError:
            return None
        # Containers seek by an index of their own, by decoding times or by guessing: see whether the keyframe comes.
        packets, passed = _demux(self._container, self._stream), []
        for packet in packets:
            passed.append(packet)
            if packet.pts is None or packet.pts >= keyframe_pts:
                break
        if not passed or passed[-1].pts != keyframe_pts:
            return None
        self._frames = self._number(chain(passed, packets), keyframe)
        return next(self._frames, None)

    def _number(self, packets: Iterable[av.Packet], first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        pts = self._decoder._pts
        for count, frame in enumerate(_decode(packets, self._stream)):
            if pts is None:
                yield count, frame
            # Before the keyframe that was sought come pictures that lack what they refer to.
            elif frame.pts is not None and pts[first] <= frame.pts <= pts[-1]:
                yield int(np.searchsorted(pts, frame.pts, side="right")) - 1, frame


class _Orientation:
    """How the stored picture is turned and mirrored for display (phones store what the sensor saw)."""

    def __init__(self, frame: av.VideoFrame):
        matrix = frame.side_data.get("DISPLAYMATRIX")
        # Stored column p and row q are shown at x = a p + c q, y = b p + d q.
        a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].tolist() if matrix is not None else (1, 0, 0, 0, 1)
        self._transposed = abs(b) > abs(a)
        self._flip_rows, self._flip_columns = (b < 0, c < 0) if self._transposed else (d < 0, a < 0)

    def displayed_size(self, height: int, width: int) -> tuple[int, int]:
        return (width, height) if self._transposed else (height, width)

    def to_rgb(self, frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
        """Converts a frame to uint8 (3, height, width), upright, at `size` (height, width)."""
        height, width = self.displayed_size(*size)  # its own inverse
        # Planar, which libswscale writes in half the time of packed RGB.
        frame = frame.reformat(width=width, height=height, format="gbrp", interpolation="BILINEAR")
        green, blue, red = (
            np.frombuffer(plane, dtype=np.uint8).reshape(height, plane.line_size)[:, :width] for plane in frame.planes
        )
        image = np.stack([red, green, blue])
        if self._transposed:
            image = image.transpose(0, 2, 1)
        if self._flip_rows:
            image = image[:, ::-1]
        if self._flip_columns:
            image = image[:, :, ::-1]
        return np.ascontiguousarray(image)


class _Source:
    """Something that FFmpeg can open as often as needed: a path, bytes or a file object that can go back."""

    def __init__(self, source):
        if isinstance(source, (bytes, bytearray, memoryview)):
            self.name, self._file = f"<{len(source)} bytes>", bytes(source)
        elif isinstance(source, (str, os.PathLike)):
            self.name = os.fsdecode(source)
            self._file = self._download() if self.name.lower().startswith(("http://", "https://")) else self._find()
        elif callable(getattr(source, "read", None)):
            self.name = str(getattr(source, "name", f"<{type(source).__name__}>"))
            if not isinstance(source.read(0), bytes):
                raise VideoDecodingError(f"{self.name}: the file object must be opened in binary mode ('rb')")
            self._file = source if source.seekable() else self._to_temporary_file(source)
        else:
            raise VideoDecodingError(
                f"source ({type(source).__name__}) must be a path, a file:// or http(s) URL, bytes or a binary file "
                "object"
            )
        if self._file == b"" or (isinstance(self._file, str) and os.path.getsize(self._file) == 0):
            raise VideoDecodingError(f"{self.name}: is empty (0 bytes)")

    def open(self) -> av.container.InputContainer:
        if isinstance(self._file, str):
            # With the protocol, so that FFmpeg does not take a colon in the name for one.
            file = f"file:{self._file}"
        elif isinstance(self._file, bytes):
            file = io.BytesIO(self._file)
        else:
            file = self._file
            file.seek(0)
        try:
            container = av.open(file, metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoDecodingError(f"{self.name}: is no readable video, or is truncated ({reason})") from error
        if container.format.name == "tty":  # FFmpeg would play any text as ANSI art
            container.close()
            raise VideoDecodingError(f"{self.name}: is a text file, no video")
        return container

    def _find(self) -> str:
        path = self.name
        if path.lower().startswith("file://"):
            path = urllib.request.url2pathname(urlparse(path).path)
        elif "://" in path and not os.path.exists(path):
            raise VideoDecodingError(f"{self.name}: only file://, http:// and https:// URLs can be read")
        if not os.path.exists(path):
            raise VideoDecodingError(f"{self.name}: no such file")
        if not os.path.isfile(path):  # a pipe could not be read twice
            raise VideoDecodingError(f"{self.name}: is a {'directory' if os.path.isdir(path) else 'pipe or device'}")
        return os.path.abspath(path)

    def _download(self) -> str:
        # Not through FFmpeg, which does not verify certificates; and the file is read more than once.
        try:
            request = urllib.request.Request(self.name, headers={"User-Agent": "vjepa-qwen"})
            with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
                return self._to_temporary_file(response)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise VideoDecodingError(f"{self.name}: cannot be downloaded ({error})") from error

    def _to_temporary_file(self, file) -> str:
        handle, path = tempfile.mkstemp(prefix="vjepa_qwen_")
        weakref.finalize(self, Path(path).unlink, missing_ok=True)
        with os.fdopen(handle, "wb") as temporary_file:
            shutil.copyfileobj(file, temporary_file, 1 << 20)
        return path


def _video_stream(container, name: str) -> av.VideoStream:
    """The stream that plays: FFmpeg's choice, which is a cover picture only if there is nothing else."""
    stream = container.streams.best("video")
    if stream is None:
        other = "only audio" if container.streams.audio else "nothing to play"
        raise VideoDecodingError(f"{name}: has no video stream ({other})")
    if stream.disposition & Disposition.attached_pic:
        raise VideoDecodingError(f"{name}: has no video stream (only audio with a cover picture)")
    if stream.codec_context is None:
        raise VideoDecodingError(f"{name}: its video codec is not known to this build of FFmpeg")
    stream.thread_type = "AUTO"
    return stream


def _demux(container, stream: av.VideoStream) -> Iterator[av.Packet]:
    """Packets in decoding order, up to the end or to where the file is damaged; none that was read only in part."""
    try:
        for packet in container.demux(stream):
            if packet.size > 0 and not packet.is_corrupt:
                yield packet
    except av.FFmpegError:
        return


def _decode(packets: Iterable[av.Packet], stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Frames in presentation order. What cannot be decoded is left out: the caller sees which frames are missing."""
    for packet in chain(packets, [None]):  # None: give what is left
        try:
            yield from stream.decode(packet)
        except av.FFmpegError:
            continue


def _is_hidden(packet: av.Packet, codec_name: str) -> bool:
    """Whether a packet is decoded but never shown: cut away by an edit list, or a reference picture of VP8."""
    return packet.is_discard or (codec_name == "vp8" and not memoryview(packet)[0] & 0x10)


def _declared_seconds(stream: av.VideoStream) -> float:
    """Length of the stream as Matroska and WebM note it ("00:01:02.500000000"), or 0."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0


__all__ = ["VideoDecoder", "VideoDecodingError"]
