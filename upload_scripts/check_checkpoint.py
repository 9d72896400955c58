"""What a checkpoint answers to one made-up clip, so that two ways of loading it can be compared.

`push_to_hub.py` asks in its own process, with the package's classes, and in a fresh one that runs this file:

    python -I upload_scripts/check_checkpoint.py FOLDER ANSWER.safetensors

There the package cannot be imported. All that loads the folder is its own code, through `pipeline` without a task, as
whoever downloads it will do. So nothing of the package is imported here.
"""

import importlib.abc
import sys

import numpy as np
import torch
from safetensors.torch import save_file


class PackageBlocker(importlib.abc.MetaPathFinder):
    """Refuses the package, installed or not."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vjepa_qwen":
            raise ImportError("vjepa_qwen: only the code in the folder may be used here")


def get_answer(model, processor) -> dict[str, torch.Tensor]:
    """
    The model's logits and greedy tokens for a clip of three scenes.

    Args:
        model (`VJepaQwenForConditionalGeneration`), processor (`VJepaQwenProcessor`): Of one checkpoint.

    Returns:
        `dict[str, torch.Tensor]`: On the CPU, `input_ids` `(1, length)`, `frame_event_ids` `(1, num_steps)`, `logits`
        `(1, length, vocab_size)` float32 and `tokens` `(1, at most 16)`.
    """
    frames = np.zeros((24, 64, 64, 3), dtype=np.uint8)
    for index, color in enumerate([(200, 40, 40), (40, 200, 40), (40, 40, 200)]):
        frames[8 * index : 8 * index + 8] = color
    for index in range(24):
        frames[index, 16:32, index : index + 16] = 255
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "Describe this video."}]
    inputs = processor.bind(model).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"video_metadata": {"fps": 8.0}},
    )
    on_device = inputs.to(model.device)
    with torch.no_grad():
        logits = model(**on_device).logits.float()
    tokens = model.generate(**on_device, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answer = {"logits": logits, "tokens": tokens}
    answer |= {name: inputs[name] for name in ("input_ids", "frame_event_ids")}
    return {name: tensor.cpu().contiguous() for name, tensor in answer.items()}


def get_placement() -> dict:
    """Where a model is loaded to: the accelerators, if there are any."""
    return {"device_map": "auto"} if torch.accelerator.is_available() else {"device": "cpu"}


if __name__ == "__main__":
    sys.meta_path.insert(0, PackageBlocker())
    from transformers import pipeline

    pipe = pipeline(model=sys.argv[1], trust_remote_code=True, **get_placement())
    save_file(get_answer(pipe.model, pipe.processor), sys.argv[2])
