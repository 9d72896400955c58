"""The research release's files, as the release wrote them, to a repository: nothing lost, nothing left over."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import TEXT_CONFIG, VISION_CONFIG, user_message
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, VJEPA2Config, VJEPA2Model
from transformers.models.qwen3_5 import Qwen3_5TextConfig
from typer.testing import CliRunner

from vjepa_qwen import VJepaQwenForConditionalGeneration
from vjepa_qwen.cli import app
from vjepa_qwen.modeling_vjepa_qwen import VJepaQwenVisionTower
from vjepa_qwen.upload_scripts.convert_checkpoint import REPORT_NAME, convert, main, read_projector

TARGET_MODULES = ["query", "key", "value", "proj"]  # "proj" is also the patch embedding's convolution
VISION = {name: value for name, value in VISION_CONFIG.items() if name != "model_type"}
TEXT = {name: value for name, value in TEXT_CONFIG.items() if name != "model_type"}


class ReleaseProjector(nn.Module):
    """As in the release's card: the state dict has `proj.{0,2,4}.{weight,bias}`."""

    def __init__(self, vision_size, hidden_size, text_size):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(vision_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, text_size),
        )

    def forward(self, features):
        return self.proj(features)


def write_release(folder, vision_config, projector_sizes, rank=4, alpha=8, target_modules=TARGET_MODULES):
    """The loose files, and the base tower beside them: returns (projector, adapted V-JEPA 2)."""
    torch.manual_seed(0)
    base = VJEPA2Model(vision_config).eval()
    base.save_pretrained(folder / "tower")
    projector = ReleaseProjector(*projector_sizes)
    for name in ("exp5_projection/proj_epoch5.pt", "exp6_projection/proj_lora_epoch5.pt"):
        (folder / name).parent.mkdir()
        torch.save(projector.state_dict(), folder / name)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules, init_lora_weights=False)
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(folder / "exp6_vjepa_lora")
    return projector, adapted


@pytest.fixture(scope="module")
def release(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("release")
    projector, adapted = write_release(folder, VJEPA2Config(**VISION), (24, 40, 32))
    torch.manual_seed(1)
    language_model = AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**TEXT, vocab_size=len(tokenizer)))
    language_model.save_pretrained(folder / "language_model", max_shard_size="40KB")
    tokenizer.save_pretrained(folder / "language_model")
    return folder, projector, adapted, language_model.eval()


def run(release, output, **options):
    folder = str(release[0])
    defaults = {"tower": f"{folder}/tower", "language_model": f"{folder}/language_model", "dtype": "float32"}
    return convert(folder, str(output), **{**defaults, **options})


def tower_output(adapted, frames):
    with torch.no_grad():
        return adapted(frames, skip_predictor=True).last_hidden_state


