"""Memory and time of `segment` as a video grows from 10 seconds to 2 hours, 720p H.264, toy checkpoint, the CPU.

    python -m benchmarks.long_video                  # about 7 minutes on 2 cores
    python -m benchmarks.long_video --minutes 1 4

Peak memory is the operating system's, counted from a process that has only loaded torch. The files are made in
seconds: one short encode whose packets are written over and over, each time later.
"""

import argparse
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch  # noqa: F401  what a fresh process has loaded before it is measured

from .measure import measure, report

FRAMES_PER_SECOND = 30
LOOP_SECONDS = 10
MINUTES = [10 / 60, 2, 10, 120]
# Half of the frames are such as nothing refers to, and a seek finds a keyframe each second: as phones and sites do it.
ENCODER_OPTIONS = {"preset": "veryfast", "crf": "30", "g": "30", "bf": "1", "sc_threshold": "0"}


def draw_frame(number: int) -> np.ndarray:
    """Bars that move, in another colour every 2.5 seconds, `(720, 1280, 3)` uint8."""
    columns = (np.arange(1280) + 4 * number) // 64 % 2
    scene = number * 4 // LOOP_SECONDS // FRAMES_PER_SECOND
    colors = np.array([[20 + 50 * scene, 60, 200 - 40 * scene], [220, 40 * scene, 90]], dtype=np.uint8)
    return np.broadcast_to(colors[columns], (720, 1280, 3))


def write_loop(path: str) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=ENCODER_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        for number in range(LOOP_SECONDS * FRAMES_PER_SECOND):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(draw_frame(number)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def repeat(loop_path: str, path: str, seconds: float) -> None:
    """Writes the packets of the loop until the file has the length; nothing is encoded."""
    with av.open(loop_path) as loop:
        template = loop.streams.video[0]
        packets = [packet for packet in loop.demux(template) if packet.dts is not None]
        loop_ticks = int(LOOP_SECONDS / template.time_base)
        times = [(packet.pts, packet.dts) for packet in packets]
        with av.open(path, "w") as container:
            stream = container.add_stream_from_template(template)
            for repetition in range(round(seconds / LOOP_SECONDS)):
                for packet, (pts, dts) in zip(packets, times, strict=True):
                    packet.stream, packet.time_base = stream, Fraction(template.time_base)
                    packet.pts, packet.dts = pts + repetition * loop_ticks, dts + repetition * loop_ticks
                    container.mux(packet)


def segment(path: str, seconds: float) -> None:
    """What is measured: from nothing but torch to the events."""
    from vjepa_qwen import TOY_CHECKPOINT, VJepaQwenProcessor

    video = VJepaQwenProcessor.from_pretrained(TOY_CHECKPOINT).segment(path)[0]
    if abs(video.duration_seconds - seconds) > 1 or len(video.timestamps) < 3 * seconds:
        raise RuntimeError(f"{video.duration_seconds} s, {len(video.timestamps)} frames")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=MINUTES, help="lengths; the second is 1.00x")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_loop(f"{folder}/loop.mp4")
        contenders = {}
        for minutes in options.minutes:
            path, seconds = f"{folder}/{minutes:g}.mp4", minutes * 60
            repeat(f"{folder}/loop.mp4", path, seconds)
            contenders[f"{minutes:.3g} min"] = (segment, path, seconds)
        # Without a warm-up call, whose memory would not be counted.
        runs = measure(contenders, rounds=options.rounds, warm_up=False)
    report(
        "segment() as a 720p video grows",
        {"toy checkpoint": runs},
        baseline=list(contenders)[min(1, len(contenders) - 1)],
        output=options.output,
    )


if __name__ == "__main__":
    main()
