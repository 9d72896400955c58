"""Light checkpoints: tower and projector here, the language model in a repository or folder of its own."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from vjepa_qwen import VJepaQwenForConditionalGeneration, VJepaQwenModel, VJepaQwenVideoProcessor
from vjepa_qwen.language_model_source import LanguageModelSource
from vjepa_qwen.processing_vjepa_qwen import VJepaQwenProcessor

SMALL = {"vocab_size": 302, "hidden_size": 32, "initializer_range": 0.2}
# Other names of everything: the prefix, the embeddings, the head; tied and untied.
OTHER_TEXT_CONFIGS = {
    "llama": {
        "model_type": "llama",
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": {"model_type": "gpt_neox", "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def get_logits(model, seed=0):
    """Of a prompt with one video, whose features are random."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 8, model.config.vision_config.hidden_size, generator=generator)
    event_ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    token = model.config.video_token_id
    input_ids = torch.tensor([[5, 6, token, token, token, 7, 8, 9]])
    with torch.no_grad():
        outputs = model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            frame_features=features.to(model.dtype),
            frame_event_ids=event_ids,
        )
    return outputs.logits.float()


def assert_same_model(model, expected):
    assert set(model.state_dict()) == set(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, atol=0, rtol=0, msg=name)
    torch.testing.assert_close(get_logits(model), get_logits(expected), atol=0, rtol=0)


def save_language_model(model, folder, max_shard_size="50GB"):
    """The language model alone, as `AutoModelForCausalLM` saves it."""
    text_config = copy.deepcopy(model.config.text_config)
    language_model = AutoModelForCausalLM.from_config(text_config)
    language_model.base_model.load_state_dict(model.model.language_model.state_dict())
    language_model.get_output_embeddings().weight.data.copy_(model.lm_head.weight.data)
    language_model.save_pretrained(folder, max_shard_size=max_shard_size)
    return str(folder)


def save_light(model, folder, language_model):
    model.config.language_model_name_or_path = str(language_model)
    try:
        model.save_pretrained(folder, light=True)
    finally:
        model.config.language_model_name_or_path = None
    return str(folder)


