"""Clips made on the fly. Every frame carries its own number as a bar code, so that exactness is read and not believed.

write_clip("clip.mp4", num_frames=30)
assert read_number(frame) == 12            # (3, height, width), uint8 or normalised
"""

import io
import wave
from fractions import Fraction

import av
import numpy as np

# The code is a square in the centre, as wide as this part of the short edge: a centre crop of 256/292 keeps it.
CODE_FRACTION = 0.6
NUM_CELLS = 4
# Corners that no rotation and no mirroring but one maps onto itself; the number in the other twelve does the rest.
CORNERS = {0: 1, 3: 1, 12: 0, 15: 1}
NUMBER_CELLS = [cell for cell in range(NUM_CELLS**2) if cell not in CORNERS]


def draw_frame(number: int, height: int, width: int) -> np.ndarray:
    """A frame (height, width, 3) uint8 with its number (below 4096) on a background that moves and has colour."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 2 + number * 3, columns + number, rows + columns], axis=-1) % 160 + 40
    cells = np.zeros(NUM_CELLS**2)
    for cell, bit in CORNERS.items():
        cells[cell] = bit
    for position, cell in enumerate(NUMBER_CELLS):
        cells[cell] = number >> position & 1
    top, left, side = _code_square(height, width)
    scale = np.arange(side) * NUM_CELLS // side
    code = cells.reshape(NUM_CELLS, NUM_CELLS)[scale][:, scale]
    image[top : top + side, left : left + side] = code[..., None] * 255
    return image.astype(np.uint8)


def read_number(image, crop_fraction: float = 1.0) -> int:
    """The number of a frame (3, height, width); `crop_fraction` is what a centre crop left of the short edge."""
    image = np.asarray(image, dtype=np.float64)
    side = CODE_FRACTION * min(image.shape[1:]) / crop_fraction
    centers = (np.arange(NUM_CELLS) + 0.5 - NUM_CELLS / 2) * side / NUM_CELLS
    rows = np.round(image.shape[1] / 2 + centers - 0.5).astype(int)
    columns = np.round(image.shape[2] / 2 + centers - 0.5).astype(int)
    cells = image.mean(axis=0)[np.ix_(rows, columns)].ravel()
    low, high = cells.min(), cells.max()
    bits = (cells > (low + high) / 2).astype(int)
    assert all(bits[cell] == bit for cell, bit in CORNERS.items()), f"no upright bar code: {bits}"
    assert np.all(np.abs(cells - np.where(bits, high, low)) < 0.3 * (high - low)), f"blurred bar code: {cells}"
    return sum(int(bits[cell]) << position for position, cell in enumerate(NUMBER_CELLS))


def _code_square(height: int, width: int) -> tuple[int, int, int]:
    side = round(CODE_FRACTION * min(height, width))
    return (height - side) // 2, (width - side) // 2, side


class Pipe(io.RawIOBase):
    """A file that can only be written on, as a live stream is: no duration, no frame count, no index."""

    def __init__(self):
        self.contents = bytearray()

    def writable(self):
        return True

    def write(self, data):
        self.contents += data
        return len(data)


def write_clip(
    target,
    *,
    num_frames: int = 30,
    height: int = 90,
    width: int = 160,
    rate: int = 30,
    codec: str = "libx264",
    codec_options: dict | None = None,
    container_format: str | None = None,
    container_options: dict | None = None,
    frame_milliseconds: list[int] | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    pixel_aspect: Fraction | None = None,
    pixel_format: str = "yuv420p",
    image=None,
):
    """
    Writes a clip to a path or a file object and returns the target.

    Args:
        frame_milliseconds: When each frame is shown, for a variable rate or a start that is not 0.
        height, width: As drawn and as a player should show it.
        rotation, mirrored: Degrees counter-clockwise and then left for right: what the player is told to do. The
            frames are stored so that it makes them upright.
        pixel_aspect: Width of a stored pixel by its height; the frames are stored narrower or wider than drawn.
        image: `(height, width, 3)` uint8 to show instead of numbered frames.
    """
    if codec_options is None:
        # Two B-frames and short groups of pictures: order of decoding and of presentation differ, and seeking matters.
        codec_options = {"preset": "veryfast", "g": "12", "bf": "2"} if codec == "libx264" else {}
    file = target if isinstance(target, io.IOBase) else str(target)
    with av.open(file, "w", format=container_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=codec_options)
        stored_height, stored_width = (width, height) if rotation % 180 else (height, width)
        stored_width = round(stored_width / (pixel_aspect or 1))
        stream.width, stream.height, stream.pix_fmt = stored_width, stored_height, pixel_format
        if frame_milliseconds is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if rotation or mirrored:
            stream.set_display_rotation(rotation, hflip=mirrored)
        for number in range(num_frames):
            array = draw_frame(number, height, width) if image is None else image
            array = np.rot90(array[:, ::-1] if mirrored else array, -rotation // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if pixel_aspect is not None:
                frame = frame.reformat(width=stored_width, height=stored_height)
            frame.pts = number if frame_milliseconds is None else frame_milliseconds[number]
            frame.time_base = Fraction(1, rate) if frame_milliseconds is None else Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target


def write_live_clip(container_format: str, **kwargs) -> bytes:
    """A clip as a browser records it: written in one go, without duration, frame count or index."""
    pipe = Pipe()
    write_clip(pipe, container_format=container_format, **kwargs)
    return bytes(pipe.contents)


def write_audio(path, seconds: float = 0.5):
    """A file with nothing but sound."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(np.zeros(int(8000 * seconds), dtype=np.int16).tobytes())
    return path
