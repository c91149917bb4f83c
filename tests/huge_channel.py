"""A model in which rounded activations change the greedy token though the file is right: one channel 300 times the rest.

    ffn_norm.weight[CHANNEL] of layer LAYER = 300, and the columns of ffn_gate and ffn_up that read this channel = 0

So the channel adds nothing to any product, but in blocks of 256 activations (Q8_K) it sets the scale, and the rest of its block rounds to
nothing.  It is what llama.cpp's issue 4755 came down to, with the place known.
"""

from __future__ import annotations

from pathlib import Path

from tests.models import make_gguf, random_tensors

LAYER, CHANNEL, TIMES = 1, 100, 300.0
TAP = f"ffn_norm-{LAYER}"
N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_VOCAB = 2, 256, 4, 2, 256, 288
# (seed, ids): both gaps between the two tokens are far from a tie
CASES = ((0, (1, 7, 14, 47)), (1, (1, 12, 19, 52)), (3, (1, 7, 14, 47)), (3, (1, 23, 30, 63)))


def make_huge_channel(path: Path, seed: int, times: float = TIMES) -> Path:
    """Write the model in float32 and return its path; it is meant to be quantized.  times: 1 plants nothing but the zero columns."""
    head_dim = N_EMBD // N_HEAD
    tensors = random_tensors("llama", N_LAYER, N_EMBD, N_EMBD, N_HEAD_KV * head_dim, head_dim, N_FF, N_VOCAB, False, (), (), seed)
    edit = {name: tensors[name].copy() for name in (f"blk.{LAYER}.ffn_{x}.weight" for x in ("norm", "gate", "up"))}
    edit[f"blk.{LAYER}.ffn_norm.weight"][CHANNEL] = times
    for x in ("gate", "up"):
        edit[f"blk.{LAYER}.ffn_{x}.weight"][:, CHANNEL] = 0
    return make_gguf(
        path, n_layer=N_LAYER, n_embd=N_EMBD, n_head=N_HEAD, n_head_kv=N_HEAD_KV, n_ff=N_FF, n_vocab=N_VOCAB, seed=seed, edit=edit
    )