@pytest.fixture(scope="module")
def language_model(model, tmp_path_factory):
    """The tiny model's language model in a folder, in several shards."""
    folder = save_language_model(model, tmp_path_factory.mktemp("language_model"), max_shard_size="40KB")
    assert len(list(Path(folder).glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def whole_language_model(model, tmp_path_factory):
    """As Qwen3.5 is on the Hub: `model.language_model.*` and `lm_head.*`, a visual tower and an MTP head beside."""
    folder = tmp_path_factory.mktemp("whole_language_model")
    state_dict = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    names = sorted(state_dict)
    shards = {
        "model-00001-of-00003.safetensors": {name: state_dict[name] for name in names[: len(names) // 2]},
        "model-00002-of-00003.safetensors": {name: state_dict[name] for name in names[len(names) // 2 :]},
        "model-00003-of-00003.safetensors": {"model.visual.patch_embed.weight": torch.zeros(2, 2)},
    }
    shards["model-00002-of-00003.safetensors"]["mtp.layers.0.weight"] = torch.zeros(2, 2)
    weight_map = {}
    for file_name, shard in shards.items():
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = AutoConfig.for_model("qwen3_5").to_dict()
    config["text_config"] = model.config.text_config.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def light(model, language_model, tokenizer, tmp_path_factory):
    """A light repository with its processor."""
    folder = save_light(model, tmp_path_factory.mktemp("light"), language_model)
    video_processor = VJepaQwenVideoProcessor(crop_size=32, frames_per_clip=16, tubelet_size=2)
    segmentation = {"min_events": 2, "max_events": 4, "min_distance": 1e-6}
    VJepaQwenProcessor(video_processor, tokenizer, event_segmentation=segmentation).save_pretrained(folder)
    return folder


def tensor_names(folder):
    names = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    return names


def test_light_checkpoint_holds_tower_and_projector_and_names_the_rest(light, language_model):
    assert {".".join(name.split(".")[:2]) for name in tensor_names(light)} == {
        "model.vision_tower",
        "model.multi_modal_projector",
    }
    config = json.loads((Path(light) / "config.json").read_text())
    assert config["language_model_name_or_path"] == language_model
    assert (Path(light) / "generation_config.json").exists()


def test_light_checkpoint_loads_as_one_model(light, model):
    linked, info = VJepaQwenForConditionalGeneration.from_pretrained(light, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_model(linked, model)
    assert linked.name_or_path == linked.config.name_or_path == light
    assert linked.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert not linked.training


def test_light_checkpoint_of_a_whole_multimodal_one(model, whole_language_model, tmp_path):
    light = save_light(model, tmp_path / "light", whole_language_model)
    (Path(whole_language_model) / "model-00003-of-00003.safetensors").rename(tmp_path / "away")  # not needed
    try:
        assert_same_model(VJepaQwenForConditionalGeneration.from_pretrained(light), model)
    finally:
        (tmp_path / "away").rename(Path(whole_language_model) / "model-00003-of-00003.safetensors")


@pytest.mark.parametrize("name", OTHER_TEXT_CONFIGS)
def test_language_models_with_other_names(name, tokenizer, tmp_path):
    model = make_model(tokenizer, {**SMALL, **OTHER_TEXT_CONFIGS[name]})
    language_model = save_language_model(model, tmp_path / "language_model")
    light = save_light(model, tmp_path / "light", language_model)
    linked = VJepaQwenForConditionalGeneration.from_pretrained(light)
    assert_same_model(linked, model)
    linked.save_pretrained(tmp_path / "full")
    assert_same_model(VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "full"), model)


def test_model_without_head_loads_too(light, model):
    linked = VJepaQwenModel.from_pretrained(light)
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(linked.state_dict()[name], tensor), name


@pytest.mark.parametrize("language_model_form", ["language_model", "whole_language_model"])
def test_language_model_can_be_swapped(language_model_form, request, light, tokenizer, model, tmp_path):
    other = make_model(tokenizer, seed=1)
    if language_model_form == "language_model":
        folder = save_language_model(other, tmp_path / "other")
    else:
        other, folder = model, request.getfixturevalue(language_model_form)
    linked = VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=folder)
    expected = copy.deepcopy(model)
    expected.model.language_model.load_state_dict(other.model.language_model.state_dict())
    expected.lm_head.load_state_dict(other.lm_head.state_dict())
    assert_same_model(linked, expected)
    assert linked.config.language_model_name_or_path == folder
    # And what is saved afterwards, light or not, is the swapped one.
    for light_again in (False, True):
        linked.save_pretrained(tmp_path / "again", light=light_again)
        assert_same_model(VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "again"), expected)
        shutil.rmtree(tmp_path / "again")


def test_swap_works_on_a_full_checkpoint_whose_first_shard_is_its_own(model, tokenizer, tmp_path):
    other = make_model(tokenizer, {**SMALL, **OTHER_TEXT_CONFIGS["llama"]}, seed=1)
    light = load_light_tensors(model)
    rest = {name: tensor for name, tensor in model.state_dict().items() if name not in light}
    model.config.save_pretrained(tmp_path)
    weight_map = {}
    for number, shard in enumerate((light, rest), start=1):
        save_file(shard, tmp_path / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, f"model-0000{number}-of-00002.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    folder = save_language_model(other, tmp_path / "other")
    swapped = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path, language_model=folder)
    assert swapped.config.text_config.model_type == "llama"
    assert torch.equal(swapped.lm_head.weight, other.lm_head.weight)
    assert torch.equal(
        swapped.model.multi_modal_projector.linear_1.weight, light["model.multi_modal_projector.linear_1.weight"]
    )


def load_light_tensors(model):
    prefixes = ("model.vision_tower.", "model.multi_modal_projector.")
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefixes)}


def test_full_save_needs_the_language_model_no_more(light, model, tmp_path):
    linked = VJepaQwenForConditionalGeneration.from_pretrained(light)
    linked.save_pretrained(tmp_path, max_shard_size="50KB")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.get("language_model_name_or_path") is None and config.get("language_model_revision") is None
    assert tensor_names(tmp_path) == set(model.state_dict())
    assert_same_model(VJepaQwenForConditionalGeneration.from_pretrained(tmp_path), model)
    assert linked.config.language_model_name_or_path is not None  # it can still be saved light


def test_light_save_refuses_to_lose_a_trained_language_model(light, tmp_path):
    linked = VJepaQwenForConditionalGeneration.from_pretrained(light)
    with torch.no_grad():
        linked.model.multi_modal_projector.linear_1.bias += 1
    linked.save_pretrained(tmp_path / "light", light=True)
    again = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "light")
    assert_same_model(again, linked)
    with torch.no_grad():
        linked.model.language_model.layers[3].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(
        ValueError, match=r"light \(True\) must not lose anything, but model.language_model.layers.3.mlp"
    ):
        linked.save_pretrained(tmp_path / "lost", light=True)
    linked.save_pretrained(tmp_path / "full")
    assert_same_model(VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "full"), linked)


