"""Write the trained demo model as an F16 GGUF file, measure its held-out perplexity, and write its model card."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from tools.train_demo import DemoConfig, DemoModel

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # llama.cpp's token types


def token_type(sp: sentencepiece.SentencePieceProcessor, i: int) -> int:
    if sp.is_unknown(i):
        return UNKNOWN
    if sp.is_control(i):
        return CONTROL
    return BYTE if sp.is_byte(i) else NORMAL


def write_gguf(path: Path, model: DemoModel, vocabulary: bytes) -> None:
    """Matrices in F16, norms in F32, the vocabulary as llama.cpp's `llama` tokenizer; written aside, then renamed."""
    c = model.c
    sp = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    aside = path.with_suffix(".tmp")
    w = gguf.GGUFWriter(aside, "llama")
    w.add_name("quantscope demo")
    w.add_description("A small Llama trained on public-domain English books by tools/train_demo.py")
    w.add_license("MIT")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    write_shape(w, c)
    ids = range(sp.get_piece_size())
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list([sp.id_to_piece(i) for i in ids])
    w.add_token_scores([sp.get_score(i) for i in ids])
    w.add_token_types([token_type(sp, i) for i in ids])
    w.add_bos_token_id(sp.bos_id())
    w.add_eos_token_id(sp.eos_id())
    w.add_unk_token_id(sp.unk_id())
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(True)
    for name, p in model.state_dict().items():
        a = p.detach().float().numpy()
        w.add_tensor(name, a.astype(np.float16) if a.ndim == 2 else a)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    aside.replace(path)


def write_shape(w: gguf.GGUFWriter, c: DemoConfig) -> None:
    w.add_context_length(c.n_ctx)
    w.add_embedding_length(c.n_embd)
    w.add_block_count(c.n_layer)
    w.add_feed_forward_length(c.n_ff)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(c.n_head_kv)
    w.add_rope_dimension_count(c.head_dim)
    w.add_rope_freq_base(c.rope_theta)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_vocab_size(c.n_vocab)


@torch.no_grad()
def perplexity(model: DemoModel, windows: Tensor) -> tuple[float, int]:
    """exp(mean −ln p) over the second half of every window, llama-perplexity's convention; and the number of scored tokens."""
    n, nll, scored = windows.shape[1], 0.0, 0
    for batch in windows.split(16):
        logits = model(batch)[:, n // 2 : -1]
        nll += F.cross_entropy(logits.double().flatten(0, 1), batch[:, n // 2 + 1 :].flatten(), reduction="sum").item()
        scored += batch.shape[0] * (n - n // 2 - 1)
    return math.exp(nll / scored), scored


@torch.no_grad()
def continuation(model: DemoModel, vocabulary: bytes, prompt: str, n: int = 48) -> str:
    """Greedy continuation of a prompt, a sample for the model card."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    ids = [sp.bos_id(), *sp.encode(prompt)]
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return str(sp.decode(ids))


CARD = """# The demo model

`demo-f16.gguf` is a Llama of {millions:.2f} million parameters ({n_layer} layers, {n_embd} channels, {n_head} heads,
{n_head_kv} key/value heads, feed-forward {n_ff}, vocabulary {n_vocab}, context {n_ctx}), trained for quantscope's demo and tests.
Every row is a multiple of 256, so that K-quants apply without fallback. It knows 19th-century English prose and nothing else:
it is a measuring object, not an assistant.

| | |
|---|---|
| made by | `python -m tools.train_demo --text train.txt --eval eval.txt`, seed {seed} |
| trained on | public-domain English books (Dickens, Austen, Eliot, Melville, Tolstoy in translation), 8.7 MB |
| trained for | {steps} steps of {tokens_per_step} tokens: {tokens:.1f} million tokens, {epochs:.1f} epochs |
| training loss | {loss:.3f} nats per token (mean of the last 100 steps) |
| held-out text | Conan Doyle, *The Adventures of Sherlock Holmes* (public domain), never trained on |
| held-out perplexity | **{ppl:.2f}**: weights as stored (F16), windows of {n_ctx}, BOS in front, second half scored, {scored} tokens |
| vocabulary | its own SentencePiece BPE with byte fallback, trained on the same text |
| licence | MIT, as this project; the texts are in the public domain |

Greedy continuations:

{samples}
"""


def write_card(path: Path, model: DemoModel, vocabulary: bytes, facts: dict[str, float]) -> None:
    prompts = ("It was a dark and stormy", "“My dear", "The old gentleman")
    samples = "\n".join("> " + continuation(model, vocabulary, p).replace("\n", " / ") + "\n" for p in prompts)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    path.write_text(CARD.format(millions=millions, samples=samples, **vars(model.c), **facts), "utf-8")
