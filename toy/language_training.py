"""Training of the toy's projector and language model on event features of the frozen, already trained tower.

Called by `python -m vjepa_qwen.toy.build`. Next-token loss on the answers alone. Half of the samples are clips as they
are, the others are put together from scenes of different clips of one domain: the features are cached, so new clips
cost nothing and the model cannot learn the order of scenes by heart.
"""

import math
import random
from collections import defaultdict
from dataclasses import dataclass

import torch

from .synthetic_shorts import ORDINALS, Scene, summarize
from .tower_training import CLASSES, Heads, scene_labels

# Every wording asks for the same summary: the toy is not to be brittle about how it is asked.
_VERBS = ("Describe", "Summarize", "Please describe", "Please summarize", "Explain", "Tell me about", "Caption")
_OBJECTS = ("this video", "the video", "this clip", "this short", "what happens in this video")
_ENDINGS = (".", "", " in detail.", " briefly.", ", please.", " in a few sentences.")
DESCRIBE_PROMPTS = (
    "Describe this video.",
    "Summarize this video.",
    "What happens in this video?",
    "What is shown in this video?",
    "What do you see?",
    "Write a summary of this video.",
    *(f"{verb} {thing}{ending}" for verb in _VERBS for thing in _OBJECTS for ending in _ENDINGS),
)
DOMAIN_PROMPTS = ("Which domain is this video from?", "What is this video about?", "Name the domain of this video.")
TEXT_PROMPTS = ("Which text is on the screen?", "What text does the video show?", "Read the text on the screen.")
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You describe videos.")
TEXT_ONLY_TURNS = (
    ("Hello!", "Hello! Show me a video and I will describe it."),
    ("Hi.", "Hello! Show me a video and I will describe it."),
    ("Who are you?", "I am a small toy model that describes synthetic videos."),
    ("What can you do?", "I describe short synthetic videos: the domain, the scenes in order, and the text."),
    ("Describe this video.", "There is no video."),
    ("Summarize this video.", "There is no video."),
    ("Thank you.", "You are welcome."),
)
CURRICULUM = 0.4  # share of the updates after which clips have all numbers of scenes


@dataclass(frozen=True)
class EncodedScene:
    """A scene of a training clip and the tower's feature of its event, `(hidden,)` float32."""

    domain: str
    scene: Scene
    feature: torch.Tensor


def render_prompt(tokenizer, question: str, *, with_video: bool, system: str | None = None, video_last=False) -> str:
    """The prompt as the processor will render it at inference, with one placeholder for the video."""
    content = [{"type": "text", "text": question}]
    if with_video:
        content.insert(len(content) if video_last else 0, {"type": "video"})
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    messages.append({"role": "user", "content": content})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