def test_light_save_needs_a_link(model, tmp_path):
    with pytest.raises(ValueError, match=r"language_model_name_or_path of the configuration \(None\) must name"):
        model.save_pretrained(tmp_path, light=True)


def test_tensors_keep_their_names_when_saved_after_a_key_mapping(model, tmp_path):
    """A tower that was loaded under other names must not be saved under them: the next load would not find it."""
    renamed = {name.replace("model.vision_tower.", "tower."): tensor for name, tensor in model.state_dict().items()}
    model.config.save_pretrained(tmp_path)
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = VJepaQwenForConditionalGeneration.from_pretrained(
        tmp_path, key_mapping={r"^tower\.": "model.vision_tower."}
    )
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "again"), model)


def test_dtype_and_device_map(light, model):
    linked = VJepaQwenForConditionalGeneration.from_pretrained(light, dtype=torch.bfloat16, device_map={"": "cpu"})
    assert {parameter.dtype for parameter in linked.parameters()} == {torch.bfloat16}
    assert torch.equal(linked.lm_head.weight, model.lm_head.weight.bfloat16())


def test_offloaded_to_disk_without_a_copy(light, model, tmp_path):
    device_map = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "lm_head": "disk"}
    device_map |= {"model.language_model": "disk"}
    linked = VJepaQwenForConditionalGeneration.from_pretrained(
        light, device_map=device_map, offload_folder=str(tmp_path)
    )
    assert linked.lm_head.weight.is_meta
    assert not list(tmp_path.glob("**/*.dat")) and not list(tmp_path.glob("**/*.safetensors"))
    torch.testing.assert_close(get_logits(linked), get_logits(model), atol=1e-5, rtol=0)