@pytest.mark.parametrize("form", ["light", "full"])
def test_converted_model_is_the_release(release, form, tmp_path, clips):
    folder, projector, adapted, language_model = release
    report = run(release, tmp_path / "out", form=form)
    model = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "out")
    for index, layer in ((0, "linear_1"), (2, "linear_2"), (4, "linear_3")):
        converted = model.model.multi_modal_projector.get_submodule(layer)
        assert torch.equal(converted.weight, projector.proj[index].weight)
        assert torch.equal(converted.bias, projector.proj[index].bias)
    frames = torch.randn(1, 16, 3, 32, 32)
    with torch.no_grad():
        output = model.model.vision_tower(frames).last_hidden_state
    torch.testing.assert_close(output, tower_output(adapted, frames), atol=1e-5, rtol=1e-5)
    with adapted.disable_adapter():  # the adapter does something
        assert not torch.allclose(output, tower_output(adapted, frames), atol=1e-2)
    input_ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, language_model(input_ids).logits, atol=0, rtol=0)

    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert processor.video_token_id == model.config.video_token_id
    inputs = processor.bind(model).apply_chat_template(
        user_message(clips[0]), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1

    predictor = {f"predictor.{name}" for name in adapted.base_model.model.predictor.state_dict() if "lora" not in name}
    assert {name for name in report["dropped"] if "lora" not in name} == {
        name.replace(".base_layer", "") for name in predictor
    }
    names = {tensor["name"] for tensor in report["tensors"]}
    if form == "full":
        assert names == set(model.state_dict())
        first = sorted((tmp_path / "out").glob("*.safetensors"))[0]
        with safe_open(first, framework="pt") as file:
            assert {name.split(".")[1] for name in file.keys()} == {"vision_tower", "multi_modal_projector"}
    else:
        assert names == {name for name in model.state_dict() if "language_model" not in name and "lm_head" not in name}
        assert model.config.language_model_name_or_path == f"{folder}/language_model"


def test_report_has_every_tensor_as_it_was_written(release, tmp_path):
    report = run(release, tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / REPORT_NAME).read_text()) == report
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert [tensor["name"] for tensor in report["tensors"]] == sorted(file.keys())
        for tensor in report["tensors"]:
            stored = file.get_tensor(tensor["name"])
            assert tensor["shape"] == list(stored.shape) and tensor["dtype"] == "bfloat16"
            assert tensor["sha256"] == hashlib.sha256(stored.view(torch.uint8).numpy().tobytes()).hexdigest()
    projection = release[0] / "exp6_projection" / "proj_lora_epoch5.pt"
    assert report["sources"]["projection"]["sha256"] == hashlib.sha256(projection.read_bytes()).hexdigest()


def test_experiment_5_keeps_the_tower_as_it_is(release, tmp_path, capsys):
    folder, _, adapted, _ = release
    arguments = [str(folder), "--output", str(tmp_path / "out"), "--experiment", "5", "--dtype", "float32"]
    main([*arguments, "--tower", f"{folder}/tower", "--language-model", f"{folder}/language_model"])
    assert "every one accounted for" in capsys.readouterr().out
    model = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "out")
    base = VJEPA2Model.from_pretrained(folder / "tower")
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name]), name


# What is not as it should be


def change_projector(path, change):
    state_dict = torch.load(path, weights_only=True)
    change(state_dict)
    torch.save(state_dict, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("proj.4.bias"), r"missing: proj.4.bias; unexpected: none"),
        (lambda state: state.update(extra=torch.zeros(1)), r"missing: none; unexpected: extra"),
        (lambda state: state.update({"proj.2.weight": torch.zeros(3, 3)}), r"proj.2.weight \(3, 3\) must be \(6, 6\)"),
    ],
)
def test_projection_files_of_another_format(change, message, tmp_path):
    torch.save(ReleaseProjector(4, 6, 5).state_dict(), tmp_path / "projection.pt")
    assert read_projector(tmp_path / "projection.pt")["linear_2.weight"].shape == (6, 6)
    change_projector(tmp_path / "projection.pt", change)
    with pytest.raises(ValueError, match=message):
        read_projector(tmp_path / "projection.pt")


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/vjepa_qwen_test_payload_ran"),))


def test_code_in_a_pickle_does_not_run(tmp_path):
    torch.save({"proj.0.weight": Payload()}, tmp_path / "projection.pt")
    with pytest.raises(ValueError, match="must be a dictionary of tensors, read without running code"):
        read_projector(tmp_path / "projection.pt")
    assert not Path("/tmp/vjepa_qwen_test_payload_ran").exists()


