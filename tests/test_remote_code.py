"""A saved folder is all that a fresh process needs: the package itself is not installed there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import user_message
from transformers.dynamic_module_utils import get_imports

from vjepa_qwen import TOY_CHECKPOINT, VJepaQwenProcessor

ROOT = Path(__file__).parent.parent
CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}

SCRIPT = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vjepa_qwen":
            raise ImportError("the package is not installed here")

sys.meta_path.insert(0, Blocker())
import torch, transformers

folder, clip, messages = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
chat = json.loads(sys.argv[4])
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
unbound = processor.apply_chat_template(messages, **chat)
results = {"unbound": unbound["input_ids"].tolist()}
for name in ["AutoModel", "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM"]:
    model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__name__ == "VJepaQwenForConditionalGeneration", type(model)
    inputs = processor.bind(model).apply_chat_template(messages, **chat)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert torch.allclose(logits, model(**unbound).logits, atol=1e-4)
    results[name] = {
        "logits": logits.tolist(),
        "tokens": model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist(),
    }
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__name__ == "VJepaQwenConfig"
video_processor = transformers.AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True)
assert video_processor(clip, return_tensors="pt").pixel_values_videos.ndim == 5
# Saving again from remote code keeps everything that the next load needs.
model.save_pretrained(sys.argv[5])
processor.save_pretrained(sys.argv[5])
print(json.dumps(results))
"""


def run_without_the_package(folder, clip, resaved, cache):
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, clip, json.dumps(user_message(clip)), json.dumps(CHAT), str(resaved)],
        capture_output=True,
        text=True,
        cwd=cache,
        env={"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(cache)},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.slow
def test_fresh_process_without_the_package_gives_identical_logits_and_tokens(
    tiny_checkpoint, model, processor, clips, tmp_path
):
    inputs = processor.bind(model).apply_chat_template(user_message(clips[0]), **CHAT)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist()

    for name, folder in (("first", tiny_checkpoint), ("again", tmp_path / "first")):
        cache = tmp_path / f"cache-{name}"
        cache.mkdir()
        results = run_without_the_package(str(folder), clips[0], tmp_path / name, cache)
        assert results.pop("unbound") == inputs["input_ids"].tolist()
        for auto_class, result in results.items():
            torch.testing.assert_close(torch.tensor(result["logits"]), logits, atol=1e-4, rtol=0, msg=auto_class)
            assert result["tokens"] == tokens, auto_class


@pytest.mark.parametrize("folder", ["tiny_checkpoint", "toy"])
def test_folder_holds_the_code_as_it_is_here(folder, tiny_checkpoint):
    path = Path(tiny_checkpoint if folder == "tiny_checkpoint" else TOY_CHECKPOINT)
    names = sorted(file.name for file in path.glob("*.py"))
    assert {"configuration_vjepa_qwen.py", "modeling_vjepa_qwen.py", "processing_vjepa_qwen.py"} <= set(names)
    for name in names:
        assert (path / name).read_text() == (ROOT / name).read_text()


def test_remote_code_needs_only_what_the_hub_files_may_import(tiny_checkpoint):
    """transformers refuses to load remote code when a package that it imports anywhere is missing."""
    allowed = {"transformers", "torch", "torchvision", "safetensors", "huggingface_hub", "av", "numpy", "scipy"}
    for file in Path(tiny_checkpoint).glob("*.py"):
        assert set(get_imports(file)) - set(sys.stdlib_module_names) <= allowed, file.name


def test_every_auto_class_is_in_the_saved_files(tiny_checkpoint):
    config = json.loads((Path(tiny_checkpoint) / "config.json").read_text())
    assert set(config["auto_map"]) >= {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoProcessor",
        "AutoVideoProcessor",
    }
    processor_config = json.loads((Path(tiny_checkpoint) / "processor_config.json").read_text())
    assert processor_config["auto_map"] == {"AutoProcessor": "processing_vjepa_qwen.VJepaQwenProcessor"}


def test_one_copy_of_the_package_is_imported(model):
    """The root is a package: a wrong pytest configuration imports it twice, under two names."""
    copies = [name for name in sys.modules if name.split(".")[-1] == "modeling_vjepa_qwen"]
    copies = [name for name in copies if not name.startswith("transformers_modules.")]  # remote code of other tests
    assert copies == ["vjepa_qwen.modeling_vjepa_qwen"]
    assert type(model).__module__ == "vjepa_qwen.modeling_vjepa_qwen"


def test_saved_with_all_parts_reloads_as_a_processor(tiny_checkpoint):
    assert VJepaQwenProcessor.from_pretrained(tiny_checkpoint).tokenizer.padding_side == "left"
