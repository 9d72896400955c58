"""VJepaQwenDataCollator: conversations with videos, or with cached features, to a batch with labels.

    Trainer(model, args, train_dataset=samples, data_collator=VJepaQwenDataCollator(processor), ...)

with `remove_unused_columns=False` in the arguments: the columns are the collator's, not the model's.

`labels` cover the assistant's tokens: every answer and the token that ends its turn. Where they are is found without
the help of the chat template (Qwen3.5's marks no generation spans): the conversation is rendered with the answer
replaced by one letter and by another, and what the two renderings share stands before and after the answer.
"""

import os

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Nothing of a template or a prompt can be mistaken for these: only the place where both differ matters.
STAND_INS = ("A", "B")


class VJepaQwenDataCollator:
    """
    Makes a batch of samples. Usable with `Trainer` and with TRL's `SFTTrainer` (`skip_prepare_dataset`).

    A sample has `messages`, the conversation, and as many videos as it has video items, either `videos` (paths, URLs,
    bytes, `VideoEvents`) or `frame_features`, a list of `(num_steps, hidden)`, with `frame_event_ids` (optional). With
    both `videos` and `frame_event_ids`, the frames are returned, cut by the given ids: for training the tower.

    Args:
        processor (`VJepaQwenProcessor`): Bound, or with a checkpoint, if videos are to be encoded.
        max_length (`int`, *optional*): Longest sample in tokens, events included; longer ones are never cut.
        skip_too_long (`bool`): Leave samples that are too long out of their batch and count them in
            `num_skipped`, instead of an error.
        return_frame_features (`bool`, *optional*): See [`VJepaQwenProcessor`]; False when the tower is trained.

    Raises:
        ValueError: for a sample that is too long, or whose answers cannot be found in the rendered text.
    """

    def __init__(
        self,
        processor,
        *,
        max_length: int | None = None,
        skip_too_long: bool = False,
        return_frame_features: bool | None = None,
    ):
        self.processor = processor
        self.max_length, self.skip_too_long = max_length, skip_too_long
        self.return_frame_features = return_frame_features
        self.num_skipped = 0

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict`: `input_ids`, `attention_mask`, `labels` of shape `(batch, length)`, padded on the right, and with
            videos `frame_event_ids` and `frame_features` or `pixel_values_videos`, see [`VJepaQwenProcessor`].
        """
        if any("messages" not in sample for sample in samples):
            raise ValueError(
                f"samples (columns {', '.join(samples[0])}) must have messages; pass remove_unused_columns=False in "
                "the training arguments, or the Trainer removes them"
            )
        rendered = [render_conversation(self.processor, sample["messages"]) for sample in samples]
        batch = self._process(samples, [text for text, _ in rendered])
        if self.max_length is not None:
            kept = self._find_short_enough(samples, batch["attention_mask"].sum(dim=1).tolist())
            if len(kept) < len(samples):
                samples, rendered = [samples[index] for index in kept], [rendered[index] for index in kept]
                batch = self._process(samples, [text for text, _ in rendered])
        offsets, replacements = batch.pop("offset_mapping"), batch.pop("text_replacement_offsets", [])
        labels = torch.full_like(batch["input_ids"], -100)
        for row, (_, spans) in enumerate(rendered):
            starts, ends = offsets[row].unbind(-1)
            gained = (
                [(r["span"][1], r["new_span"][1] - r["span"][1]) for r in replacements[row]] if replacements else []
            )
            for span in spans:
                # Placeholders before the span have become as many as their video has events.
                start, end = (char + max((more for at, more in gained if at <= char), default=0) for char in span)
                is_answer = (starts < end) & (ends > start)
                labels[row, is_answer] = batch["input_ids"][row, is_answer]
        return {**batch, "labels": labels}

    def count_tokens(self, sample: dict) -> int:
        """Length of a sample in tokens, events included; with videos this encodes them."""
        text, _ = render_conversation(self.processor, sample["messages"])
        return self._process([sample], [text])["input_ids"].shape[1]

    def _process(self, samples: list[dict], texts: list[str]):
        vision = {}
        videos = [video for sample in samples for video in sample.get("videos") or []]
        features = [entry for sample in samples for entry in sample.get("frame_features") or []]
        event_ids = [entry for sample in samples for entry in sample.get("frame_event_ids") or []]
        if videos and features:
            raise ValueError("samples of one batch must all have videos or all have frame_features, not some of each")
        if videos:
            vision = {"videos": videos, "return_frame_features": self.return_frame_features}
        elif features:
            vision = {"frame_features": features}
        if event_ids:
            vision["frame_event_ids"] = event_ids
        return self.processor(
            text=texts,
            **vision,
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            padding_side="right",
            return_tensors="pt",
        )

    def _find_short_enough(self, samples: list[dict], lengths: list[int]) -> list[int]:
        """Indices of the samples that fit; never a part of one, which could end in the middle of a video."""
        kept = [index for index, length in enumerate(lengths) if length <= self.max_length]
        if len(kept) == len(samples):
            return kept
        name, length = next(
            (sample.get("name", f"sample {index} of the batch"), length)
            for index, (sample, length) in enumerate(zip(samples, lengths, strict=True))
            if length > self.max_length
        )
        if not self.skip_too_long:
            raise ValueError(
                f"{name} ({length} tokens) must have at most max_length ({self.max_length}) tokens; raise it, or "
                "leave such samples out with skip_too_long"
            )
        if not kept:
            raise ValueError(
                f"{name} ({length} tokens) and every other sample of its batch are longer than max_length "
                f"({self.max_length}), so nothing is left to train on; raise it, or train from cached features "
                "(`vjepa-qwen encode`): then they are left out before the training starts"
            )
        self.num_skipped += len(samples) - len(kept)
        logger.warning(f"{self.num_skipped} samples longer than {self.max_length} tokens were skipped so far")
        return kept


def render_conversation(processor, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """
    Renders a conversation, thinking off, and finds its answers.

    Args:
        processor: Its chat template is used.
        messages (`list[dict]`): The conversation, with the assistant's answers.

    Returns:
        The text, one placeholder for each video, and the `(start, end)` characters of each answer with the token that
        ends its turn.

    Raises:
        ValueError: when there is no answer, or an answer cannot be found: the template renders it differently from any
            other text (a chain of thought in it, for one), no special token ends the turn, or the model would be asked
            in another way at inference.
    """
    text = _render(processor, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = _surroundings(processor, messages, index)
        is_found = text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)
        if not is_found:
            raise ValueError(
                f"message {index} ({_start_of(message)}) must be rendered as it is by the chat template, between a "
                "beginning and an end that do not depend on it; remove what the template treats in a special way, "
                "such as <think>...</think>"
            )
        end = len(text) - len(after)
        tokens = processor.tokenizer.all_special_tokens
        turn_end = max((token for token in tokens if after.lstrip().startswith(token)), key=len, default=None)
        if turn_end is None:
            raise ValueError(
                f"message {index} ({_start_of(message)}) must be followed by a special token that ends the turn, but "
                f"the chat template goes on with {after[:20]!r}; use a template whose turns have an end"
            )
        spans.append((len(before), end + after.index(turn_end) + len(turn_end)))
        is_last = index == len(messages) - 1
        if is_last and _render(processor, messages[:-1], add_generation_prompt=True) != before:
            raise ValueError(
                f"message {index} ({_start_of(message)}) must follow the prompt that the model gets at inference, but "
                "with add_generation_prompt=True the chat template renders another; it cannot be trained with"
            )
    if not spans:
        raise ValueError("messages must have an answer of the assistant: there is nothing to train on")
    for start, end in spans:
        if processor.video_token in text[start:end]:
            raise ValueError(f"an answer must not contain the video placeholder {processor.video_token}")
    return text, spans


def _surroundings(processor, messages: list[dict], index: int) -> tuple[str, str]:
    """What stands before and after the answer `messages[index]` when the answer is an ordinary text."""
    first, second = (
        _render(
            processor,
            [*messages[:index], {"role": "assistant", "content": [{"type": "text", "text": letter}]}]
            + messages[index + 1 :],
        )
        for letter in STAND_INS
    )
    before = os.path.commonprefix([first, second])
    after = first[len(before) + 1 :]
    if first[len(before) :] != STAND_INS[0] + after or second[len(before) :] != STAND_INS[1] + after:
        raise ValueError(f"message {index} must be rendered once by the chat template; it renders it {first!r}")
    return before, after


def _render(processor, messages: list[dict], add_generation_prompt: bool = False) -> str:
    # The videos come from the samples: in the text they are only places.
    messages = [
        {**message, "content": [{"type": "video"} if item.get("type") == "video" else item for item in content]}
        if isinstance(content := message["content"], list)
        else message
        for message in messages
    ]
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def _start_of(message: dict) -> str:
    content = message["content"]
    text = content if isinstance(content, str) else "".join(item.get("text", "") for item in content)
    return repr(text if len(text) <= 40 else text[:40] + "...")
