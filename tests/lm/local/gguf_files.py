"""A tiny Llama as a GGUF file, as llama.cpp's converter writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(file: Path, folder: Path, *, quantization: str = "F32", **settings: Any) -> Path:
    """Write a tiny Llama of `write_tiny_model` as a GGUF file.

    Args:
        file: where to.
        folder: the model's folder.
        quantization: of the matrices: a type of the package gguf, `F32`, `F16`, `Q8_0`, `Q4_0`, ...
        **settings: more of the header, with `__` for dots: numbers and strings.

    Returns:
        `file`.
    """
    import json

    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    template = folder / "chat_template.jinja"
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]

    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
    for name, value in settings.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        (writer.add_float32 if isinstance(value, float) else add)(name.replace("__", "."), value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        short = name.removeprefix("model.").removesuffix(".weight")
        layer, _, inner = short.removeprefix("layers.").partition(".")
        place = f"blk.{layer}.{_GGUF_NAMES[inner]}" if inner in _GGUF_NAMES else _GGUF_NAMES[short]
        values = tensor.float().numpy()
        if place.endswith(("attn_q", "attn_k")):  # llama.cpp rotates neighbours, transformers halves
            n = heads if place.endswith("attn_q") else kv_heads
            values = values.reshape(n, 2, len(values) // n // 2, -1).swapaxes(1, 2).reshape(values.shape)
        kind = gguf.GGMLQuantizationType[quantization if values.ndim > 1 else "F32"]
        writer.add_tensor(f"{place}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
