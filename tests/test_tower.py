"""The vision tower against transformers' own V-JEPA 2: same numbers, exact angles, adapters, compilation."""

import copy

import pytest
import torch
from conftest import VISION_CONFIG, make_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import VJEPA2Config, VJEPA2Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2RopeAttention

from vjepa_qwen.modeling_vjepa_qwen import VJepaQwenVisionTower
from vjepa_qwen.tower_layers import TOWER_ATTENTION, PatchConvolution, RotaryAttention, tower_attention_forward

CONFIG = VJEPA2Config(
    **{**VISION_CONFIG, "crop_size": 48, "frames_per_clip": 64, "hidden_size": 64}, pred_num_hidden_layers=1
)


def make_tower(attention: str | None = None) -> VJepaQwenVisionTower:
    config = copy.deepcopy(CONFIG)
    config._attn_implementation = attention
    torch.manual_seed(0)
    return VJepaQwenVisionTower(config).eval()


@pytest.fixture
def reference():
    """transformers' model with the tower's weights."""
    model = VJEPA2Model(copy.deepcopy(CONFIG)).eval()
    missing, unexpected = model.load_state_dict(make_tower().state_dict(), strict=False)
    assert not unexpected and all(name.startswith("predictor.") for name in missing), "names of parameters differ"
    return model


@pytest.fixture
def frames():
    torch.manual_seed(1)
    return torch.randn(2, 64, 3, 48, 48)


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_equals_transformers_in_float32(reference, frames, attention):
    tower = make_tower(attention)
    assert tower.config._attn_implementation == (attention or TOWER_ATTENTION)
    with torch.no_grad():
        expected = reference(frames, skip_predictor=True).last_hidden_state
        actual = tower(frames)
    torch.testing.assert_close(actual.last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    steps = expected.unflatten(1, (32, -1)).mean(dim=2)
    torch.testing.assert_close(actual.pooler_output, steps, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_close_to_float32_whatever_the_attention(frames):
    with torch.no_grad():
        expected = make_tower()(frames).pooler_output
        for attention in (None, "sdpa", "eager"):
            actual = make_tower(attention).bfloat16()(frames).pooler_output
            assert actual.dtype == torch.float32
            assert (actual - expected).norm() < 0.02 * expected.norm(), attention


def test_rotation_in_bfloat16_uses_the_angles_of_float32():
    """transformers computes the angles in the dtype of the activations: here they would be off."""
    attention = RotaryAttention(CONFIG, CONFIG.hidden_size, CONFIG.num_attention_heads)
    queries = torch.randn(1, CONFIG.num_attention_heads, 32 * 9, 32).bfloat16()
    positions = attention.get_position_ids(queries[0, 0].unsqueeze(0))
    transformers_own = VJEPA2RopeAttention.apply_rotary_embeddings
    exact = transformers_own(attention, queries.float(), positions)
    half_a_unit = 2**-8  # of the last place, relative: rounded once, at the end
    torch.testing.assert_close(
        attention.apply_rotary_embeddings(queries, positions).float(), exact, atol=1e-5, rtol=half_a_unit
    )
    assert not torch.allclose(transformers_own(attention, queries, positions).float(), exact, atol=0.02, rtol=0.01)
    torch.testing.assert_close(attention.apply_rotary_embeddings(queries.float(), positions), exact)


@pytest.mark.parametrize("num_tokens", [1, 256, 300, 515])
def test_attention_in_blocks_is_attention(num_tokens):
    torch.manual_seed(2)
    query, key, value = (torch.randn(2, num_tokens, 3, 16).bfloat16().transpose(1, 2) for _ in range(3))
    actual, _ = tower_attention_forward(None, query, key, value, None, scaling=0.25)
    expected, _ = sdpa_attention_forward(
        nn.Module(), query.float(), key.float(), value.float(), None, scaling=0.25, is_causal=False
    )
    assert actual.shape == (2, num_tokens, 3, 16) and actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.02, rtol=0.02)


def test_gradients_in_bfloat16_are_those_of_sdpa(frames):
    gradients = []
    for attention in (None, "sdpa"):
        tower = make_tower(attention).bfloat16()
        tower(frames[:1]).pooler_output.square().sum().backward()
        gradients.append(tower.encoder.layer[0].attention.query.weight.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("shape", [(8, 48, 48), (5, 50, 33)])
def test_patch_convolution_is_a_convolution(shape):
    layer = PatchConvolution(3, 24, kernel_size=(2, 16, 16), stride=(2, 16, 16))
    frames = torch.randn(2, 3, *shape)
    torch.testing.assert_close(layer(frames), nn.Conv3d.forward(layer, frames), atol=1e-4, rtol=1e-4)


def test_an_adapter_on_every_layer_named_proj_counts(frames):
    """`proj` is the output of the attention and the patch embedding: none of the two may be passed by."""
    tower = make_tower()
    with torch.no_grad():
        plain = tower(frames[:1]).pooler_output
        adapted = get_peft_model(tower, LoraConfig(r=2, target_modules=["proj"], init_lora_weights=True))
        torch.testing.assert_close(adapted(frames[:1]).pooler_output, plain)
        for kind in ("patch_embeddings", "attention"):
            names = [name for name, _ in adapted.named_parameters() if kind in name and "lora_B" in name]
            assert names, kind
            adapted.get_parameter(names[0]).normal_()
            changed = adapted(frames[:1]).pooler_output
            assert not torch.allclose(changed, plain, atol=1e-2), kind
            adapted.get_parameter(names[0]).zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(frames, dtype):
    """Whatever made the host wait for the device would break the graph."""
    tower = make_tower().to(dtype)
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected, actual = tower(frames).pooler_output, compiled(frames).pooler_output
    torch.testing.assert_close(actual, expected, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_the_attention_function_is_not_saved_and_follows_the_one_asked_for(tmp_path, tokenizer):
    model = make_model(tokenizer)
    assert model.model.vision_tower.config._attn_implementation == TOWER_ATTENTION
    model.save_pretrained(tmp_path)
    assert TOWER_ATTENTION not in (tmp_path / "config.json").read_text()
    model.set_attn_implementation("eager")
    assert model.model.vision_tower.config._attn_implementation == "eager"
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.model.vision_tower.config._attn_implementation == TOWER_ATTENTION
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="sdpa")
    assert loaded.model.vision_tower.config._attn_implementation == "sdpa"
