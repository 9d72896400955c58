"""The memory budget: each line against the real thing on tiny models, and the promise of ~22 GB on the real one."""

import json

import pytest
import torch
from conftest import make_model
from test_linked_checkpoint import OTHER_TEXT_CONFIGS, SMALL
from typer.testing import CliRunner

from vjepa_qwen import VJepaQwenConfig
from vjepa_qwen.cli import app
from vjepa_qwen.memory_budget import GGUF_BITS, _run_language_model, estimate_memory
from vjepa_qwen.training.memory import estimate_training_memory
from vjepa_qwen.training.train import VJepaQwenArguments, prepare_model


def by_name(lines):
    return {line.name: line.num_bytes for line in lines}


def total(lines):
    return sum(line.num_bytes for line in lines)


def test_real_model_with_a_4_bit_gguf_file_fits_into_22_gigabytes():
    lines = estimate_memory(VJepaQwenConfig(), quantization="Q4_K_M", context=8192)
    assert total(lines) < 22e9
    budget = by_name(lines)
    assert budget["vision tower"] == 303_885_312 * 2 and budget["projector"] == 167_797_760 * 2
    text = budget["embeddings"] + budget["language model's layers"] + budget["lm_head"]
    assert text == pytest.approx(16.5e9, rel=0.01)  # the file on the Hub
    assert budget["KV cache"] == 16 * 2 * 4 * 256 * 2 * 8192
    assert budget["DeltaNet state"] == 48 * (48 * 128 * 128 * 4 + 10240 * 4 * 2)
    assert all(line.how for line in lines)


def test_bits_of_gguf_files_are_in_order():
    assert list(GGUF_BITS.values()) == sorted(GGUF_BITS.values())


@pytest.mark.parametrize("name", ["qwen", *OTHER_TEXT_CONFIGS])
def test_weights_and_cache_are_those_of_the_model(name, tokenizer):
    model = make_model(tokenizer, {**SMALL, **OTHER_TEXT_CONFIGS[name]}) if name != "qwen" else make_model(tokenizer)
    context = 24
    lines = estimate_memory(model.config, context=context, dtype=torch.float32)
    budget = by_name(lines)
    weights = ("vision tower", "projector", "embeddings", "language model's layers", "lm_head")
    assert sum(budget[weight] for weight in weights) == model.num_parameters() * 4
    output = model(input_ids=torch.ones(1, context, dtype=torch.long), use_cache=True)
    cached = {id(tensor): tensor.nbytes for layer in output.past_key_values.layers for tensor in find_tensors(layer)}
    assert budget["KV cache"] + budget.get("DeltaNet state", 0) == sum(cached.values())


def find_tensors(layer):
    values = list(vars(layer).values())
    while values:
        value = values.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value


def test_activations_grow_with_the_prompt_and_not_with_the_depth(tokenizer):
    config = make_model(tokenizer).config.text_config
    short, long = (_run_language_model(config, length, 1, torch.float32).num_bytes for length in (256, 1024))
    assert 3 * short < long < 5 * short
    assert config.num_hidden_layers == 4  # the caller's own


@pytest.mark.parametrize("quantization", ["nf4", "int8", "Q8_0", None])
def test_quantisation_leaves_tower_and_projector_alone(quantization, tokenizer):
    budget = by_name(estimate_memory(make_model(tokenizer).config, quantization=quantization, context=16))
    plain = by_name(estimate_memory(make_model(tokenizer).config, context=16))
    assert budget["vision tower"] == plain["vision tower"] and budget["projector"] == plain["projector"]


def test_gguf_file_counts_as_it_is_and_others_are_an_error(tokenizer, tmp_path):
    config = make_model(tokenizer).config
    (tmp_path / "model.gguf").write_bytes(b"0" * 1234)
    assert by_name(estimate_memory(config, quantization=str(tmp_path / "model.gguf")))["language model"] == 1234
    with pytest.raises(ValueError, match=r"quantization \(Q9\) must be the path of a GGUF file or one of Q2_K"):
        estimate_memory(config, quantization="Q9")


def test_command(tiny_checkpoint):
    result = CliRunner().invoke(app, ["memory", "--model", tiny_checkpoint, "--context", "64"])
    assert result.exit_code == 0, result.output
    assert "KV cache" in result.output and "total" in result.output
    result = CliRunner().invoke(app, ["memory", "--model", tiny_checkpoint, "--context", "64", "--json"])
    document = json.loads(result.stdout)
    assert document["total_bytes"] == pytest.approx(sum(line["num_bytes"] for line in document["lines"]))
    assert CliRunner().invoke(app, ["memory", "--help"]).exit_code == 0
    assert CliRunner().invoke(app, ["memory", "--quantization", "Q9"]).exit_code == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["projector", "lora"])
def test_both_stages_of_training_the_real_model_fit_an_80_gigabyte_gpu(stage):
    lines = estimate_training_memory(VJepaQwenConfig(), stage=stage, batch_size=4)
    assert total(lines) < 80e9
    budget = by_name(lines)
    num_adapter = 24 * 4 * 2 * 16 * 1024 if stage == "lora" else 0  # layers, matrices, A and B, rank, hidden
    assert budget["gradients"] == (167_797_760 + num_adapter) * 4
    assert budget["optimizer"] == 2 * budget["gradients"]
    assert budget["language model"] + budget["lm_head"] == 26_895_998_464 * 2
    assert all(line.how for line in lines)


@pytest.mark.parametrize("stage", ["projector", "lora"])
def test_training_memory_is_that_of_a_real_step(stage, tokenizer):
    model = make_model(tokenizer)
    budget = by_name(estimate_training_memory(model.config, stage=stage, context=64, dtype=torch.float32))
    prepare_model(model, VJepaQwenArguments(dataset="", stage=stage))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(num_bytes for name, num_bytes in budget.items() if not name.startswith(("g", "o", "a", "d")))
    assert weights == sum(parameter.nbytes for parameter in model.parameters())
    optimizer = torch.optim.AdamW(trained)
    sum(parameter.sum() for parameter in trained).backward()
    optimizer.step()
    moments = [moment for state in optimizer.state.values() for moment in state.values() if moment.dim()]
    assert budget["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
    assert budget["optimizer"] == sum(moment.nbytes for moment in moments)


def test_training_keeps_one_tensor_of_each_layer(tokenizer):
    def activations(num_layers, batch_size=2, context=256):
        config = make_model(tokenizer, {"num_hidden_layers": num_layers, "layer_types": None}).config
        lines = estimate_training_memory(
            config, stage="projector", context=context, batch_size=batch_size, dtype=torch.float32
        )
        return by_name(lines)["activations"], batch_size * context * config.text_config.hidden_size * 4

    (shallow, layer), (deep, _) = activations(4), activations(12)
    assert deep - shallow == 8 * layer
    assert activations(4, batch_size=4)[0] == pytest.approx(2 * shallow, rel=0.05)


def test_training_memory_command(tiny_checkpoint):
    runner = CliRunner()
    arguments = ["memory", "--model", tiny_checkpoint, "--stage", "lora", "--context", "64"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "optimizer" in result.output and "vision tower, trained" in result.output
    refused = runner.invoke(app, [*arguments, "--quantization", "nf4"])
    assert refused.exit_code == 1 and "quantization (nf4) must not be given with --stage" in refused.output
    refused = runner.invoke(app, [*arguments[:-1], "15"])
    assert refused.exit_code == 1 and "context (15) must be more than the 15 events" in refused.output
