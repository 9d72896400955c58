"""Synthetic shorts: small rendered videos with known cuts, contents and a reference summary.

    python -m vjepa_qwen.toy.synthetic_shorts OUT --count 20 --seed 1000000

writes OUT/000000.mp4 ... and OUT/metadata.jsonl, the layout of the `videofolder` loader of the datasets library.

A short has a *domain* (cooking, sport, ...) and two to five scenes. A scene is one moving shape over a background that
belongs to the domain; some scenes carry a word of on-screen text. Everything follows from the seed: `generate_short`
decides what happens, `render_frames` draws it, `write_video` encodes it (H.264, yuv420p).

Seeds 0 .. 999,999 are for training, 1,000,000 and above are held out: nothing may be trained or tuned on those.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

TRAINING_SEEDS = range(0, 1_000_000)
HELD_OUT_SEEDS = range(1_000_000, 2_000_000)

FRAME_SIZE = 128  # pixels, square, so that the toy's resize and centre crop lose nothing
FRAMES_PER_SECOND = 16
MIN_SCENE_SECONDS = 0.8
# One tower window of the toy is 16 temporal steps: no scene may be shorter than about three of them.
MIN_SCENE_FRACTION = 0.18

CAPTION_HEIGHT = 36  # pixels

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (225, 30, 35),
    "orange": (255, 140, 0),
    "yellow": (250, 235, 40),
    "green": (20, 170, 50),
    "blue": (35, 70, 230),
    "purple": (140, 40, 190),
    "pink": (255, 150, 200),
    "white": (250, 250, 250),
}
SIZES = {"small": 18, "large": 31}  # radius in pixels
MOTIONS = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "shake": "shakes",
    "still": "stays still",
}
DOMAINS = ("cooking", "sport", "travel", "music", "nature", "technology", "fashion", "gaming")
ORDINALS = ("First", "Second", "Third", "Fourth", "Fifth")
NUMBERS = ("one", "two", "three", "four", "five")
WORDS = tuple(
    "ACTION APPLE AUTUMN BAKE BALL BAND BEACH BEST BIKE BIRD BLUE BOOK BREAD BRIDGE CAKE CALM CAMP CAR CAT CHEF "
    "CITY CLOUD CODE COFFEE COLD COOL CUP DANCE DAY DESERT DOG DREAM DRESS DRUM EASY ENJOY EPIC FAST FILM FIRE FISH "
    "FLY FOREST FREE FRESH FUN FUTURE GAME GARDEN GIFT GLASS GOAL GOLD GREAT GUITAR HAPPY HAT HELLO HERO HOME HOT "
    "HOTEL ICE ISLAND JAZZ JUMP KEY KITE LAKE LEVEL LIFE LIGHT LOVE LUCKY LUNCH MAGIC MAP MARKET MILK MOON MORE "
    "MUSIC NEW NIGHT NOW OCEAN OPEN PARK PARTY PEACE PHONE PIANO PLANET PLAY QUEEN QUICK RACE RAIN READY RECIPE "
    "RIVER ROAD ROBOT ROCK SALE SEA SHOES SING SKY SNOW SOUP SPRING STAR START STYLE SUMMER SUN TEAM TEMPLE TIPS "
    "TODAY TOP TRAIN TREE TRIP VIDEO WATER WIN WINTER WOW YOGA ZOO".split()
)


@dataclass(frozen=True)
class Scene:
    """One event: a shape in motion, perhaps with a word on screen, from `start_seconds` to `end_seconds`."""

    shape: str
    colour: str
    size: str
    motion: str
    word: str | None
    start_seconds: float
    end_seconds: float
    background_seed: int

    @property
    def description(self) -> str:
        text = f' with the text "{self.word}"' if self.word else ""
        return f"a {self.size} {self.colour} {self.shape} {MOTIONS[self.motion]}{text}"


def summarize(domain: str, scenes: list[Scene]) -> str:
    """The reference summary: the domain, then every scene in order with its text."""
    plural = "s" if len(scenes) > 1 else ""
    opening = f"A {domain} video in {NUMBERS[len(scenes) - 1]} scene{plural}."
    return " ".join([opening, *(f"{ordinal}, {s.description}." for ordinal, s in zip(ORDINALS, scenes, strict=False))])


def summarize_text(domain: str, words: list[str]) -> str:
    """A summary that names the domain and the on-screen words in order, and nothing else."""
    return f"A {domain} video with the text: {', '.join(words)}."


@dataclass(frozen=True)
class SyntheticShort:
    """What one clip shows. `cut_seconds` are the starts of the second and later scenes."""

    seed: int
    domain: str
    scenes: tuple[Scene, ...]

    @property
    def num_frames(self) -> int:
        return round(self.scenes[-1].end_seconds * FRAMES_PER_SECOND)

    @property
    def duration_seconds(self) -> float:
        return self.scenes[-1].end_seconds

    @property
    def cut_seconds(self) -> list[float]:
        return [scene.start_seconds for scene in self.scenes[1:]]

    @property
    def words(self) -> list[str]:
        return [scene.word for scene in self.scenes if scene.word]

    @property
    def summary(self) -> str:
        return summarize(self.domain, list(self.scenes))


def generate_short(seed: int, words: tuple[str, ...] = WORDS, text_share: float = 0.5) -> SyntheticShort:
    """Decide what happens in the clip of `seed`: the same seed gives the same short on every machine.

    `words` are those that may be on the screen, `text_share` is the part of the scenes that have one.
    """
    rng = random.Random(seed)
    num_frames = rng.randint(3 * FRAMES_PER_SECOND, 8 * FRAMES_PER_SECOND)
    min_scene_frames = math.ceil(max(MIN_SCENE_SECONDS * FRAMES_PER_SECOND, MIN_SCENE_FRACTION * num_frames))
    num_scenes = rng.randint(2, min(5, num_frames // min_scene_frames))
    # Spread the frames that are left over among the scenes.
    spare = num_frames - num_scenes * min_scene_frames
    marks = sorted(rng.randint(0, spare) for _ in range(num_scenes - 1))
    cuts = [mark + (index + 1) * min_scene_frames for index, mark in enumerate(marks)]
    bounds = [0, *cuts, num_frames]
    scenes: list[Scene] = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        previous = scenes[-1] if scenes else None
        looks = [(shape, colour) for shape in SHAPES for colour in COLOURS]
        if previous:
            looks.remove((previous.shape, previous.colour))
        shape, colour = rng.choice(looks)
        scenes.append(
            Scene(
                shape=shape,
                colour=colour,
                size=rng.choice(list(SIZES)),
                motion=rng.choice(list(MOTIONS)),
                word=rng.choice(words) if rng.random() < text_share else None,
                start_seconds=start / FRAMES_PER_SECOND,
                end_seconds=end / FRAMES_PER_SECOND,
                background_seed=rng.getrandbits(32),
            )
        )
    return SyntheticShort(seed=seed, domain=rng.choice(DOMAINS), scenes=tuple(scenes))


def _tint(rng: random.Random, base: tuple[int, int, int], spread: int = 28) -> tuple[int, int, int]:
    return tuple(max(0, min(255, channel + rng.randint(-spread, spread))) for channel in base)


def _background(domain: str, seed: int) -> Image.Image:
    """A pattern that belongs to the domain, with tints and layout of its own."""
    rng = random.Random(seed)
    size = FRAME_SIZE
    first, second = {
        "cooking": ((190, 150, 110), (235, 215, 185)),
        "sport": ((60, 130, 70), (95, 165, 100)),
        "travel": ((110, 170, 215), (205, 180, 130)),
        "music": ((45, 25, 75), (150, 70, 160)),
        "nature": ((70, 110, 50), (140, 150, 70)),
        "technology": ((20, 45, 75), (60, 150, 170)),
        "fashion": ((215, 175, 185), (170, 130, 150)),
        "gaming": ((40, 40, 45), (110, 60, 60)),
    }[domain]
    first, second = _tint(rng, first), _tint(rng, second)
    image = Image.new("RGB", (size, size), first)
    draw = ImageDraw.Draw(image)
    if domain == "cooking":  # kitchen tiles
        cell, shift = rng.randint(14, 24), rng.randint(0, 12)
        for row in range(-1, size // cell + 2):
            for column in range(-1, size // cell + 2):
                if (row + column) % 2:
                    x, y = column * cell + shift, row * cell + shift
                    draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill=second)
    elif domain == "sport":  # mown stripes and the lines of a pitch
        stripe = rng.randint(14, 26)
        for x in range(rng.randint(-stripe, 0), size, 2 * stripe):
            draw.rectangle((x, 0, x + stripe - 1, size), fill=second)
        y = rng.randint(20, 108)
        draw.line((0, y, size, y), fill=(235, 235, 235), width=3)
    elif domain == "travel":  # sky, ground and a mountain
        horizon, peak = rng.randint(50, 90), rng.randint(10, 118)
        draw.polygon((peak - 60, horizon, peak, horizon - 45, peak + 60, horizon), fill=_tint(rng, (120, 115, 130)))
        draw.rectangle((0, horizon, size, size), fill=second)
    elif domain == "music":  # bars of an equalizer
        bar = rng.randint(8, 14)
        for x in range(rng.randint(-bar, 0), size, bar + 4):
            draw.rectangle((x, size - rng.randint(20, 110), x + bar - 1, size), fill=second)
    elif domain == "nature":  # leaves
        for _ in range(26):
            x, y, radius = rng.randint(-5, 130), rng.randint(-5, 130), rng.randint(6, 16)
            draw.ellipse((x - radius, y - radius // 2, x + radius, y + radius // 2), fill=_tint(rng, second, 25))
    elif domain == "technology":  # a grid of circuit lines
        cell, shift = rng.randint(14, 24), rng.randint(0, 14)
        for position in range(shift, size, cell):
            draw.line((position, 0, position, size), fill=second, width=2)
            draw.line((0, position, size, position), fill=second, width=2)
    elif domain == "fashion":  # diagonal stripes of cloth
        stripe, shift = rng.randint(9, 16), rng.randint(0, 20)
        for x in range(shift - 2 * size, 2 * size, 2 * stripe):
            draw.line((x, 0, x + size, size), fill=second, width=stripe * 2 // 3)
    else:  # bricks of a platform game
        height, shift = rng.randint(12, 18), rng.randint(0, 12)
        for row in range(-1, size // height + 2):
            y = row * height + shift
            for column in range(-1, size // (2 * height) + 2):
                x = column * 2 * height + (row % 2) * height + shift
                draw.rectangle((x, y, x + 2 * height - 3, y + height - 3), fill=second)
    return image


def _polygon(x: float, y: float, radii: tuple[float, ...], turn: float) -> list[tuple[float, float]]:
    count = len(radii)
    angles = [turn + 2 * math.pi * index / count for index in range(count)]
    return [(x + r * math.sin(a), y - r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


def _draw_shape(draw: ImageDraw.ImageDraw, scene: Scene, x: float, y: float) -> None:
    radius, fill, line = SIZES[scene.size], COLOURS[scene.colour], (15, 15, 15)
    box = (x - radius, y - radius, x + radius, y + radius)
    if scene.shape == "circle":
        draw.ellipse(box, fill=fill, outline=line, width=2)
    elif scene.shape == "square":
        draw.rectangle((x - 0.85 * radius, y - 0.85 * radius, x + 0.85 * radius, y + 0.85 * radius), fill, line, 2)
    elif scene.shape == "triangle":
        draw.polygon(_polygon(x, y, (1.1 * radius,) * 3, 0.0), fill, line, 2)
    elif scene.shape == "star":
        draw.polygon(_polygon(x, y, (1.2 * radius, 0.48 * radius) * 5, 0.0), fill, line, 2)
    elif scene.shape == "cross":
        near, far = 0.33 * radius, 1.05 * radius
        corners = [(-near, -far), (near, -far), (near, -near), (far, -near), (far, near), (near, near)]
        corners += [(-a, -b) for a, b in corners]
        draw.polygon([(x + a, y + b) for a, b in corners], fill, line, 2)
    else:
        draw.ellipse(box, outline=line, width=max(6, radius // 2))
        draw.ellipse((box[0] + 2, box[1] + 2, box[2] - 2, box[3] - 2), outline=fill, width=max(4, radius // 2 - 3))


def _caption(word: str, seed: int) -> tuple[Image.Image, tuple[int, int]]:
    """A dark bar with the word in white, and where it goes: at the lower edge of the frame, give or take a little."""
    rng = random.Random(seed)
    font_size = 34
    left, top, right, bottom = ImageFont.load_default(font_size).getbbox(word)
    while right - left > FRAME_SIZE - 10:
        font_size -= 1
        left, top, right, bottom = ImageFont.load_default(font_size).getbbox(word)
    bar = Image.new("RGB", (FRAME_SIZE, CAPTION_HEIGHT), (10, 10, 12))
    x = (FRAME_SIZE - right + left) // 2 - left + rng.randint(-3, 3)
    y = (CAPTION_HEIGHT - bottom + top) // 2 - top
    ImageDraw.Draw(bar).text((x, y), word, fill=(255, 255, 255), font=ImageFont.load_default(font_size))
    return bar, (0, FRAME_SIZE - CAPTION_HEIGHT - rng.randint(0, 3))


def _centres(scene: Scene) -> np.ndarray:
    """Where the shape is in each frame of the scene, `(num_frames, 2)` x and y in pixels."""
    rng = random.Random(scene.background_seed + 1)
    num_frames = round((scene.end_seconds - scene.start_seconds) * FRAMES_PER_SECOND)
    radius = SIZES[scene.size]
    # The place that the shape has: the frame without its margin, above the text if there is some.
    width = height = FRAME_SIZE - 2 * radius - 4
    if scene.word:
        height = max(height - CAPTION_HEIGHT, 30)
    travel_x = rng.uniform(0.7, 0.95) * width if scene.motion in ("left", "right") else 0.0
    travel_y = rng.uniform(0.7, 0.95) * height if scene.motion in ("up", "down") else 0.0
    start = np.array([rng.uniform(0, width - travel_x), rng.uniform(0, height - travel_y)]) + radius + 2
    progress = np.linspace(0, 1, num_frames)
    if scene.motion in ("left", "up"):
        progress = progress[::-1]
    centres = start + progress[:, None] * np.array([travel_x, travel_y])
    if scene.motion == "shake":
        centres[:, 0] += 8 * np.sin(2.2 * np.arange(num_frames))
    return centres


def shape_centres(short: SyntheticShort) -> np.ndarray:
    """Where the shape is in each frame of the short, `(num_frames, 2)` x and y as fractions of the frame."""
    return np.concatenate([_centres(scene) for scene in short.scenes]) / FRAME_SIZE


def render_frames(short: SyntheticShort) -> Iterator[np.ndarray]:
    """Draw the frames of the short, in order: uint8 arrays of shape (128, 128, 3)."""
    for scene in short.scenes:
        background = _background(short.domain, scene.background_seed)
        caption = _caption(scene.word, scene.background_seed + 2) if scene.word else None
        for x, y in _centres(scene).tolist():
            frame = background.copy()
            _draw_shape(ImageDraw.Draw(frame), scene, x, y)
            if caption:
                frame.paste(*caption)
            yield np.asarray(frame)


def write_video(short: SyntheticShort, path: str | Path) -> None:
    """Encode the short as an H.264 mp4 (yuv420p, 16 frames per second, no audio)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FRAMES_PER_SECOND)
        stream.thread_count = 1  # the same bytes whatever the machine
        stream.options = {"crf": "20", "preset": "veryfast"}
        for array in render_frames(short):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description="Write synthetic shorts and their metadata.jsonl.")
    parser.add_argument("output", type=Path, help="folder to write, created when it is missing")
    parser.add_argument("--count", type=int, default=20, help="number of clips")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEEDS.start, help="seed of the first clip")
    parser.add_argument("--words", nargs="+", default=WORDS, metavar="WORD", help="on-screen words to draw from")
    parser.add_argument("--text-share", type=float, default=0.5, help="part of the scenes with a word (default: 0.5)")
    parser.add_argument("--text-only", action="store_true", help="summaries of nothing but the domain and the words")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with open(arguments.output / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for index in range(arguments.count):
            short = generate_short(arguments.seed + index, tuple(arguments.words), arguments.text_share)
            name = f"{index:06d}.mp4"
            write_video(short, arguments.output / name)
            row = {
                "file_name": name,
                "summary": summarize_text(short.domain, short.words) if arguments.text_only else short.summary,
                "domain": short.domain,
                "on_screen_text": short.words,
                "cut_seconds": short.cut_seconds,
            }
            metadata.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
