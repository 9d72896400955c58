"""From a file to 64 normalised frames (64, 3, 256, 256): ours against the loaders that transformers offers.

    pip install ".[benchmarks]"
    python -m benchmarks.decoding                       # about 8 minutes on 2 quiet cores
    python -m benchmarks.decoding --cases short vp9 --rounds 5

Ours is `VJepaQwenVideoProcessor` on a path. The others are `transformers.video_utils.load_video` with its backends
(PyAV, torchcodec, decord, OpenCV), followed by `VJEPA2VideoProcessor`. The frames are the same ones: the mean
difference to torchcodec's is printed for every case; it is that of two ways to resize. torchcodec is given the FFmpeg
of PyAV's wheel, so that both decode with the same one. Each run has a process of its own, in which everything has been
imported before.

"preprocessing" begins with decoded frames: theirs become RGB and go through `VJEPA2VideoProcessor`. Memory is there
that of a second run, and says little. Peers that take a minute for a single run are run once (`--slow-rounds`).
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console
from transformers import VJEPA2VideoProcessor
from transformers.video_utils import load_video

from vjepa_qwen.video_pixels import FrameConverter, Orientation
from vjepa_qwen.video_processing_vjepa_qwen import VJepaQwenVideoProcessor

from .measure import measure, report

# Imported here, so that the time this takes is not measured. A peer that is missing is reported as such.
for module in ("torchcodec.decoders", "decord", "cv2"):
    with contextlib.suppress(ImportError, RuntimeError, OSError):
        __import__(module)

NUM_FRAMES = 64
FRAMES_PER_SECOND = 30
# Bit rates that YouTube recommends for 30 frames per second.
H264 = {"codec": "libx264", "options": {"preset": "veryfast", "b": "8M"}}
H264_CRF = {"codec": "libx264", "options": {"preset": "veryfast", "crf": "23"}}
H264_720P = {"codec": "libx264", "options": {"preset": "veryfast", "b": "5M"}, "g": 30}
VP9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8", "crf": "31", "b": "0", "g": "128"}}
# What it is, size, seconds that are encoded, how often these are repeated, codec, peers, peers that are run once.
CASES = {
    "h264": (
        "60 s 1080p H.264, groups of 30",
        1080,
        1920,
        12,
        5,
        H264 | {"g": 30},
        ["pyav", "torchcodec"],
        ["decord", "opencv"],
    ),
    "groups": ("60 s 1080p H.264, groups of 250, crf 23", 1080, 1920, 12, 5, H264_CRF, ["pyav", "torchcodec"], []),
    "long": (
        "10 min 720p H.264, groups of 30",
        720,
        1280,
        20,
        30,
        H264_720P,
        ["torchcodec"],
        ["pyav", "decord"],
    ),
    "vp9": ("10 s 720p VP9", 720, 1280, 10, 1, VP9, ["torchcodec", "opencv"], []),
    "intra": ("10 s 1080p H.264, all intra", 1080, 1920, 5, 2, H264 | {"g": 1}, ["pyav", "torchcodec"], []),
    "short": ("1 s 360p H.264", 360, 640, 1, 1, H264, ["pyav", "torchcodec"], []),
}


def ours(path: str) -> torch.Tensor:
    return VJepaQwenVideoProcessor()(path, num_frames=NUM_FRAMES).pixel_values_videos[0]


def peer(path: str, backend: str) -> torch.Tensor:
    video, _ = load_video(path, backend=backend, sample_indices_fn=middle_frames)
    return VJEPA2VideoProcessor()(video, return_tensors="pt").pixel_values_videos[0]


def middle_frames(metadata, **kwargs) -> np.ndarray:
    """The frames on show in the middle of equal spans, as ours are chosen."""
    num_frames = metadata.total_num_frames
    return ((np.arange(NUM_FRAMES) + 0.5) * num_frames / NUM_FRAMES + 1e-6).astype(int).clip(max=num_frames - 1)


@functools.cache
def decoded_frames(path: str) -> list[av.VideoFrame]:
    """Frames as the codec gives them, kept for the second call of a process, which is the one that is measured."""
    with av.open(path) as container:
        return [frame for _, frame in zip(range(NUM_FRAMES), container.decode(video=0), strict=False)]


def preprocess_ours(path: str) -> torch.Tensor:
    frames, processor = decoded_frames(path), VJepaQwenVideoProcessor()
    size = processor._resized_size(frames[0].height, frames[0].width)
    crop = (processor.crop_size.height, processor.crop_size.width)
    converter = FrameConverter(Orientation(frames[0]), size, crop)
    scale, shift = processor._scale_and_shift()
    pixel_values = torch.empty(len(frames), 3, *crop)
    for row, frame in zip(pixel_values, frames, strict=True):
        values = np.multiply(converter.to_rgb(frame), scale, out=row.numpy(), dtype=np.float32)
        values += shift
    return pixel_values


def preprocess_peer(path: str) -> torch.Tensor:
    video = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded_frames(path)])
    return VJEPA2VideoProcessor()(video, return_tensors="pt").pixel_values_videos[0]


def make_clip(path: Path, height: int, width: int, seconds: int, repeats: int, codec: dict):
    """Moving texture with noise and a cut every few seconds; encoded once and repeated without encoding again."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 256, (height // 8 + 64, width // 8 + 64, 3), dtype=np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)
    noise = rng.integers(0, 24, (height + 64, width + 64, 3), dtype=np.uint8)
    once = path.with_name(f"once_{path.name}")
    with av.open(str(once), "w") as container:
        options = codec["options"] | ({"g": str(codec["g"])} if "g" in codec else {})
        stream = container.add_stream(codec["codec"], rate=FRAMES_PER_SECOND, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # PyAV's default, threads for slices, would make x264 cut each picture into slices, as hardly any file is.
        stream.thread_type = "FRAME"
        for number in range(seconds * FRAMES_PER_SECOND):
            scene, step = divmod(number, 100)
            row, column = (scene * 131 + step * 2) % 500, (scene * 57 + step * 3) % 500
            shift = number * 17 % 64
            picture = texture[row : row + height, column : column + width] // 2
            picture = picture + noise[shift : shift + height, shift : shift + width]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FRAMES_PER_SECOND)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path), "w") as container:
        offset, target = 0, None
        for _ in range(repeats):
            with av.open(str(once)) as original:
                source = original.streams.video[0]
                target = target or container.add_stream_from_template(source)
                for packet in original.demux(source):
                    if packet.size > 0:
                        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                        packet.stream = target
                        container.mux(packet)
                offset += round(seconds / source.time_base)
    once.unlink()


