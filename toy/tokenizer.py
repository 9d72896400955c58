"""The toy's tokenizer: a small byte-level BPE built like Qwen3.5's, with its special tokens.

Called by `python -m vjepa_qwen.toy.build`. Every byte is in the vocabulary, so any text can be encoded.
"""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Qwen3_5Tokenizer

NUM_MERGED_TOKENS = 1000  # at most: the words of the texts may need fewer
# Those of Qwen3.5's that a chat about videos needs; those for boxes, tools, code and sound are left out.
SPECIAL_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<think>": False,  # an added token, but as in Qwen3.5 not a special one: decoding keeps it
    "</think>": False,
}


def train_tokenizer(texts: Iterable[str], chat_template: str) -> Qwen3_5Tokenizer:
    """A Qwen3.5 tokenizer whose merges are learned from `texts`; pad is `<|endoftext|>`, eos is `<|im_end|>`."""
    pattern = Qwen3_5Tokenizer().backend_tokenizer
    bpe = Tokenizer(BPE())
    bpe.normalizer, bpe.pre_tokenizer = pattern.normalizer, pattern.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts, BpeTrainer(vocab_size=NUM_MERGED_TOKENS, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen3_5Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=4096,
        model_specific_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_bos_token": "<|vision_start|>",
            "vision_eos_token": "<|vision_end|>",
        },
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=special, normalized=False) for token, special in SPECIAL_TOKENS.items()]
    )
    tokenizer.chat_template = chat_template
    return tokenizer
