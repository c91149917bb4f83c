"""Small models for the tests, written on the spot: random weights of any supported architecture, a tiny vocabulary.

    path = make_gguf(tmp_path / "m.gguf", arch="qwen2", n_layer=2, seed=1)

and ``STORIES``, a real, trained Llama of 260,000 parameters (Andrej Karpathy's stories260K, MIT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

STORIES = Path(__file__).parent / "data" / "stories260K-f32.gguf"
STORIES_PROMPT = (1, 403, 407, 261, 378)  # "Once upon a time"
STORIES_TEXT = ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # llama.cpp's token types
QKV_BIASES = ("attn_q", "attn_k", "attn_v")
LINEARS = (*QKV_BIASES, "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def make_gguf(
    path: Path,
    *,
    arch: str = "llama",
    n_layer: int = 2,
    n_embd: int = 64,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int | None = None,
    n_ff: int = 96,
    n_vocab: int = 288,
    n_ctx: int = 128,
    tied: bool = False,
    biases: Sequence[str] = (),
    scales: Sequence[str] = (),
    rope_freqs: Sequence[float] | None = None,
    seed: int = 0,
    dtype: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    edit: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Write a model that llama.cpp loads and return its path.

    biases, scales: linear layers ("attn_q") that get one; qwen2 always has q/k/v biases.  dtype: of the matrices, any type the
    gguf package encodes.  metadata: further keys, or other values for those written ("llama.rope.freq_base").
    edit: tensor name → replacement, or None to leave it out; new names are added.
    """
    head_dim = head_dim or n_embd // n_head
    biases = tuple(biases) or (QKV_BIASES if arch == "qwen2" else ())
    tensors = random_tensors(
        arch, n_layer, n_embd, n_head * head_dim, n_head_kv * head_dim, head_dim, n_ff, n_vocab, tied, biases, scales, seed
    )
    if rope_freqs is not None:
        tensors["rope_freqs.weight"] = np.array(rope_freqs, np.float32)
    for name, value in (edit or {}).items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    header = {
        f"{arch}.context_length": n_ctx,
        f"{arch}.embedding_length": n_embd,
        f"{arch}.block_count": n_layer,
        f"{arch}.feed_forward_length": n_ff,
        f"{arch}.attention.head_count": n_head,
        f"{arch}.attention.head_count_kv": n_head_kv,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.dimension_count": head_dim,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    write_gguf(path, arch, header | dict(metadata or {}), tensors, dtype, n_vocab)
    return path


def random_tensors(
    arch: str,
    n_layer: int,
    n_embd: int,
    n_q: int,
    n_kv: int,
    head_dim: int,
    n_ff: int,
    n_vocab: int,
    tied: bool,
    biases: Sequence[str],
    scales: Sequence[str],
    seed: int,
) -> dict[str, np.ndarray]:
    """GGUF name → float32 array, row-major: matrices of variance 1/fan-in, so that activations stay near 1."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    shapes = {
        "attn_q": (n_q, n_embd),
        "attn_k": (n_kv, n_embd),
        "attn_v": (n_kv, n_embd),
        "attn_output": (n_embd, n_q),
        "ffn_gate": (n_ff, n_embd),
        "ffn_up": (n_ff, n_embd),
        "ffn_down": (n_embd, n_ff),
    }
    tensors = {"token_embd.weight": normal(n_vocab, n_embd), "output_norm.weight": 1 + normal(n_embd, scale=0.1)}
    if not tied:
        tensors["output.weight"] = normal(n_vocab, n_embd, scale=n_embd**-0.5)
    for i in range(n_layer):
        local = {"attn_norm.weight": 1 + normal(n_embd, scale=0.1), "ffn_norm.weight": 1 + normal(n_embd, scale=0.1)}
        for name, (rows, columns) in shapes.items():
            local[f"{name}.weight"] = normal(rows, columns, scale=columns**-0.5)
        local |= {f"{name}.bias": normal(shapes[name][0], scale=0.5) for name in biases}
        local |= {f"{name}.scale": 1 + normal(1, scale=0.3) for name in scales}
        if arch == "qwen3":
            local |= {f"attn_{x}_norm.weight": 1 + normal(head_dim, scale=0.3) for x in "qk"}
        tensors |= {f"blk.{i}.{name}": value for name, value in local.items()}
    return tensors


def write_gguf(path: Path, arch: str, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: str, n_vocab: int) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in header.items():
        add_key(writer, key, value)
    add_spm_vocabulary(writer, n_vocab)
    for name, value in tensors.items():
        kind = gguf.GGMLQuantizationType[dtype]
        if name.endswith(".weight") and value.ndim > 1 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_key(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """A metadata key in the type that llama.cpp reads: u32, f32, bool, string or an array."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: {value!r}")


def add_spm_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """llama.cpp's `llama` tokenizer: <unk> <s> </s>, the 256 bytes, then letters."""
    if n_vocab < 259:
        raise ValueError(f"n_vocab is {n_vocab}, expected at least 259 (3 control tokens and 256 bytes)")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    pieces += [chr(0x61 + i) for i in range(26)]
    pieces += [f"▁{i}" for i in range(max(n_vocab - len(pieces), 0))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * n_vocab]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces[:n_vocab])
    writer.add_token_scores([-float(i) for i in range(n_vocab)])
    writer.add_token_types(types[:n_vocab])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