def difference(path: str, backend: str) -> float:
    """Mean difference to a peer's frames, in levels of 255."""
    deviation = torch.tensor(VJepaQwenVideoProcessor().image_std)[:, None, None] * 255
    return ((ours(path) - peer(path, backend)) * deviation).abs().mean().item()


def give_torchcodec_the_ffmpeg_of_pyav(folder: Path):
    """Links to the libraries inside PyAV's wheel under the names that torchcodec asks for (Linux)."""
    for library in Path(av.__file__).parent.with_name("av.libs").glob("lib*.so*"):
        (folder / library.name).symlink_to(library)
        if match := re.fullmatch(r"(lib(?:av|sw)\w+)-\w+(\.so\.\d+)[.\d]*", library.name):
            (folder / f"{match[1]}{match[2]}").symlink_to(library)
    os.environ["LD_LIBRARY_PATH"] = f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "preprocessing"], default=[*CASES, "preprocessing"])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default: 3)")
    parser.add_argument("--slow-rounds", type=int, default=1, help="runs of the slowest peers; 0 leaves them out")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args(arguments)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        (libraries := Path(folder, "libraries")).mkdir()
        give_torchcodec_the_ffmpeg_of_pyav(libraries)
        for name in options.cases:
            title, *clip, peers, slow_peers = CASES["intra" if name == "preprocessing" else name]
            make_clip(path := Path(folder, f"{name}.mp4"), *clip)
            if name == "preprocessing":
                contenders = {
                    "ours": (preprocess_ours, str(path)),
                    "VJEPA2VideoProcessor": (preprocess_peer, str(path)),
                }
                results["preprocessing, 1080p"] = measure(contenders, rounds=options.rounds)
                continue
            # In a new process, because libraries are looked up when a process starts.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                try:
                    levels = f"{pool.submit(difference, str(path), 'torchcodec').result():.2f} levels"
                except (ImportError, RuntimeError) as error:
                    levels = f"not compared, {error}".splitlines()[0]
            Console().print(f"{title}: mean difference to torchcodec's frames {levels}")
            contenders = {"ours": (ours, str(path))} | {backend: (peer, str(path), backend) for backend in peers}
            results[title] = measure(contenders, rounds=options.rounds, warm_up=False)
            slow = {backend: (peer, str(path), backend) for backend in slow_peers}
            if options.slow_rounds:
                results[title] |= measure(slow, rounds=options.slow_rounds, warm_up=False)
            path.unlink()
    report("File to 64 normalised frames", results, baseline="ours", output=options.output)


if __name__ == "__main__":
    main()
