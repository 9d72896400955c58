"""Training of the toy's tower: what each scene shows, and features that turn at the cuts.

Called by `python -m vjepa_qwen.toy.build`. The tower learns two things at once from the generator's ground truth:

* linear heads on the mean feature of each scene name its domain, shape, colour, size, motion, word and letters;
* neighbouring steps inside a scene get the same direction (cosine distance 0) and steps on both sides of a cut
  different ones, so that the ordinary event segmentation finds the cuts.

The heads are thrown away; the language model has to read everything from the features.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .synthetic_shorts import COLOURS, DOMAINS, MOTIONS, SHAPES, SIZES, WORDS, Scene, SyntheticShort

MAX_LETTERS = max(len(word) for word in WORDS)
CLASSES = {
    "domain": len(DOMAINS),
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "motion": len(MOTIONS),
    "word": len(WORDS) + 1,  # the last class: no text
    "letters": 27,
}
CUT_DISTANCE = 0.7  # cosine distance that the two sides of a cut should have at least


def scene_labels(domain: str, scene: Scene) -> list[int]:
    """Class numbers in the order of `CLASSES`, the letters spelled out at the end."""
    word = scene.word or ""
    letters = [ord(letter) - ord("A") for letter in word] + [26] * (MAX_LETTERS - len(word))
    return [
        DOMAINS.index(domain),
        SHAPES.index(scene.shape),
        list(COLOURS).index(scene.colour),
        list(SIZES).index(scene.size),
        list(MOTIONS).index(scene.motion),
        WORDS.index(word) if word else len(WORDS),
        *letters,
    ]


def scene_of_steps(short: SyntheticShort, timestamps: np.ndarray) -> np.ndarray:
    """Scene of each temporal step, `(num_steps,)` int64, from the times of its two frames.

    A step that a cut divides belongs to the scene that begins in it.
    """
    return np.searchsorted(np.array(short.cut_seconds), timestamps[1::2] + 1e-4, side="right")


class Heads(nn.Module):
    """Linear classifiers: the supervision, not part of the checkpoint."""

    def __init__(self, hidden_size: int, names: tuple[str, ...] = tuple(CLASSES)):
        super().__init__()
        self.columns = {name: index for index, name in enumerate(CLASSES) if name in names}
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(hidden_size, CLASSES[name] * (MAX_LETTERS if name == "letters" else 1))
                for name in self.columns
            }
        )

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """`(num_rows, hidden)` and `(num_rows, 6 + MAX_LETTERS)` to the loss and the accuracy of each head."""
        loss, accuracies = features.new_zeros(()), {}
        for name, column in self.columns.items():
            logits = self.heads[name](features).unflatten(1, (-1, CLASSES[name])).flatten(0, 1)
            targets = (labels[:, column:] if name == "letters" else labels[:, column]).flatten()
            loss = loss + functional.cross_entropy(logits, targets)
            accuracies[name] = (logits.argmax(1) == targets).float().mean().item()
        return loss, accuracies


def scene_means(features: torch.Tensor, scene_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(batch, steps, hidden)` to the mean of each scene, `(num_scenes, hidden)`, and one flat step index of each."""
    flat_ids = (scene_ids + 8 * torch.arange(len(features)).unsqueeze(1)).flatten()
    _, membership = torch.unique(flat_ids, return_inverse=True)
    one_hot = functional.one_hot(membership).to(features.dtype)
    return one_hot.T @ features.flatten(0, 1) / one_hot.sum(0).unsqueeze(1), one_hot.argmax(0)


def boundary_loss(features: torch.Tensor, scene_ids: torch.Tensor) -> torch.Tensor:
    """Distances of neighbouring steps: 0 inside a scene, at least `CUT_DISTANCE` at a cut."""
    distances = 1 - functional.cosine_similarity(features[:, 1:], features[:, :-1], dim=-1)
    is_cut = scene_ids[:, 1:] != scene_ids[:, :-1]
    inside = distances[~is_cut].mean()
    return inside + functional.relu(CUT_DISTANCE - distances[is_cut]).sum() / is_cut.sum().clamp(min=1)


