"""What a quantized key/value cache costs here and in llama.cpp: mean KL divergence from the same model without one, and what the two share.

python -m benchmarks.kv_cache        the bundled model in F32 on English text, and random models with heads of 64 and 128 channels and with
                                     latent attention

A llama.cpp column of the same size as ours says that the same thing is modelled; *not shared* is NMSE(ours, llama.cpp) over the cache's
own NMSE: what llama.cpp's arithmetic adds, above all its rounding of queries where keys are quantized.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from quantscope.sources.resolve import open_source
from quantscope.tokenizers import from_source
from quantscope.weights import Weights
from tests.arch_models import make_arch
from tests.models import make_gguf
from tests.oracle.kv_cache import Rows, kl, nmse, ours, theirs
from tests.oracle.quantized_files import demo_file

TEXT = Path(__file__).resolve().parents[1] / "quantscope" / "data" / "demo.txt"
CACHES = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "q8_0/q4_0", "q4_0/q8_0", "f32/q8_0", "f32/q4_0")
SIZES = {"n_ff": 512, "n_layer": 3, "n_vocab": 512, "n_head": 4, "n_head_kv": 2, "n_embd": 256, "n_ctx": 256}


def measure(title: str, path: Path, rows: Rows, caches: Sequence[str] = CACHES) -> None:
    weights = Weights(open_source(path), keep=True)
    exact, plain = ours(weights, rows), theirs(path, rows, "f32")
    print(f"\n{title}; without a cache the two are {nmse(exact, plain):.1e} apart (NMSE)\n")
    print("| cache | KL here | KL in llama.cpp | ratio | not shared |\n|---|---|---|---|---|")
    for kv in caches:
        cached, real = ours(weights, rows, kv), theirs(path, rows, kv)
        a, b = kl(exact, cached), kl(plain, real)
        print(f"| {kv} | {a:.3g} | {b:.3g} | {b / a:.2f} | {nmse(cached, real) / nmse(exact, cached):.0%} |", flush=True)
    weights.source.close()


def main() -> None:
    demo = demo_file("F32")
    source = open_source(demo)
    ids = from_source(source).encode(TEXT.read_text("utf-8"))[:1024]
    source.close()
    measure("Bundled model, heads of 32, 4 × 256 tokens of English", demo, [ids[i : i + 256] for i in range(0, 1024, 256)])
    with tempfile.TemporaryDirectory() as folder:
        for head_dim in (64, 128):
            path = make_gguf(Path(folder) / f"{head_dim}.gguf", head_dim=head_dim, **SIZES)
            rows = np.random.default_rng(0).integers(3, SIZES["n_vocab"], (4, 128)).tolist()
            measure(f"Random weights, heads of {head_dim}, 4 × 128 random tokens", path, rows)
        path = make_arch(Path(folder) / "latent.gguf", "deepseek2-wide")
        rows = np.random.default_rng(0).integers(3, 288, (4, 128)).tolist()
        one_type = [kv for kv in CACHES if "/" not in kv]
        measure("Random weights, latent vectors of 256 + 64 channels, 4 × 128 random tokens", path, rows, one_type)


if __name__ == "__main__":
    main()
