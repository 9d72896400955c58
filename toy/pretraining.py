"""The base checkpoint of the experiments: pre-trained parts, and a projector that has learned nothing.

    python -m vjepa_qwen.toy.pretraining --output base --seed 0

The tower learns by masked latent prediction from videos without labels, the language model from text alone, side by
side. They stand for V-JEPA 2 and Qwen3.5: `python -m vjepa_qwen.toy.experiments` measures what a projector, or a LoRA
on the tower, adds to them.
"""

import argparse
import copy
import math
import multiprocessing
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen3_5Tokenizer
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Predictor, apply_masks

from ..configuration_vjepa_qwen import VJepaQwenConfig
from ..modeling_vjepa_qwen import VJepaQwenForConditionalGeneration
from ..processing_vjepa_qwen import VJepaQwenProcessor
from ..training.data import DEFAULT_PROMPT
from .build import CHAT_TEMPLATE, choose_segmentation, encode_clips, make_config, save, tokenizer_texts
from .language_training import render_prompt
from .rendering import make_video_processor, normalizer, render_clips
from .synthetic_shorts import DOMAINS, ORDINALS, WORDS, summarize_text
from .tokenizer import train_tokenizer
from .tower_training import augment

FIRST_SEED = 500_000  # of the videos without labels: far from those that the experiments are trained on


