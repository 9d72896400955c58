"""How well a checkpoint describes and cuts synthetic shorts that it was never trained on, through the public calls.

    python -m vjepa_qwen.toy.evaluate --count 100

Boundaries: one-to-one matches within one temporal step of the clip. Text, shapes and so on are compared scene by
scene, in order, so a missing or additional scene costs all that follow.
"""

import argparse
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import TOY_CHECKPOINT
from ..evaluation.event_boundaries.event_boundaries import count_matches
from ..modeling_vjepa_qwen import VJepaQwenForConditionalGeneration
from ..processing_vjepa_qwen import VJepaQwenProcessor
from .synthetic_shorts import (
    COLOURS,
    DOMAINS,
    HELD_OUT_SEEDS,
    MOTIONS,
    SHAPES,
    SIZES,
    SyntheticShort,
    generate_short,
    write_video,
)

PROMPT = "Describe this video."
_SCENE = re.compile(
    rf"an? (?P<size>{'|'.join(SIZES)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf'(?P<motion>{"|".join(MOTIONS.values())})(?: with the text "(?P<word>[^"]*)")?'
)
_DOMAIN = re.compile(rf"\b({'|'.join(DOMAINS)})\b")
ATTRIBUTES = ("size", "colour", "shape", "motion")


@dataclass
class Score:
    """Counts; ratios are properties, and scores of several clips add up."""

    right: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    num_found: int = 0
    num_true: int = 0
    num_matched: int = 0

    def count(self, name: str, is_right: bool) -> None:
        self.right[name] = self.right.get(name, 0) + is_right
        self.total[name] = self.total.get(name, 0) + 1

    @property
    def precision(self) -> float:
        return self.num_matched / max(self.num_found, 1)

    @property
    def recall(self) -> float:
        return self.num_matched / max(self.num_true, 1)

    @property
    def f1(self) -> float:
        return 2 * self.num_matched / max(self.num_found + self.num_true, 1)

    def add_description(self, short: SyntheticShort, text: str) -> None:
        domain = _DOMAIN.search(text)
        self.count("domain", domain is not None and domain.group(1) == short.domain)
        described = [match.groupdict() for match in _SCENE.finditer(text)]
        self.count("number of scenes", len(described) == len(short.scenes))
        described += [dict.fromkeys((*ATTRIBUTES, "word"))] * (len(short.scenes) - len(described))
        all_right = True
        for scene, found in zip(short.scenes, described, strict=False):
            truth = {"size": scene.size, "colour": scene.colour, "shape": scene.shape, "motion": MOTIONS[scene.motion]}
            for name in ATTRIBUTES:
                self.count(name, found[name] == truth[name])
            if scene.word:
                self.count("text", found["word"] == scene.word)
            else:
                self.count("no text where there is none", found["word"] is None)
            all_right &= found["shape"] == scene.shape and found["colour"] == scene.colour
        self.count("coloured shapes of the clip in order", all_right and len(described) == len(short.scenes))
        self.count("whole summary", text.strip() == short.summary)

    def add_boundaries(self, short: SyntheticShort, found_seconds: list[float], step_seconds: float) -> None:
        self.num_found += len(found_seconds)
        self.num_true += len(short.cut_seconds)
        self.num_matched += count_matches(found_seconds, short.cut_seconds, step_seconds)

    def table(self, title: str) -> Table:
        table = Table("figure", "value", "of", title=title)
        for name, right in self.right.items():
            table.add_row(name, f"{100 * right / self.total[name]:.1f} %", str(self.total[name]))
        table.add_row("boundary F1, within one temporal step", f"{self.f1:.3f}", f"{self.num_true} cuts")
        table.add_row("boundary precision / recall", f"{self.precision:.3f} / {self.recall:.3f}", "")
        return table


@torch.inference_mode()
def evaluate(checkpoint: str | Path, seeds: range, *, batch_size: int = 10, num_examples: int = 0) -> Score:
    """Renders the shorts of `seeds`, describes them in batches and compares; prints progress and some examples."""
    model = VJepaQwenForConditionalGeneration.from_pretrained(checkpoint)
    processor = VJepaQwenProcessor.from_pretrained(checkpoint).bind(model)
    step_frames = processor.video_processor.tubelet_size
    score, console = Score(), Console()
    batches = [seeds[start : start + batch_size] for start in range(0, len(seeds), batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        for batch in track(batches, "describing held-out clips", console=console):
            shorts = [generate_short(seed) for seed in batch]
            paths = [str(Path(folder) / f"{short.seed}.mp4") for short in shorts]
            for short, path in zip(shorts, paths, strict=True):
                write_video(short, path)
            videos = processor.segment(paths)
            content = [[{"type": "video", "video": video}, {"type": "text", "text": PROMPT}] for video in videos]
            inputs = processor.apply_chat_template(
                [[{"role": "user", "content": items}] for items in content],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            output = model.generate(**inputs, do_sample=False, max_new_tokens=160)
            texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for short, video, text in zip(shorts, videos, texts, strict=True):
                step_seconds = video.duration_seconds / (len(video.timestamps) / step_frames)
                score.add_description(short, text)
                score.add_boundaries(short, [event.start_seconds for event in video.events[1:]], step_seconds)
                if num_examples > 0:
                    console.print(f"{short.seed} true : {short.summary}\n{short.seed} model: {text}", highlight=False)
                    num_examples -= 1
    return score


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a checkpoint on synthetic shorts it was never trained on.")
    parser.add_argument("--checkpoint", default=TOY_CHECKPOINT, help="folder or repository (default: the toy)")
    parser.add_argument("--count", type=int, default=100, help="number of clips")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEEDS.start, help="seed of the first clip")
    parser.add_argument("--examples", type=int, default=3, help="number of descriptions to print")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.count)
    score = evaluate(arguments.checkpoint, seeds, num_examples=arguments.examples)
    Console().print(score.table(f"{arguments.count} clips, seeds {seeds.start} to {seeds.stop - 1}"))


if __name__ == "__main__":
    main()