def test_projector_of_another_width(release, tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    write_release(folder, VJEPA2Config(**VISION), (24, 40, 48))
    with pytest.raises(ValueError, match=r"projection \(24 to 48\) must lead from .*: 24\) to .*: 32\)"):
        run((folder,), tmp_path / "out", language_model=str(release[0] / "language_model"))
    assert not (tmp_path / "out").exists()


def test_adapter_without_a_tensor_of_the_encoder(release, tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    write_release(folder, VJEPA2Config(**VISION), (24, 40, 32), target_modules=r"predictor.*\.query")
    with pytest.raises(ValueError, match="none of its .* matches"):
        run((folder,), tmp_path / "out", language_model=str(release[0] / "language_model"))


def test_adapter_of_a_smaller_tower_is_incomplete(release, tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    write_release(folder, VJEPA2Config(**{**VISION, "num_hidden_layers": 1}), (24, 40, 32))
    with pytest.raises(ValueError, match=r"adapter .*: every tensor must have its place .* missing [1-9]"):
        run(
            (folder,),
            tmp_path / "out",
            tower=str(release[0] / "tower"),
            language_model=str(release[0] / "language_model"),
        )


def test_output_must_be_empty(release, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be an empty folder"):
        run(release, tmp_path)


def test_language_model_with_a_missing_tensor(release, tmp_path):
    language_model = AutoModelForCausalLM.from_pretrained(release[0] / "language_model")
    state_dict = language_model.state_dict()
    state_dict.pop("model.layers.1.mlp.up_proj.weight")
    language_model.save_pretrained(tmp_path / "broken", state_dict=state_dict)
    AutoTokenizer.from_pretrained(release[0] / "language_model").save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"language model: .* missing 1: model.language_model.layers.1.mlp.up_proj"):
        run(release, tmp_path / "out", form="full", language_model=str(tmp_path / "broken"))
    assert not (tmp_path / "out").exists()


def test_command(release, tmp_path):
    folder = release[0]
    arguments = ["convert", str(folder), "--output", str(tmp_path / "out"), "--tower", f"{folder}/tower"]
    result = CliRunner().invoke(app, [*arguments, "--language-model", f"{folder}/language_model"])
    assert result.exit_code == 0, result.output
    assert "dropped knowingly" in result.output
    result = CliRunner().invoke(app, [*arguments, "--language-model", f"{folder}/language_model"])
    assert result.exit_code == 1 and "must be an empty folder" in result.stderr
    assert CliRunner().invoke(app, ["convert", "--help"]).exit_code == 0


@pytest.mark.slow
def test_files_of_the_real_sizes(tmp_path, tokenizer):
    """The release's exact format: 167,797,760 projector parameters, LoRA r=16 alpha=32 on a whole ViT-L."""
    projector, adapted = write_release(tmp_path, VJEPA2Config(), (1024, 10240, 5120), rank=16, alpha=32)
    assert sum(parameter.numel() for parameter in projector.parameters()) == 167_797_760
    # The language model is only named: its width is that of Qwen3.5-27B, its layers are one.
    text_config = Qwen3_5TextConfig(**{**TEXT, "hidden_size": 5120, "num_hidden_layers": 1}, vocab_size=len(tokenizer))
    text_config.save_pretrained(tmp_path / "language_model")
    tokenizer.save_pretrained(tmp_path / "language_model")
    report = run((tmp_path,), tmp_path / "out")
    sizes = {"model.vision_tower": 0, "model.multi_modal_projector": 0}
    for tensor in report["tensors"]:
        sizes[".".join(tensor["name"].split(".")[:2])] += tensor["bytes"] // 4
    assert sizes == {"model.vision_tower": 303_885_312, "model.multi_modal_projector": 167_797_760}
    frames = torch.randn(1, 4, 3, 256, 256)
    expected = tower_output(adapted, frames)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        for index, layer in ((0, "linear_1"), (2, "linear_2"), (4, "linear_3")):
            for kind in ("weight", "bias"):
                converted = file.get_tensor(f"model.multi_modal_projector.{layer}.{kind}")
                assert torch.equal(converted, getattr(projector.proj[index], kind))
        prefix = "model.vision_tower."
        state_dict = {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys() if prefix in name}
    tower = VJepaQwenVisionTower(VJEPA2Config()).eval()
    tower.load_state_dict(state_dict)
    with torch.no_grad():
        output = tower(frames).last_hidden_state
    difference = float((output - expected).abs().max() / expected.abs().max())
    print(f"largest difference of the tower outputs / largest output: {difference:.2e}")
    assert difference < 1e-5
