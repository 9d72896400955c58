"""Exact video frames at exact times, through PyAV (FFmpeg), whatever the container says about itself.

    decoder = VideoDecoder("clip.mp4")
    decoder.timestamps                                  # seconds at which each frame is shown, from the packets' pts
    for frame in decoder.frames([0, 10, 20], size=(292, 519)):
        ...                                             # uint8, (3, height, width), RGB

A first pass over the file reads packets and decodes only the first picture. That gives the true number of frames and
their times also where the header has none (WebM, live MKV) or where the frame rate varies. A second pass goes to the
groups of pictures that are needed, two or more of them side by side in threads (FFmpeg runs without Python's lock),
drops pictures that no other one refers to, stops with the last one that is wanted, and converts to RGB at the wanted
size in one step of libswscale. What that does not find, because it is damaged, is looked for picture by picture.
"""

import os
import queue
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import av
import numpy as np
from transformers.utils import logging

from .video_pixels import FrameConverter, Orientation
from .video_source import VideoDecodingError, VideoSource, check_num_pixels, decode, demux, video_stream

logger = logging.get_logger(__name__)

# Jumping to a keyframe flushes the decoder, which costs about as much as this many frames.
SEEK_COST_FRAMES = 8
# Groups of pictures shorter than this are decoded with the next one where that is wanted as well.
MIN_GROUP_FRAMES = 16
# Keyframes to try, each before the last, until decoding from the beginning of the file is the safer way.
SEEK_ATTEMPTS = 3
# Threads that decode one group each. More would take memory and leave the codec's own threads nothing to do.
MAX_READERS = 4
# Of smaller frames a thread of the codec's own decodes one in less time than handing it over takes.
MIN_THREADED_PIXELS = 1 << 16
# Converted frames that a thread may be ahead, and how much memory these may take.
MAX_FRAMES_AHEAD = 32
MAX_BYTES_AHEAD = 1 << 24
# Shown for this long when neither a packet's duration nor a frame rate says how long the only frame lasts.
FALLBACK_FRAME_SECONDS = 1 / 25


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
        height, width (`int`): Size of the picture as a player shows it: rotated, with square pixels. Where the
            resolution changes on the way: that of the first frame, to which the others are resized.

    Raises:
        VideoDecodingError: for whatever cannot be read as a video.
    """

    def __init__(self, source):
        self._source = VideoSource(source)
        self.name = self._source.name
        self._scan()

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
        """Reads the time of every frame, from the packets alone where these have times, and the size of the first."""
        with self._source.open() as container:
            stream = video_stream(container, self.name)
            # One picture is wanted, and soon.
            stream.codec_context.thread_count = 1
            num_packets, seconds_per_tick, damage = 0, float(stream.time_base), []
            pts, durations, keyframe_pts, first_keyframe_pts, has_times = [], [], [], None, True
            first_frame = None
            for packet in demux(container, stream, damage):
                num_packets += 1
                if packet.pts is None:
                    has_times = False
                    break
                if first_keyframe_pts is None and packet.is_keyframe:
                    first_keyframe_pts = packet.pts
                if first_frame is None:
                    first_frame = next(decode([packet], stream), None)
                # A recording may begin in the middle of a group of pictures: nothing shows what came before.
                if first_keyframe_pts is None or packet.pts < first_keyframe_pts:
                    continue
                if _is_hidden(packet, stream.codec_context.name):
                    continue
                pts.append(packet.pts)
                durations.append(packet.duration or 0)
                if packet.is_keyframe:
                    keyframe_pts.append(packet.pts)
            if has_times and first_frame is None:
                first_frame = next(decode([None], stream), None)
            # What the header promises. Of an MP4 not its sample count, which includes what edit lists cut away.
            declared_frames = len(stream.index_entries) if "mp4" in container.format.name else 0
            declared_seconds = _declared_seconds(stream)
            frame_seconds = 1 / float(stream.average_rate or stream.guessed_rate or 1 / FALLBACK_FRAME_SECONDS)
            pixel_aspect, codec_name = float(stream.sample_aspect_ratio or 1) or 1.0, stream.codec_context.name
            # `_pts` is None when frames must be counted because they carry no times of their own.
            self._pts = None
            if has_times and pts:
                self._pts, order = np.unique(np.array(pts, dtype=np.int64), return_index=True)
                self._keyframe_pts = np.intersect1d(np.array(keyframe_pts, dtype=np.int64), self._pts)
                if not self._can_seek(container, stream):
                    self._keyframe_pts = self._keyframe_pts[:1]
        if self._pts is not None:
            timestamps = (self._pts - self._pts[0]) * seconds_per_tick
            last_seconds = durations[order[-1]] * seconds_per_tick
        else:
            timestamps, num_packets, first_frame = self._scan_by_decoding(frame_seconds)
            last_seconds = 0.0
        if len(timestamps) == 0:
            raise VideoDecodingError(f"{self.name}: the video stream has no frames")
        if first_frame is None:
            hint = "; if it is an animated WebP, try GIF, APNG or MP4" if codec_name == "webp" else ""
            raise VideoDecodingError(f"{self.name}: no frame can be decoded (codec {codec_name}{hint})")
        if last_seconds <= 0:
            last_seconds = float(np.median(np.diff(timestamps))) if len(timestamps) > 1 else frame_seconds
        self.timestamps = timestamps
        self.duration_seconds = float(timestamps[-1] + last_seconds)
        self._set_size(first_frame, pixel_aspect)
        if 0 < num_packets < declared_frames:
            logger.warning(
                f"{self.name}: damaged or truncated, {len(timestamps)} of {declared_frames} frames can be read"
            )
        elif declared_seconds > self.duration_seconds + max(0.25, 2 * last_seconds):
            logger.warning(
                f"{self.name}: damaged or truncated, {self.duration_seconds:.2f} of {declared_seconds:.2f} seconds "
                "can be read"
            )
        elif damage:
            logger.warning(
                f"{self.name}: damaged or truncated, {len(timestamps)} frames ({self.duration_seconds:.2f} seconds) "
                f"can be read, packets in doubt: {len(damage)} ({damage[0]})"
            )

    def _scan_by_decoding(self, frame_seconds: float) -> tuple[np.ndarray, int, av.VideoFrame | None]:
        """For containers without times (raw streams, some AVI): counts frames by decoding them all."""
        times, first_frame = [], None
        with self._source.open() as container:
            stream = video_stream(container, self.name)
            for frame in decode(chain(demux(container, stream), [None]), stream):
                first_frame = first_frame or frame
                times.append(frame.time)
        if None in times or np.any(np.diff(times) <= 0):
            return np.arange(len(times)) * frame_seconds, len(times), first_frame
        return np.array(times, dtype=np.float64) - (times[0] if times else 0), len(times), first_frame

    def _can_seek(self, container, stream: av.VideoStream) -> bool:
        """Whether a keyframe in the middle can be reached. Not all containers have an index."""
        middle = len(self._keyframe_pts) // 2
        return middle == 0 or _packets_from(container, stream, int(self._keyframe_pts[middle])) is not None

    def _set_size(self, frame: av.VideoFrame, pixel_aspect: float):
        """From the first picture, which knows size and rotation better than the header."""
        self._orientation = Orientation(frame)
        # Enlarges, never reduces: no detail is lost before the resize that follows.
        stored_height = frame.height if pixel_aspect >= 1 else round(frame.height / pixel_aspect)
        stored_width = round(frame.width * pixel_aspect) if pixel_aspect >= 1 else frame.width
        check_num_pixels(self.name, stored_height, stored_width)
        self.height, self.width = self._orientation.displayed_size(stored_height, stored_width)

    # Second pass: the frames themselves

    def frames(
        self, indices: Iterable[int], *, size: tuple[int, int] | None = None, crop: tuple[int, int] | None = None
    ) -> Iterator[np.ndarray]:
        """
        Decodes frames one after the other; at most a few are in memory.

        Args:
            indices (iterable of `int`): Which frames, best in ascending order; the same one may come several times.
            size (`tuple[int, int]`, *optional*):
                `(height, width)` to resize to while decoding (bilinear, antialiased). Defaults to the size of the
                video. On average within one level (of 255) of what torchvision makes of whole frames.
            crop (`tuple[int, int]`, *optional*): `(height, width)` of the centre to keep of that, at most.

        Yields:
            `np.ndarray` of shape `(3, height, width)`, uint8: red, green and blue. A frame that is damaged is replaced
            by the one before it, with a warning at the end.

        Raises:
            VideoDecodingError: when not a single frame can be decoded, or the size is too large to be meant.
            IndexError: for a frame that does not exist.
        """
        indices = list(indices)
        for index in indices:
            if not 0 <= index < self.num_frames:
                raise IndexError(f"index ({index}) must be in 0..{self.num_frames - 1}, the frames of {self.name}")
        size = size or (self.height, self.width)
        check_num_pixels(self.name, *size)
        readers = [] if self._pts is None else self._start_readers(self._groups(indices), size, crop)
        images = _in_turn(readers)
        # For what the readers do not find.
        search, converter = _FrameSearch(self), FrameConverter(self._orientation, size, crop)
        num_replaced, is_replaced, previous, image = 0, False, None, None
        try:
            for index in indices:
                if index != previous:
                    image, is_replaced = next(images, None), False
                    if image is None:
                        found, frame = search.frame_shown_at(index)
                        image, is_replaced = converter.to_rgb(frame), found != index
                num_replaced += is_replaced
                previous = index
                yield image
        finally:
            for reader in readers:
                reader.stop()
            search.close()
            if num_replaced:
                logger.warning(
                    f"{self.name}: damaged, {num_replaced} of {len(indices)} frames could not be decoded and were "
                    "replaced by the frame before"
                )

    def _groups(self, indices: list[int]) -> list["_Group"]:
        """What is decoded in one go, from a keyframe on."""
        groups = []
        for index in indices:
            keyframe = self._keyframe_before(index)
            if groups:
                group, last = groups[-1], groups[-1].indices[-1]
                if index == last:
                    continue
                is_near = keyframe - last <= SEEK_COST_FRAMES and index - group.keyframe < MIN_GROUP_FRAMES
                if index > last and (keyframe == group.keyframe or is_near):
                    group.indices.append(index)
                    continue
            groups.append(_Group(keyframe, [index]))
        return groups

    def _start_readers(self, groups: list["_Group"], size, crop) -> list["_GroupReader"]:
        num_cores = os.cpu_count() or 1
        num_readers = min(len(groups), num_cores, MAX_READERS)
        height, width = (min(length, kept) for length, kept in zip(size, crop or size, strict=True))
        num_ahead = min(max(MAX_BYTES_AHEAD // (3 * height * width), 2), MAX_FRAMES_AHEAD)
        # Few groups do not divide evenly, and readers of many frames wait for their turn: the codec's own threads,
        # which take more memory, then keep the cores busy.
        is_uneven = (
            len(groups) < 2 * num_readers or max((len(group.indices) for group in groups), default=0) > num_ahead
        )
        if self.height * self.width < MIN_THREADED_PIXELS:
            num_threads = 1
        else:
            num_threads = num_cores if is_uneven else max(num_cores // num_readers, 1)
        return [
            _GroupReader(
                self,
                groups[first::num_readers],
                FrameConverter(self._orientation, size, crop),
                num_threads=num_threads,
                num_ahead=num_ahead,
            )
            for first in range(num_readers)
        ]

    def _keyframe_before(self, index: int) -> int:
        """Index of the last keyframe at or before a frame; 0 where there is no seeking."""
        if self._pts is None:
            return 0
        keyframes = self._keyframe_pts[: np.searchsorted(self._keyframe_pts, self._pts[index], side="right")]
        return int(np.searchsorted(self._pts, keyframes[-1])) if len(keyframes) else 0


@dataclass
class _Group:
    """Frames that are decoded in one go, in ascending order, and the keyframe that this begins with."""

    keyframe: int
    indices: list[int]


class _GroupReader:
    """A thread that decodes groups of pictures, some frames ahead of whoever takes them."""

    def __init__(self, decoder: VideoDecoder, groups: list[_Group], converter, *, num_threads: int, num_ahead: int):
        self._decoder, self.groups, self._converter, self._num_threads = decoder, groups, converter, num_threads
        self._container, self._stream = None, None
        self._images, self._space, self._is_stopped = queue.SimpleQueue(), threading.Semaphore(num_ahead), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> np.ndarray | None:
        """The next frame of the next group, converted; None for one that was not found."""
        image = self._images.get()
        self._space.release()
        if isinstance(image, Exception):
            raise image
        return image

    def stop(self):
        self._is_stopped = True
        self._space.release()
        self._thread.join()

    def _run(self):
        try:
            for group in self.groups:
                images = ((index, self._converter.to_rgb(frame)) for index, frame in self._read(group))
                found, image = next(images, (None, None))
                for index in group.indices:
                    self._space.acquire()
                    if self._is_stopped:
                        return
                    if found == index:
                        self._images.put(image)
                        found, image = next(images, (None, None))
                    else:
                        self._images.put(None)
        except Exception as error:  # raised where the frames are taken
            self._images.put(error)
        finally:
            if self._container is not None:
                self._container.close()

    def _read(self, group: _Group) -> Iterator[tuple[int, av.VideoFrame]]:
        """The frames of a group that can be decoded, in ascending order."""
        wanted = {int(self._decoder._pts[index]): index for index in group.indices}
        packets = self._packets_of(group)
        codec, unsent, last_found = self._stream.codec_context, set(wanted), -1
        can_skip = _can_skip(codec)
        for packet in chain(packets, [None]):
            if self._is_stopped:
                return
            if packet is not None:
                if can_skip:
                    codec.skip_frame = "DEFAULT" if packet.pts in unsent else "NONREF"
                unsent.discard(packet.pts)
            is_last = packet is None or not unsent
            # With the last one goes the request for what the decoder holds back.
            for frame in decode([packet, None] if is_last and packet is not None else [packet], self._stream):
                index = wanted.get(frame.pts, -1)
                if index > last_found:
                    last_found = index
                    yield index, frame
            if is_last:
                return

    def _packets_of(self, group: _Group) -> Iterator[av.Packet]:
        """Packets from the keyframe of a group on, or from the beginning of the file where that is not reached."""
        if group.keyframe > 0:
            if self._container is None:
                self._open()
            packets = _packets_from(self._container, self._stream, int(self._decoder._pts[group.keyframe]))
            if packets is not None:
                return packets
        if self._container is not None:
            self._container.close()
        self._open()
        return demux(self._container, self._stream)

    def _open(self):
        self._container = self._decoder._source.open()
        self._stream = video_stream(self._container, self._decoder.name)
        self._stream.codec_context.thread_count = self._num_threads


def _in_turn(readers: list[_GroupReader]) -> Iterator[np.ndarray | None]:
    """Frames in the order of the groups, which were dealt out to the readers in turn."""
    turn = 0
    while readers and turn // len(readers) < len(readers[turn % len(readers)].groups):
        reader = readers[turn % len(readers)]
        for _ in reader.groups[turn // len(readers)].indices:
            yield reader.take()
        turn += 1


class _FrameSearch:
    """One open file and a place in it: decodes everything on the way, and knows what is shown instead of a frame."""

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
        self._frames = self._number(demux(self._container, self._stream), 0)

    def _open(self):
        self._container = self._decoder._source.open()
        self._stream = video_stream(self._container, self._decoder.name)

    def _seek(self, keyframe: int) -> tuple[int, av.VideoFrame] | None:
        """Makes `_frames` begin at a keyframe and returns the first of them, or None where that does not succeed."""
        if self._container is None:
            self._open()
        packets = _packets_from(self._container, self._stream, int(self._decoder._pts[keyframe]))
        if packets is None:
            return None
        self._frames = self._number(packets, keyframe)
        return next(self._frames, None)

    def _number(self, packets: Iterable[av.Packet], first: int) -> Iterator[tuple[int, av.VideoFrame]]:
        pts = self._decoder._pts
        for count, frame in enumerate(decode(chain(packets, [None]), self._stream)):
            if pts is None:
                yield count, frame
            # Before the keyframe that was sought come pictures that lack what they refer to.
            elif frame.pts is not None and pts[first] <= frame.pts <= pts[-1]:
                yield int(np.searchsorted(pts, frame.pts, side="right")) - 1, frame


def _packets_from(container, stream: av.VideoStream, keyframe_pts: int) -> Iterator[av.Packet] | None:
    """Goes to a keyframe and returns the packets from there on, or None where it is not reached."""
    try:
        container.seek(keyframe_pts, stream=stream)
    except av.FFmpegError:
        return None
    # Containers seek by an index of their own, by decoding times or by guessing: see whether the keyframe comes.
    packets = demux(container, stream)
    for packet in packets:
        if packet.pts == keyframe_pts:
            return chain([packet], packets)
        if packet.pts is None or packet.pts > keyframe_pts:
            break
    return None


def _can_skip(codec: av.VideoCodecContext) -> bool:
    """Whether FFmpeg knows of a packet by itself that no other picture refers to it."""
    if codec.name == "hevc":
        # Pictures of a higher temporal layer may refer to one that its own layer does not. The configuration record
        # of MP4 and Matroska (ISO/IEC 14496-15) says how many layers there are.
        record = codec.extradata or b""
        return len(record) > 22 and record[0] == 1 and record[21] >> 3 & 7 == 1
    return codec.name in ("h264", "mpeg2video")


def _is_hidden(packet: av.Packet, codec_name: str) -> bool:
    """Whether a packet is decoded but never shown: cut away by an edit list, or a reference picture of VP8."""
    return packet.is_discard or (codec_name == "vp8" and not memoryview(packet)[0] & 0x10)


def _declared_seconds(stream: av.VideoStream) -> float:
    """Length of the stream as Matroska and WebM note it ("00:01:02.500000000"), or 0."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3]) if match else 0.0


__all__ = ["VideoDecoder", "VideoDecodingError"]
