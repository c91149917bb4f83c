"""Hugging Face tensor names ↔ GGUF tensor names.  The only place that knows HF names.

Source: the checkpoints' own module paths (Transformers' modeling_llama.py, modeling_qwen2.py, modeling_qwen3.py).
"""

from __future__ import annotations

import re

# GGUF stem → HF stem; ".weight" and ".bias" are the same on both sides.
TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HF_TOP = {hf: gguf for gguf, hf in TOP.items()}
_HF_LAYER = {hf: gguf for gguf, hf in LAYER.items()}


def to_gguf(hf_name: str) -> str | None:
    """ "model.layers.3.self_attn.q_proj.weight" → "blk.3.attn_q.weight"; None for a name that has no counterpart."""
    stem, _, kind = hf_name.rpartition(".")
    if stem in _HF_TOP:
        return f"{_HF_TOP[stem]}.{kind}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if found is None or found[2] not in _HF_LAYER:
        return None
    return f"blk.{found[1]}.{_HF_LAYER[found[2]]}.{kind}"


def to_hf(gguf_name: str) -> str | None:
    """ "blk.3.attn_q.weight" → "model.layers.3.self_attn.q_proj.weight"; None for a name that has no counterpart."""
    stem, _, kind = gguf_name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    found = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if found is None or found[2] not in LAYER:
        return None
    return f"model.layers.{found[1]}.{LAYER[found[2]]}.{kind}"