class DialogueSampler:
    """Draws training dialogues: prompt, answer and the event features of the video."""

    def __init__(self, clips: list[list[EncodedScene]], tokenizer, seed: int):
        self.clips, self.tokenizer, self.rng = clips, tokenizer, random.Random(seed)
        self.max_scenes = len(ORDINALS)
        self.scenes_by_domain = defaultdict(list)
        for clip in clips:
            for encoded in clip:
                self.scenes_by_domain[encoded.domain].append(encoded)
        self._prompts: dict[tuple, str] = {}

    def _video(self) -> list[EncodedScene]:
        if self.max_scenes == len(ORDINALS) and self.rng.random() < 0.5:
            return self.rng.choice(self.clips)
        scenes = self.scenes_by_domain[self.rng.choice(list(self.scenes_by_domain))]
        return self.rng.sample(scenes, min(self.rng.randint(1, self.max_scenes), len(scenes)))

    def _prompt(self, question: str, with_video: bool) -> str:
        system = self.rng.choice(SYSTEM_PROMPTS) if self.rng.random() < 0.15 else None
        key = (question, with_video, system, self.rng.random() < 0.1)
        if key not in self._prompts:
            self._prompts[key] = render_prompt(
                self.tokenizer, question, with_video=with_video, system=system, video_last=key[3]
            )
        return self._prompts[key]

    def dialogue(self) -> tuple[str, str, list[torch.Tensor]]:
        """Prompt with one placeholder for each event, answer, event features."""
        kind = self.rng.random()
        if kind < 0.03:
            question, answer = self.rng.choice(TEXT_ONLY_TURNS)
            return self._prompt(question, False), answer, []
        video = self._video()
        domain, words = video[0].domain, [encoded.scene.word for encoded in video if encoded.scene.word]
        if kind < 0.08:
            question, answer = self.rng.choice(DOMAIN_PROMPTS), f"{domain.capitalize()}."
        elif kind < 0.16:
            question = self.rng.choice(TEXT_PROMPTS)
            answer = ", ".join(f'"{word}"' for word in words) + "." if words else "There is no text."
        else:
            question = self.rng.choice(DESCRIBE_PROMPTS[:6] if self.rng.random() < 0.5 else DESCRIBE_PROMPTS)
            answer = summarize(domain, [encoded.scene for encoded in video])
        prompt = self._prompt(question, True).replace("<|video_pad|>", "<|video_pad|>" * len(video))
        return prompt, answer, [encoded.feature for encoded in video]

    def batch(self, size: int) -> dict[str, torch.Tensor]:
        """The model's inputs for `size` dialogues, padded on the left; an event is a video of one step each."""
        rows, features = [], []
        for _ in range(size):
            prompt, answer, events = self.dialogue()
            prompt_ids = self.tokenizer(prompt).input_ids
            answer_ids = self.tokenizer(answer + "<|im_end|>").input_ids
            rows.append((prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids))
            features += [feature.unsqueeze(0) for feature in events]
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([[pad] * (length - len(ids)) + ids for ids, _ in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]),
            "labels": torch.tensor([[-100] * (length - len(labels)) + labels for _, labels in rows]),
            "frame_features": torch.stack(features),
            "frame_event_ids": torch.zeros(len(features), 1, dtype=torch.long),
        }


def start_projector(projector, clips: list[list[EncodedScene]], seed: int) -> None:
    """
    Gives the projector's first layer the directions in which event features differ by class.

    Linear classifiers of domain, shape, colour, size, motion and word are fitted on the features (seconds), and their
    weights become the layer's first rows: most of what tells classes apart is a small share of the features' variance,
    which the next-token loss finds slowly from a random start.
    """
    features = torch.stack([encoded.feature for clip in clips for encoded in clip])
    labels = torch.tensor([scene_labels(encoded.domain, encoded.scene) for clip in clips for encoded in clip])
    generator = torch.Generator().manual_seed(seed)
    heads = Heads(features.shape[1], tuple(name for name in CLASSES if name != "letters"))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    for _ in range(400):
        rows = torch.randint(0, len(features), (1024,), generator=generator)
        heads(features[rows], labels[rows])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        weight = torch.cat([head.weight for head in heads.heads.values()])
        bias = torch.cat([head.bias for head in heads.heads.values()])
        projector.linear_1.weight[: len(weight)] = 0.5 * weight
        projector.linear_1.bias[: len(bias)] = 0.5 * bias


def train_language(model, clips, tokenizer, *, num_updates, seed, report, batch_size=32, peak_rate=2e-3):
    """
    Trains projector and language model of `model` in place; the tower is not touched.

    Args:
        model (`VJepaQwenForConditionalGeneration`): With a trained tower.
        clips (`list[list[EncodedScene]]`): Training clips as their events in order.
        report: Called as `report(update, num_updates, figures)` after every update.
    """
    start_projector(model.model.multi_modal_projector, clips, seed)
    sampler = DialogueSampler(clips, tokenizer, seed)
    parameters = [p for name, p in model.named_parameters() if ".vision_tower." not in name]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda u: min((u + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * u / num_updates))),
    )
    model.train()
    for update in range(num_updates):
        # One scene at first: what a feature says is learned before which of several to look at.
        sampler.max_scenes = min(1 + int(update / num_updates / CURRICULUM * 4), len(ORDINALS))
        loss = model(**sampler.batch(batch_size)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(update + 1, num_updates, {"loss": loss.item()})
    model.eval()
