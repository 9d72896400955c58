"""Tiny random models, a tiny tokenizer and clips: everything that the tests share. CPU, offline, seconds."""

import os

# Before transformers is imported: no test may ask a server.
os.environ["HF_HUB_OFFLINE"] = "1"

import av
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vjepa_qwen import (
    TOY_CHECKPOINT,
    VJepaQwenConfig,
    VJepaQwenForConditionalGeneration,
    VJepaQwenProcessor,
    VJepaQwenVideoProcessor,
)

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
VISION_CONFIG = {
    "model_type": "vjepa2",
    "crop_size": 32,
    "patch_size": 16,
    "frames_per_clip": 16,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    # Random weights of the usual size give features that hardly differ between frames; these do.
    "initializer_range": 0.2,
}
TEXT_CONFIG = {
    "model_type": "qwen3_5_text",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "initializer_range": 0.1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}


@pytest.fixture(scope="session")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["Describe this video.", "A cooking video: a red circle moves left."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL_TOKENS,
        padding_side="left",
    )
    template = os.path.join(os.path.dirname(TOY_CHECKPOINT), "chat_template.jinja")
    with open(template, encoding="utf-8") as file:
        tokenizer.chat_template = file.read()
    return tokenizer


def make_model(tokenizer, text_config=TEXT_CONFIG, vision_config=VISION_CONFIG, seed=0):
    """A tiny random model in float32, in evaluation mode, whose generation ends at the tokenizer's end of turn."""
    torch.manual_seed(seed)
    config = VJepaQwenConfig(
        vision_config=vision_config,
        text_config={**text_config, "vocab_size": len(tokenizer)},
        projector_hidden_size=40,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    model = VJepaQwenForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@pytest.fixture(scope="session")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def processor(tokenizer):
    """From parts, unbound: bind it, or pass features."""
    video_processor = VJepaQwenVideoProcessor(crop_size=32, frames_per_clip=16, tubelet_size=2)
    segmentation = {"min_events": 2, "max_events": 4, "min_distance": 1e-6}
    return VJepaQwenProcessor(video_processor, tokenizer, event_segmentation=segmentation)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, model, tokenizer):
    """A folder with the tiny model, its processor and the remote code, as `save_pretrained` writes them."""
    folder = str(tmp_path_factory.mktemp("tiny_checkpoint"))
    video_processor = VJepaQwenVideoProcessor(crop_size=32, frames_per_clip=16, tubelet_size=2)
    segmentation = {"min_events": 2, "max_events": 4, "min_distance": 1e-6}
    model.save_pretrained(folder)
    VJepaQwenProcessor(video_processor, tokenizer, event_segmentation=segmentation).save_pretrained(folder)
    return folder


def write_scenes(path, colors, frames_per_scene=8, fps=8, size=48):
    """An H.264 clip of scenes, each of one colour with a moving square."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for color in colors:
            for index in range(frames_per_scene):
                image = np.full((size, size, 3), color, dtype=np.uint8)
                image[8:16, index : index + 8] = 255 - np.array(color)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Three clips with 3, 1 and 4 scenes: below, of and above half a window of frames."""
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_scenes(folder / "three.mp4", [(200, 30, 30), (30, 200, 30), (30, 30, 200)]),
        write_scenes(folder / "one.mp4", [(120, 120, 40)]),
        write_scenes(folder / "four.mp4", [(250, 250, 250), (10, 10, 10), (200, 100, 0), (0, 100, 200)]),
    ]


def user_message(*videos, text="Describe this video."):
    """One conversation: the videos, then the text."""
    content = [{"type": "video", "video": video} for video in videos] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]