def augment(frames: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Brightness, contrast and colour balance of each clip, `(batch, frames, 3, size, size)` in 0..1."""
    shape = (len(frames), 1, 3, 1, 1)
    contrast = 1 + 0.15 * torch.randn((len(frames), 1, 1, 1, 1), generator=generator).clamp(-2, 2)
    balance = 0.03 * torch.randn(shape, generator=generator).clamp(-2, 2)
    return ((frames - 0.5) * contrast + 0.5 + balance).clamp(0, 1)


def shape_tokens(centres: np.ndarray, grid_size: int) -> np.ndarray:
    """The patch, of `grid_size ** 2`, that shows the shape's centre: `(..., num_frames, 2)` to `(..., num_steps)`."""
    cells = np.floor((centres[..., 0::2, :] + centres[..., 1::2, :]) / 2 * grid_size).astype(np.int64)
    cells = cells.clip(0, grid_size - 1)
    return cells[..., 1] * grid_size + cells[..., 0]


def train_tower(tower, clips, *, normalize, num_updates, seed, report, batch_size=16, peak_rate=2e-3):
    """
    Trains `tower` in place.

    Besides the heads on the mean of each scene there are two that look closer, at the patch with the shape and at the
    row with the text: in the mean over all patches there is little to learn small shapes from.

    Args:
        tower (`VJepaQwenVisionTower`): Randomly initialised.
        clips (`RenderedClips`): From `rendering.render_clips`.
        normalize: Function from frames in 0..1, `(..., 3, size, size)`, to the tower's input.
        report: Called as `report(update, num_updates, figures)` after every update.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden_size, grid_size = tower.config.hidden_size, tower.config.crop_size // tower.config.patch_size
    scene_heads = Heads(hidden_size)
    shape_heads = Heads(hidden_size, ("shape", "colour", "size", "motion"))
    text_heads = Heads(hidden_size, ("word", "letters"))
    scene_ids = np.stack([scene_of_steps(s, times) for s, times in zip(clips.shorts, clips.timestamps, strict=True)])
    tokens = shape_tokens(clips.centres, grid_size)
    labels = [np.array([scene_labels(short.domain, scene) for scene in short.scenes]) for short in clips.shorts]
    labels = np.stack([clip[ids] for clip, ids in zip(labels, scene_ids, strict=True)])  # of each step

    modules = nn.ModuleList([tower, scene_heads, shape_heads, text_heads])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=peak_rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda u: min((u + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * u / num_updates))),
    )
    updates_per_epoch = len(scene_ids) // batch_size
    tower.train()
    for update in range(num_updates):
        if update % updates_per_epoch == 0:
            order = torch.randperm(len(scene_ids), generator=generator)
        rows = order[update % updates_per_epoch * batch_size :][:batch_size].numpy()
        # Every second step in most batches: half the cost, and other speeds. Whole windows as the training ends.
        if update < 0.85 * num_updates:
            steps = slice(int(torch.randint(0, 2, (), generator=generator)), None, 2)
        else:
            steps = slice(None)
        ids, targets, cells = (torch.from_numpy(array[rows][:, steps]) for array in (scene_ids, labels, tokens))
        pixels = torch.from_numpy(clips.frames[rows]).unflatten(1, (-1, 2))[:, steps].flatten(1, 2).float() / 255
        output = tower(normalize(augment(pixels, generator)))
        features = output.pooler_output
        patches = output.last_hidden_state.unflatten(1, (ids.shape[1], -1))

        means, first_steps = scene_means(features, ids)
        scene_loss, figures = scene_heads(means, targets.flatten(0, 1)[first_steps])
        at_shape = patches.gather(2, cells[..., None, None].expand(-1, -1, 1, hidden_size)).flatten(0, 2)
        shape_loss, _ = shape_heads(at_shape, targets.flatten(0, 1))
        text_loss, _ = text_heads(patches[:, :, -grid_size:].mean(2).flatten(0, 1), targets.flatten(0, 1))
        turn_loss = boundary_loss(features, ids)
        (scene_loss + shape_loss + text_loss + 2 * turn_loss).backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(update + 1, num_updates, {"loss": scene_loss.item(), "turn": turn_loss.item(), **figures})
    tower.eval()
    return scene_heads
