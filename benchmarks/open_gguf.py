"""Time to open a GGUF file with a vocabulary of 32,000 tokens and 58,000 merges, beside gguf.GGUFReader.

python -m benchmarks.open_gguf
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from quantscope.sources.gguf import open_gguf

N_TOKENS, N_MERGES = 32_000, 58_000
ROUNDS = 5


def write_vocabulary(path: Path) -> Path:
    """A file with the tokens, scores, token types and merges of a published model's size, and one small tensor."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(1, 12, N_TOKENS)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores(rng.standard_normal(N_TOKENS).tolist())
    writer.add_token_types([1] * N_TOKENS)
    writer.add_token_merges([f"{a} {b}" for a, b in rng.choice(words, (N_MERGES, 2))])
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def best(action: Callable[[], Any]) -> float:
    """The shortest of ROUNDS runs [s]."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_vocabulary(Path(folder) / "vocab.gguf")
        ours = best(lambda: open_gguf(path))
        decoded = best(lambda: [list(v) for k, v in open_gguf(path).metadata.items() if k.startswith("tokenizer.ggml.")])
        theirs = best(lambda: gguf.GGUFReader(path))
    print(f"{N_TOKENS:,} tokens, {N_MERGES:,} merges, best of {ROUNDS}")
    print(f"  quantscope, open                       {1e3 * ours:8.1f} ms")
    print(f"  quantscope, open and decode everything {1e3 * decoded:8.1f} ms")
    print(f"  gguf.GGUFReader                        {1e3 * theirs:8.1f} ms   {theirs / ours:.0f} times as long")


if __name__ == "__main__":
    main()
