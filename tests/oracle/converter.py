"""llama.cpp's own converter, and the vocabulary that it refuses a folder without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import sentencepiece

from tests.oracle.source_tree import llama_cpp_source


def convert(folder: Path, gguf: Path) -> None:
    """``convert_hf_to_gguf.py --outtype f32``"""
    script = llama_cpp_source() / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(folder), "--outfile", str(gguf), "--outtype", "f32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def sentencepiece_model(folder: Path, n_vocab: int) -> bytes:
    """A trained tokenizer.model of ``n_vocab`` pieces; the folder is for the training."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklm"), rng.integers(2, 7))) for _ in range(3000)]
    (folder / "text").write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, len(words), 10)), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "m"),
        vocab_size=n_vocab,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    return (folder / "m.model").read_bytes()