def test_temporary_files_are_gone_after_loading(light, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    VJepaQwenForConditionalGeneration.from_pretrained(light)
    assert os.listdir(tmp_path) == []


def test_processor_alone_needs_no_language_model(light, clips, tmp_path):
    folder = tmp_path / "light"
    shutil.copytree(light, folder)
    config = json.loads((folder / "config.json").read_text())
    config["language_model_name_or_path"] = "nobody/nothing"
    (folder / "config.json").write_text(json.dumps(config))
    processor = AutoProcessor.from_pretrained(str(folder), trust_remote_code=True)
    assert processor.segment(clips[0])[0].num_events >= 2


# Repositories on the Hub, in its cache

COMMITS = ["0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"]


@pytest.fixture
def cached_language_models(model, tokenizer, language_model, tmp_path, monkeypatch):
    """A repository `owner/name` with two commits; `main` points at the second."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--owner--name"
    shutil.copytree(language_model, repository / "snapshots" / COMMITS[0])
    other = make_model(tokenizer, seed=1)
    save_language_model(other, repository / "snapshots" / COMMITS[1])
    for ref, commit in (("main", COMMITS[1]), ("v1.0", COMMITS[0])):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return repository, {COMMITS[0]: model, COMMITS[1]: other}


@pytest.mark.parametrize(("name", "commit"), [("owner/name@v1.0", COMMITS[0]), ("owner/name", COMMITS[1])])
def test_commit_of_the_language_model_is_pinned(name, commit, light, cached_language_models, tmp_path):
    repository, models = cached_language_models
    linked = VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=name)
    assert torch.equal(linked.lm_head.weight, models[commit].lm_head.weight)
    assert linked.config.language_model_name_or_path == "owner/name"
    assert linked.config.language_model_revision == commit
    linked.save_pretrained(tmp_path / "light", light=True)
    for ref in (repository / "refs").iterdir():  # the branch moves on
        ref.write_text(COMMITS[1 - COMMITS.index(commit)])
    again = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "light")
    assert_same_model(again, linked)


def test_revision_that_is_not_there(light, cached_language_models):
    with pytest.raises(OSError, match=r"language_model \('owner/name'"):
        VJepaQwenForConditionalGeneration.from_pretrained(light, language_model="owner/name@v2.0")


# Errors


def test_language_model_of_another_width_is_an_error_that_names_both(light, tokenizer, tmp_path):
    other = make_model(tokenizer, {**SMALL, **OTHER_TEXT_CONFIGS["llama"], "hidden_size": 64})
    folder = save_language_model(other, tmp_path / "wide")
    with pytest.raises(ValueError, match=r"hidden_size 64\) must have the width .* was trained for \(32\)"):
        VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=folder)


def test_language_model_that_is_not_there(light, tmp_path):
    with pytest.raises(OSError, match=r"language_model \('nobody/nothing'\) must be a repository or folder with"):
        VJepaQwenForConditionalGeneration.from_pretrained(light, language_model="nobody/nothing")
    with pytest.raises(OSError, match=r"must be a repository or folder with config.json"):
        VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=tmp_path)
    with pytest.raises(ValueError, match=r"language_model \('/nowhere/model.gguf'\) must be a folder, a GGUF file"):
        VJepaQwenForConditionalGeneration.from_pretrained(light, language_model="/nowhere/model.gguf")


def test_interrupted_download_is_an_error_that_names_the_file(light, language_model, tmp_path):
    folder = tmp_path / "language_model"
    shutil.copytree(language_model, folder)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(OSError, match=rf"{shard.name} of checkpoint .* must be a whole safetensors file"):
        VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=folder)
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=folder)


def test_missing_tensor_is_an_error_not_a_random_one(light, language_model, tmp_path):
    folder = tmp_path / "language_model"
    shutil.copytree(language_model, folder)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    missing = sorted(tensors)[0]
    del tensors[missing]
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must together hold every tensor of the model; missing: .*"):
        VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=folder)


def test_two_towers_in_one_file_are_an_error(light, tiny_checkpoint):
    with pytest.raises(ValueError, match=r"must not hold model\..*, which .* holds, beside its own weights"):
        VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=tiny_checkpoint)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3.5-27B", ("Qwen/Qwen3.5-27B", None, None)),
        ("Qwen/Qwen3.5-27B@v1.0", ("Qwen/Qwen3.5-27B", "v1.0", None)),
        ("a/b-GGUF:b-Q4_K_M.gguf", ("a/b-GGUF", None, "b-Q4_K_M.gguf")),
        ("a/b-GGUF@main:sub/b-Q4_K_M.gguf", ("a/b-GGUF", "main", "sub/b-Q4_K_M.gguf")),
    ],
)
def test_how_a_language_model_is_named(text, expected):
    source = LanguageModelSource.parse(text)
    assert (source.name, source.revision, source.gguf_file) == expected


SCRIPT = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vjepa_qwen":
            raise ImportError("the package is not installed here")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModel, AutoModelForCausalLM

folder, swapped, resaved = sys.argv[1:]
for options in ({}, {"language_model": swapped}):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto", **options)
    model.save_pretrained(resaved + "-light", light=True)
    model.save_pretrained(resaved)
    for again in (resaved, resaved + "-light"):
        loaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
print("done")
"""


@pytest.mark.slow
def test_fresh_process_without_the_package(light, whole_language_model, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, light, whole_language_model, str(tmp_path / "resaved")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.splitlines()[-1] == "done"
