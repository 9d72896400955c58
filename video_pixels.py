"""Frames as FFmpeg decodes them to red, green and blue as a player shows them: upright, resized, cropped, SDR.

    converter = FrameConverter(Orientation(frame), size=(292, 519), crop=(256, 256))
    converter.to_rgb(frame)                             # uint8, (3, 256, 256)

* Matrix (BT.601, BT.709, BT.2020) and range are those that the frame names. A frame that names none is taken as BT.601
  and limited range, as the loaders do whose frames V-JEPA 2 was trained on.
* HDR (PQ or HLG): to linear light, where 1 is the reference white of 203 cd/m2 (ITU-R BT.2408; HLG as on a display of
  1000 cd/m2); BT.2020 to BT.709 primaries; the "mobius" curve of FFmpeg's tone map (straight up to 0.3, then bent so
  that 1000 cd/m2 become 1) on the largest of red, green and blue, which keeps the hue; gamma 2.4.
* Alpha: shown on white, as in a browser.
* Interlaced: both fields are in the picture, one line each; resizing blends them.
"""

import functools

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc, VideoReformatter

PEAK_NITS = 1000.0
REFERENCE_WHITE_NITS = 203.0
MOBIUS_START = 0.3
DISPLAY_GAMMA = 2.4
BT2020_TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
BT2020_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)


class Orientation:
    """How the stored picture is turned and mirrored for display (phones store what the sensor saw)."""

    def __init__(self, frame: av.VideoFrame):
        matrix = frame.side_data.get("DISPLAYMATRIX")
        # Stored column p and row q are shown at x = a p + c q, y = b p + d q.
        a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].tolist() if matrix is not None else (1, 0, 0, 0, 1)
        self._transposed = abs(b) > abs(a)
        self._flip_rows, self._flip_columns = (b < 0, c < 0) if self._transposed else (d < 0, a < 0)

    def displayed_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width as shown from those stored, or the other way round."""
        return (width, height) if self._transposed else (height, width)

    def upright(self, plane: np.ndarray) -> np.ndarray:
        """A view of one plane (height, width) as it is shown."""
        plane = plane.T if self._transposed else plane
        return plane[:: -1 if self._flip_rows else 1, :: -1 if self._flip_columns else 1]


class FrameConverter:
    """
    Converts frames of one video; for one thread.

    Args:
        orientation (`Orientation`): Of the video.
        size (`tuple[int, int]`): `(height, width)` to resize to, as shown.
        crop (`tuple[int, int]`, *optional*): `(height, width)` of the centre that is kept; what is smaller stays.
    """

    def __init__(self, orientation: Orientation, size: tuple[int, int], crop: tuple[int, int] | None = None):
        self._orientation = orientation
        self._stored_size = orientation.displayed_size(*size)
        # Rounded down, as transformers' center_crop does.
        rows, columns = (
            slice(start := (length - kept) // 2, start + kept)
            for length, kept in ((length, min(length, kept)) for length, kept in zip(size, crop or size, strict=True))
        )
        self._crop = rows, columns
        # Keeps libswscale's tables from frame to frame.
        self._reformatter = VideoReformatter()

    def to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Converts a frame to uint8 (3, height, width): red, green and blue."""
        if frame.color_trc in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):
            rgb = np.stack(self._planes(frame, "gbrp16le", np.uint16))
            is_wide = frame.color_primaries in (ColorPrimaries.BT2020, ColorPrimaries.UNSPECIFIED)
            return tone_map(rgb, frame.color_trc, is_wide)
        if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
            *rgb, alpha = self._planes(frame, "gbrap", np.uint8)
            weight = alpha.astype(np.float32) / 255
            return (np.stack(rgb) * weight + 255 * (1 - weight) + 0.5).astype(np.uint8)
        return np.stack(self._planes(frame, "gbrp", np.uint8))

    def _planes(self, frame: av.VideoFrame, pixel_format: str, dtype: type) -> list[np.ndarray]:
        """Red, green, blue and, where the format has it, alpha: views of (height, width), upright and cropped."""
        height, width = self._stored_size
        # Planar, which libswscale writes in half the time of packed RGB. One thread: readers share the cores.
        frame = self._reformatter.reformat(
            frame, width=width, height=height, format=pixel_format, interpolation="BILINEAR", threads=1
        )
        green, blue, red, *alpha = (
            self._orientation.upright(np.frombuffer(plane, dtype=dtype).reshape(height, -1)[:, :width])[self._crop]
            for plane in frame.planes
        )
        return [red, green, blue, *alpha]


def tone_map(code: np.ndarray, transfer: int, is_wide: bool) -> np.ndarray:
    """
    HDR to SDR.

    Args:
        code (`np.ndarray` of shape `(3, height, width)`, uint16): Red, green and blue as coded, 65535 is full.
        transfer (`int`): `ColorTrc.SMPTE2084` (PQ) or `ColorTrc.ARIB_STD_B67` (HLG).
        is_wide (`bool`): Whether primaries are BT.2020's.

    Returns:
        `np.ndarray` of the same shape, uint8: BT.709 primaries, gamma 2.4.
    """
    linear = _linear_table(transfer)[code]
    if transfer == ColorTrc.ARIB_STD_B67:  # from light at the camera to light on a display of 1000 cd/m2
        linear *= np.tensordot(BT2020_LUMINANCE, linear, 1) ** np.float32(0.2)
        linear *= PEAK_NITS / REFERENCE_WHITE_NITS
    if is_wide:
        linear = np.tensordot(BT2020_TO_BT709, linear, 1)
    linear = linear.clip(0)
    brightest = linear.max(axis=0).clip(1e-6)
    linear *= _mobius(brightest) / brightest
    return (linear.clip(0, 1) ** np.float32(1 / DISPLAY_GAMMA) * 255 + 0.5).astype(np.uint8)


@functools.cache
def _linear_table(transfer: int) -> np.ndarray:
    """Linear light of each of 65536 codes: for PQ (SMPTE ST 2084) 1 is reference white, for HLG (BT.2100) the peak."""
    code = np.arange(1 << 16) / 65535
    if transfer == ColorTrc.SMPTE2084:
        power = code ** (32 / 2523)
        nits = 10000 * ((power - 0.8359375).clip(0) / (18.8515625 - 18.6875 * power)) ** (16384 / 2610)
        return (nits / REFERENCE_WHITE_NITS).astype(np.float32)
    high = (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return np.where(code <= 0.5, code**2 / 3, high).astype(np.float32)


def _mobius(value: np.ndarray) -> np.ndarray:
    """Tone curve of FFmpeg's filter "tonemap": straight up to `MOBIUS_START`, 1 at the peak."""
    start, peak = MOBIUS_START, PEAK_NITS / REFERENCE_WHITE_NITS
    a = -(start**2) * (peak - 1) / (start**2 - 2 * start + peak)
    b = (start**2 - 2 * start * peak + peak) / (peak - 1)
    bent = (b**2 + 2 * b * start + start**2) / (b - a) * (value + a) / (value + b)
    return np.where(value <= start, value, bent)


__all__ = ["FrameConverter", "Orientation", "tone_map"]
