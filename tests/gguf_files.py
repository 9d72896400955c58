"""Writes GGUF files of architecture `qwen35`, with the `gguf` package, the way llama.cpp's converter does."""

import gguf
import numpy as np
import torch

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}


def write_qwen35(path, language_model, quantization: str = "F32", num_tokens: int | None = None):
    """
    A `Qwen3_5ForCausalLM` as a GGUF file.

    `quantization` is the name of a `gguf.GGMLQuantizationType`, for the matrices; norms and vectors stay F32.
    """
    config = language_model.config
    writer = gguf.GGUFWriter(path, "qwen35")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(int(config.head_dim * config.rope_parameters["partial_rotary_factor"]))
    writer.add_array("qwen35.rope.dimension_sections", [*config.rope_parameters["mrope_section"], 0])
    writer.add_uint32("qwen35.full_attention_interval", 4)
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    writer.add_token_list([f"token {number}" for number in range(config.vocab_size)])
    for name, tensor in language_model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add_tensor(writer, *_convert(name, tensor.float(), config), gguf.GGMLQuantizationType[quantization])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _add_tensor(writer, name: str, tensor: torch.Tensor, quantization):
    array = np.ascontiguousarray(tensor.numpy(), dtype=np.float32)
    keep = tensor.ndim < 2 or "conv1d" in name or quantization == gguf.GGMLQuantizationType.F32
    if not keep:
        array = gguf.quantize(array, quantization)
    writer.add_tensor(name, array, raw_dtype=gguf.GGMLQuantizationType.F32 if keep else quantization)


def _convert(name: str, tensor: torch.Tensor, config) -> tuple[str, torch.Tensor]:
    """llama.cpp's name of a tensor, and its values as llama.cpp stores them."""
    key_heads, value_heads = config.linear_num_key_heads, config.linear_num_value_heads
    value_dim, query_key_rows = config.linear_value_head_dim, 2 * config.linear_key_head_dim * key_heads

    def tile(rows, head_dim):  # value heads: by key head -> one of each key head after the other
        return rows.unflatten(0, (key_heads, value_heads // key_heads, head_dim)).transpose(0, 1).flatten(0, 2)

    name = name.removesuffix(".weight")
    if name in ("model.embed_tokens", "lm_head"):
        return ("token_embd" if name.startswith("model") else "output") + ".weight", tensor
    if name == "model.norm":
        return "output_norm.weight", tensor + 1
    _, _, layer, name = name.split(".", 3)
    if name == "linear_attn.A_log":
        return f"blk.{layer}.ssm_a", tile(-tensor.exp(), 1)
    if name == "linear_attn.dt_bias":
        return f"blk.{layer}.ssm_dt.bias", tile(tensor, 1)
    if name.endswith(("layernorm", "q_norm", "k_norm")):
        tensor = tensor + 1
    elif name.endswith(("in_proj_a", "in_proj_b")):
        tensor = tile(tensor, 1)
    elif name.endswith("in_proj_z"):
        tensor = tile(tensor, value_dim)
    elif name.endswith(("in_proj_qkv", "conv1d")):
        tensor = tensor.squeeze(1) if name.endswith("conv1d") else tensor
        tensor = torch.cat([tensor[:query_key_rows], tile(tensor[query_key_rows:], value_dim)])
    elif name.endswith("out_proj"):
        tensor = tile(tensor.T, value_dim).T
    return f"blk.{layer}.{LAYER_NAMES[name]}.weight", tensor
