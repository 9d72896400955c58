"""Where a video comes from, opened as often as needed: a path, a URL, bytes or a file object.

    source = VideoSource("clip.mp4")
    with source.open() as container:
        for packet in demux(container, video_stream(container, source.name)):
            ...

What is no video is refused here, with one line that names the source and the reason.
"""

import http.client
import io
import os
import shutil
import tempfile
import threading
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import av
from av.stream import Disposition

DOWNLOAD_TIMEOUT_SECONDS = 60
# More than 8K in all directions (7680 x 7680). What declares more is refused before memory is taken for it.
MAX_PIXELS = 1 << 26


class VideoDecodingError(ValueError):
    """A source that is no readable video. The message is one line that names the source and the reason."""


class VideoSource:
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
            if source.seekable():
                self._file, self._lock = source, threading.Lock()
            else:
                self._file = self._to_temporary_file(source)
        else:
            raise VideoDecodingError(
                f"source ({type(source).__name__}) must be a path, a file:// or http(s) URL, bytes or a binary file "
                "object"
            )
        if self._file == b"" or (isinstance(self._file, str) and os.path.getsize(self._file) == 0):
            raise VideoDecodingError(f"{self.name}: is empty (0 bytes)")

    def open(self) -> av.container.InputContainer:
        """A container of its own, with its own place in the file: several may be open side by side."""
        if isinstance(self._file, str):
            # With the protocol, so that FFmpeg does not take a colon in the name for one.
            file = f"file:{self._file}"
        elif isinstance(self._file, bytes):
            file = io.BytesIO(self._file)
        else:
            file = _View(self._file, self._lock)
        try:
            container = av.open(file, metadata_errors="replace", options={"max_pixels": str(MAX_PIXELS)})
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


class _View(io.RawIOBase):
    """A place of its own in a file object that others read as well."""

    def __init__(self, file, lock: threading.Lock):
        self._file, self._lock, self._position = file, lock, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._lock:
            base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
            self._position = offset + base if base is not None else self._file.seek(offset, io.SEEK_END)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        with self._lock:
            self._file.seek(self._position)
            data = self._file.read(size)
            self._position += len(data)
        return data


def video_stream(container, name: str) -> av.VideoStream:
    """The stream that plays: the largest of those marked as default, or else of all; never a cover picture."""
    streams = container.streams.video
    if not streams:
        other = "only audio" if container.streams.audio else "nothing to play"
        raise VideoDecodingError(f"{name}: has no video stream ({other})")
    streams = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise VideoDecodingError(f"{name}: has no video stream (only audio with a cover picture)")
    streams = [stream for stream in streams if stream.codec_context is not None]
    if not streams:
        raise VideoDecodingError(f"{name}: its video codec is not known to this build of FFmpeg")
    stream = max(
        streams, key=lambda stream: (bool(stream.disposition & Disposition.default), stream.height * stream.width)
    )
    check_num_pixels(name, stream.height, stream.width)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    stream.thread_type = "AUTO"
    return stream


def check_num_pixels(name: str, height: int, width: int):
    """Raises for a picture that is too large to be taken into memory."""
    if height * width > MAX_PIXELS:
        raise VideoDecodingError(
            f"{name}: size ({width} x {height}) must be at most {MAX_PIXELS} pixels; try a smaller or cropped copy"
        )


def demux(container, stream: av.VideoStream, damage: list[str] | None = None) -> Iterator[av.Packet]:
    """
    Packets in decoding order, up to the end or to where the file is damaged.

    The last one is left out if it was read only in part. Others that FFmpeg doubts are decoded: where recordings of a
    broadcast were joined nothing is missing.

    Args:
        damage (`list[str]`, *optional*): Gets a word for each packet in doubt, and for a failure to go on.
    """
    damage, doubtful = [] if damage is None else damage, None
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if doubtful is not None:
                yield doubtful
                doubtful = None
            if packet.is_corrupt:
                damage.append("incomplete")
                doubtful = packet
            else:
                yield packet
    except av.FFmpegError as error:
        damage.append(error.strerror)


def decode(packets, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Frames in presentation order, None for a packet asks for the rest. Leaves out what cannot be decoded."""
    for packet in packets:
        try:
            yield from stream.decode(packet)
        except av.FFmpegError:
            continue


__all__ = ["VideoDecodingError", "VideoSource", "check_num_pixels", "decode", "demux", "video_stream"]