def cosine_schedule(optimizer, num_updates: int):
    """Linear warm-up of 100 updates, then half a cosine down to a fiftieth."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda u: min((u + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * u / num_updates)))
    )


def pretrain_tower(tower, frames: np.ndarray, *, normalize, num_updates: int, seed: int, report, batch_size: int = 16):
    """
    Trains the tower in place to predict, from a part of a clip's patches, the features of the others (V-JEPA 2,
    https://arxiv.org/abs/2506.09985): a moving average of the tower, which sees all patches, gives the features, and
    transformers' own `VJEPA2Predictor` predicts them. The moving average is what is kept.

    Args:
        tower (`VJepaQwenVisionTower`): Its configuration has the predictor's sizes too. Its patch projection stays
            the random one that it is (https://arxiv.org/abs/2104.02057): a learned one keeps what can be predicted,
            and in so small a tower little else.
        frames (`np.ndarray` of shape `(num_clips, num_frames, 3, size, size)`): uint8, before normalisation.
        normalize: From frames in 0..1, `(..., 3, size, size)`, to the tower's input.
        report: Called as `report(update, num_updates, figures)` after every update.
    """
    generator = torch.Generator().manual_seed(seed)
    config, predictor = tower.config, VJEPA2Predictor(tower.config)
    for module in predictor.modules():  # the usual 0.02 is meant for widths of a thousand and learns slowly here
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=config.initializer_range)
            nn.init.zeros_(module.bias)
    nn.init.normal_(predictor.embeddings.mask_tokens, std=config.initializer_range)
    tower.encoder.embeddings.requires_grad_(False)
    teacher = copy.deepcopy(tower).requires_grad_(False).eval()
    parameters = [p for p in [*tower.parameters(), *predictor.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = cosine_schedule(optimizer, num_updates)
    tower.train()
    for update in range(num_updates):
        rows = torch.randint(0, len(frames), (batch_size,), generator=generator).numpy()
        # Every second step: half the cost.
        start = int(torch.randint(0, 2, (), generator=generator))
        pixels = torch.from_numpy(frames[rows]).unflatten(1, (-1, config.tubelet_size))[:, start::2].flatten(1, 2)
        pixels = normalize(augment(pixels.float() / 255, generator))
        visible, hidden = _draw_masks(config, pixels.shape[1] // config.tubelet_size, generator)
        visible, hidden = visible.expand(batch_size, -1), hidden.expand(batch_size, -1)
        with torch.no_grad():
            targets = teacher(pixels).last_hidden_state
            targets = apply_masks(functional.layer_norm(targets, targets.shape[-1:]), [hidden])
        states = tower.encoder.embeddings(pixels)
        num_patches = states.shape[1]
        states = apply_masks(states, [visible])
        for layer in tower.encoder.layer:
            states = layer(states, visible)[0]
        states = tower.encoder.layernorm(states)
        # The predictor picks the visible patches itself, so it is given all places.
        places = states.new_zeros(batch_size, num_patches, states.shape[-1])
        places = places.scatter(1, visible.unsqueeze(-1).expand(states.shape), states)
        loss = functional.l1_loss(predictor(places, [visible], [hidden]).last_hidden_state, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        momentum = 0.99 + 0.009 * update / num_updates
        with torch.no_grad():
            for average, parameter in zip(teacher.parameters(), tower.parameters(), strict=True):
                average.lerp_(parameter, 1 - momentum)
        # The spread of the features tells whether they have collapsed to a constant.
        report(update + 1, num_updates, {"loss": loss.item(), "spread": targets.std(dim=1).mean().item()})
    tower.load_state_dict(teacher.state_dict())
    tower.eval()


def _draw_masks(config, num_steps: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the visible and of the hidden patches: a quarter of the places in all steps, or scattered ones."""
    num_places = (config.crop_size // config.patch_size) ** 2
    is_visible = torch.zeros(num_steps, num_places, dtype=torch.bool)
    if torch.rand((), generator=generator) < 0.5:
        is_visible[:, torch.randperm(num_places, generator=generator)[: num_places // 4]] = True
    else:
        is_visible = torch.rand(num_steps, num_places, generator=generator) < 0.3
    is_visible = is_visible.flatten()
    return is_visible.nonzero().flatten(), (~is_visible).nonzero().flatten()


class NoteDialogues:
    """
    Draws dialogues about imagined videos, of which the language model is told by *notes* instead of features: one
    vector for each scene, made from the embeddings of its domain and of its word.

    A language model that can read them is what a projector needs: somewhere to project to.
    """

    def __init__(self, tokenizer, seed: int):
        self.tokenizer, self.rng = tokenizer, random.Random(seed)
        self.max_scenes = 1
        self.prompt = render_prompt(tokenizer, DEFAULT_PROMPT, with_video=True)

    def _video(self) -> tuple[str, list[str], list[list[int]]]:
        """Domain, words and the notes' ids, two each."""
        domain = self.rng.choice(DOMAINS)
        words = [self.rng.choice(WORDS) for _ in range(self.rng.randint(1, self.max_scenes))]
        return domain, words, [self.tokenizer(text).input_ids for text in (f" {domain} {word}" for word in words)]

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, `(size, length)`, padded on the left, and the notes' ids,
        `(num_notes, 2)`."""
        rows, all_notes = [], []
        for _ in range(size):
            domain, words, notes = self._video()
            prompt_ids = self.tokenizer(self.prompt.replace("<|video_pad|>", "<|video_pad|>" * len(words))).input_ids
            answer_ids = self.tokenizer(summarize_text(domain, words) + "<|im_end|>").input_ids
            rows.append((prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids))
            all_notes += notes
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        return (
            torch.tensor([[pad] * (length - len(ids)) + ids for ids, _ in rows]),
            torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]),
            torch.tensor([[-100] * (length - len(labels)) + labels for _, labels in rows]),
            torch.tensor(all_notes),
        )


def make_notes(parts: torch.Tensor, faintness: float, generator: torch.Generator) -> torch.Tensor:
    """
    Notes from the embeddings of what they say.

    Features that are not well projected yet say little, and an untrained projector's nothing. From notes that are
    readable to any degree, down to noise, the model learns to trust what it reads as far as it should: then a little
    more of a word in a feature makes the word a little more likely, which is what a projector learns from. The length
    of a note tells nothing, or a projector would learn first to say nothing at all, by its length.

    Args:
        parts (`torch.Tensor` of shape `(num_notes, 2, hidden)`): Embeddings of the domain and of the word.
        faintness (`float`): 0 for readable notes, 1 for notes of all degrees, each part and the noise on its own.

    Returns:
        `torch.Tensor` of shape `(num_notes, hidden)`.
    """
    weights = 1 - faintness * torch.rand(len(parts), 2, 1, generator=generator)
    share = 1 - faintness * torch.rand(len(parts), 1, generator=generator)
    noise = torch.randn(parts[:, 0].shape, generator=generator)
    notes = share * _to_unit_deviation((weights * parts).sum(dim=1)) + (1 - share**2).sqrt() * noise
    return _to_unit_deviation(notes) * 0.3 * torch.exp(2 * torch.rand(len(parts), 1, generator=generator) - 1)


def _to_unit_deviation(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.std(dim=-1, keepdim=True)


def pretrain_language_model(model, tokenizer, *, num_updates: int, seed: int, report, batch_size: int = 96):
    """
    Trains language model and head in place, on text alone: no feature of any video, no tower, no projector.

    Args:
        model (`VJepaQwenForConditionalGeneration`): Its language model is trained.
        report: Called as `report(update, num_updates, figures)` after every update.
    """
    dialogues = NoteDialogues(tokenizer, seed)
    embeddings, language_model = model.get_input_embeddings(), model.model.language_model
    generator = torch.Generator().manual_seed(seed)
    parameters = list(language_model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = cosine_schedule(optimizer, num_updates)
    language_model.train()
    for update in range(num_updates):
        # One scene at first: what a note says is learned before which of several to look at.
        dialogues.max_scenes = 1 if update < 0.1 * num_updates else len(ORDINALS)
        input_ids, attention_mask, labels, note_ids = dialogues.batch(batch_size)
        # Readable notes until it is known which of them to look at, then less and less readable ones.
        faintness = min(max(update / num_updates - 0.15, 0) / 0.35, 1)
        notes = make_notes(embeddings(note_ids), faintness, generator)
        is_note = (input_ids == model.config.video_token_id).unsqueeze(-1)
        hidden = language_model(
            inputs_embeds=embeddings(input_ids).masked_scatter(is_note, notes),
            attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state
        is_answer = labels[:, 1:] != -100
        loss = functional.cross_entropy(model.lm_head(hidden[:, :-1][is_answer]), labels[:, 1:][is_answer])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(update + 1, num_updates, {"loss": loss.item()})
    model.eval()


def make_tokenizer() -> Qwen3_5Tokenizer:
    """The toy's, for which every word after a space is one token too."""
    texts = [summarize_text(domain, WORDS) for domain in DOMAINS]
    return train_tokenizer([*tokenizer_texts(), *texts], CHAT_TEMPLATE.read_text(encoding="utf-8"))


def make_base_config(tokenizer) -> VJepaQwenConfig:
    """The toy's with half the tower's layers, and three layers of plain attention for the text: fast on a CPU."""
    config = make_config(tokenizer)
    config.vision_config.num_hidden_layers = 2
    config.vision_config.pred_hidden_size, config.vision_config.pred_num_attention_heads = 96, 4
    config.vision_config.pred_num_hidden_layers, config.vision_config.pred_num_mask_tokens = 2, 1
    config.text_config.num_hidden_layers, config.text_config.layer_types = 3, ["full_attention"] * 3
    return config


def _reporter(description: str):
    """Prints a line each tenth of the way."""

    def report(done: int, total: int, figures: dict[str, float]):
        if done * 10 // total > (done - 1) * 10 // total:
            text = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"{description}: {done}/{total} {text}", flush=True)

    return report


def _make_tower(tokenizer, seed: int, num_clips: int, num_updates: int) -> tuple[dict, dict]:
    """Weights of a tower, and the parameters of the event segmentation that cuts its features best."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tower = VJepaQwenForConditionalGeneration(make_base_config(tokenizer)).model.vision_tower
    normalize = normalizer(make_video_processor())
    with tempfile.TemporaryDirectory() as folder:
        clips = render_clips(
            range(FIRST_SEED, FIRST_SEED + num_clips),
            Path(folder),
            lambda done: _reporter("rendering")(done, num_clips, {}),
            num_processes=1,
        )
        pretrain_tower(
            tower, clips.frames, normalize=normalize, num_updates=num_updates, seed=seed, report=_reporter("tower")
        )
        clips = clips.first(500)
        features = encode_clips(tower, clips, normalize, _reporter("encoding"))
        # Without labels nothing pulls apart what a cut divides: distances are small.
        return tower.state_dict(), choose_segmentation(features, clips, min_distances=(0.01, 0.005, 0.02))


def _make_language_model(tokenizer, seed: int, num_updates: int) -> dict:
    """Weights of a language model with its head."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = VJepaQwenForConditionalGeneration(make_base_config(tokenizer))
    pretrain_language_model(model, tokenizer, num_updates=num_updates, seed=seed, report=_reporter("language model"))
    return model.model.language_model.state_dict()


def build_base(output: Path, *, seed: int, num_clips: int, num_tower_updates: int, num_language_updates: int):
    """Pre-trains both parts, a process each, and saves the checkpoint."""
    started = time.monotonic()
    tokenizer = make_tokenizer()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        tower = pool.submit(_make_tower, tokenizer, seed, num_clips, num_tower_updates)
        language_model = pool.submit(_make_language_model, tokenizer, seed, num_language_updates)
        torch.manual_seed(seed)
        model = VJepaQwenForConditionalGeneration(make_base_config(tokenizer))
        tower_weights, segmentation = tower.result()
        model.model.vision_tower.load_state_dict(tower_weights)
        model.model.language_model.load_state_dict(language_model.result())
    print(f"event segmentation: {segmentation}")
    save(model, VJepaQwenProcessor(make_video_processor(), tokenizer, event_segmentation=segmentation), output)
    print(f"{output}: {(time.monotonic() - started) / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-train the base checkpoint of the experiments.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, clips and order (default: 0)")
    parser.add_argument("--clips", type=int, default=2000, help="videos without labels (default: 2000)")
    parser.add_argument("--tower-updates", type=int, default=500, help="of 16 videos each (default: 500)")
    parser.add_argument("--language-updates", type=int, default=700, help="of 96 dialogues each (default: 700)")
    options = parser.parse_args()
    build_base(
        options.output,
        seed=options.seed,
        num_clips=options.clips,
        num_tower_updates=options.tower_updates,
        num_language_updates=options.language_updates,
    )


if __name__ == "__main__":
    main()
