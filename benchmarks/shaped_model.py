"""A GGUF file with the shape of a published model and random weights, and a text for it: what the benchmarks of whole jobs run on.

    python -m benchmarks.shaped_model tinyllama FILE.gguf [--dtype F32] [--text FILE --tokens 8192]

Matrices are N(0, 0.02²), those that write to the residual stream (attn_output, ffn_down) divided by √(2·n_layer), as GPT-2 is initialised,
so that the stream neither vanishes nor explodes; norms are 1.  The file is written tensor by tensor at the speed of the disk: each matrix
is one block of random numbers, repeated from a place of its own.  The block's length is a prime, so that no two rows are equal.
"""

from __future__ import annotations

import argparse
import itertools
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

DEMO_TEXT = Path(__file__).resolve().parent.parent / "quantscope" / "data" / "demo.txt"
BLOCK = (1 << 24) - 3  # the largest prime below 2²⁴: 32 MB of float16
SIGMA = 0.02
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # llama.cpp's token types
DTYPES = {"F16": np.float16, "F32": np.float32}
Weights = NDArray[np.floating]


@dataclass(frozen=True)
class Shape:
    """A model of architecture ``llama`` with an output matrix of its own."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int = 32000
    n_ctx: int = 2048

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) in file order, row-major: matrices [out,in], norms [n_embd]."""
        E, F, Q, K = self.n_embd, self.n_ff, self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        yield "token_embd.weight", (self.n_vocab, E)
        for i in range(self.n_layer):
            for name, shape in (
                ("attn_norm", (E,)),
                ("attn_q", (Q, E)),
                ("attn_k", (K, E)),
                ("attn_v", (K, E)),
                ("attn_output", (E, Q)),
                ("ffn_norm", (E,)),
                ("ffn_gate", (F, E)),
                ("ffn_up", (F, E)),
                ("ffn_down", (E, F)),
            ):
                yield f"blk.{i}.{name}.weight", shape
        yield "output_norm.weight", (E,)
        yield "output.weight", (self.n_vocab, E)


SHAPES = {
    "tiny": Shape(n_layer=2, n_embd=256, n_head=4, n_head_kv=2, n_ff=512, n_vocab=12000),  # seconds: to try a benchmark
    "tinyllama-4l": Shape(n_layer=4, n_embd=2048, n_head=32, n_head_kv=4, n_ff=5632),
    "tinyllama": Shape(n_layer=22, n_embd=2048, n_head=32, n_head_kv=4, n_ff=5632),  # TinyLlama-1.1B
    "7b": Shape(n_layer=32, n_embd=4096, n_head=32, n_head_kv=32, n_ff=11008, n_ctx=4096),  # Llama-2-7B
}


def write_model(path: Path, shape: Shape, dtype: str = "F16") -> bool:
    """Write the file unless it is there with the right size; returns whether it was written.  An interrupted run leaves none behind."""
    part = path.with_name(path.name + ".part")
    try:
        writer = _header(part, shape, dtype)
        if path.is_file() and path.stat().st_size == _file_bytes(part.stat().st_size, shape, dtype):
            writer.close()
            return False
        for _, values in random_tensors(shape, dtype):
            writer.write_tensor_data(values)
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return True


def random_tensors(shape: Shape, dtype: str, seed: int = 0) -> Iterator[tuple[str, Weights]]:
    """(name, values) in file order, one tensor in memory at a time."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(BLOCK, dtype=np.float32) * np.float32(SIGMA)
    plain = normal.astype(DTYPES[dtype])
    residual = (normal / np.float32(np.sqrt(2 * shape.n_layer))).astype(DTYPES[dtype])
    for name, dims in shape.tensors():
        if len(dims) == 1:
            yield name, np.ones(dims, np.float32)
            continue
        block = residual if name.endswith(("attn_output.weight", "ffn_down.weight")) else plain
        yield name, np.resize(np.roll(block, int(rng.integers(BLOCK))), dims)


def _header(path: Path, shape: Shape, dtype: str) -> gguf.GGUFWriter:
    """A writer that has written everything before the first tensor to ``path``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if dtype == "F16" else gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_vocabulary(writer, shape.n_vocab)
    for name, dims in shape.tensors():
        kind = np.dtype(DTYPES[dtype] if len(dims) > 1 else np.float32)
        writer.add_tensor_info(name, dims, kind, int(np.prod(dims)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return writer


def _file_bytes(header_bytes: int, shape: Shape, dtype: str) -> int:
    sizes = (int(np.prod(dims)) * (np.dtype(DTYPES[dtype]).itemsize if len(dims) > 1 else 4) for _, dims in shape.tensors())
    return sum(gguf.GGUFWriter.ggml_pad(size, gguf.GGUF_DEFAULT_ALIGNMENT) for size in (header_bytes, *sizes))


def _add_vocabulary(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """llama.cpp's `llama` tokenizer: <unk> <s> </s>, the 256 bytes, then pieces with falling scores."""
    n_special = 3 + 256
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces(n_vocab - n_special)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_special + [-float(i) for i in range(n_vocab - n_special)])
    writer.add_token_types([UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (n_vocab - n_special)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def pieces(n: int) -> list[str]:
    """n different pieces: characters, then every beginning of the demo text's words, the most frequent first, then syllables.

    A word merges from its front, as no other piece of it has a higher score than its beginnings: most words of the text are one token.
    """
    text = DEMO_TEXT.read_text("utf-8")
    characters = ["▁", *sorted({*string.printable.strip(), *text} - set(string.whitespace))]
    words = Counter(text.split())
    beginnings: Counter[str] = Counter()
    for word, count in words.items():
        beginnings.update({f"▁{word[:k]}": count for k in range(1, len(word) + 1)})
    syllables = ("".join(s) for length in (2, 3) for s in itertools.product(string.ascii_lowercase, repeat=length))
    found = dict.fromkeys([*characters, *(piece for piece, _ in beginnings.most_common())])
    found |= dict.fromkeys(itertools.islice((p for s in syllables for p in (s, f"▁{s}")), n))
    if len(found) < n:
        raise ValueError(f"a vocabulary of {n} pieces was asked for, and there are {len(found)}")
    return list(found)[:n]


def make_text(n_tokens: int) -> str:
    """At least ``n_tokens`` tokens: so many words of the demo text, each a token or more; its lines shuffled in later rounds."""
    lines = [line.split() for line in DEMO_TEXT.read_text("utf-8").splitlines() if line.strip()]
    rng = np.random.default_rng(0)
    out: list[str] = []
    n = 0
    while n < n_tokens:
        for words in lines:
            out.append(" ".join(words[: n_tokens - n]))
            n += len(words)
            if n >= n_tokens:
                break
        rng.shuffle(lines)
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("file", type=Path, help="the GGUF file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="F16", help="of the matrices; default %(default)s")
    parser.add_argument("--text", type=Path, help="write a text there, too")
    parser.add_argument("--tokens", type=int, default=8192, help="least number of tokens of the text; default %(default)s")
    options = parser.parse_args()
    written = write_model(options.file, SHAPES[options.shape], options.dtype)
    print(f"{options.file}: {'written' if written else 'was there'}, {options.file.stat().st_size:,} bytes")
    if options.text:
        options.text.write_text(make_text(options.tokens), "utf-8")


if __name__ == "__main__":
    main()
