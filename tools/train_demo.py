"""Train the demo model: a small Llama on public-domain English, shipped as ``quantscope/data/demo-f16.gguf``.

    python -m tools.train_demo --text train.txt --eval eval.txt

It makes its own SentencePiece vocabulary, trains on windows of 512 tokens (each begins with BOS, as llama-perplexity's chunks do),
and writes the GGUF file and the model card beside it.  Every random choice comes from ``--seed``; bit-identical
repetition additionally needs the same torch build and thread count.  An interrupted run continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BOS = 1


@dataclass(frozen=True)
class DemoConfig:
    """Shape of the demo model.  Every row is a multiple of 256 so that K-quants apply without fallback."""

    n_layer: int = 10
    n_embd: int = 256
    n_head: int = 8
    n_head_kv: int = 2
    n_ff: int = 512
    n_vocab: int = 4096
    n_ctx: int = 512
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


class RMSNorm(nn.Module):
    def __init__(self, n: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Block(nn.Module):
    """One Llama layer; attribute names are the GGUF names, so exporting is a rename of nothing."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c, kv = c, c.n_head_kv * c.head_dim
        self.attn_norm, self.ffn_norm = RMSNorm(c.n_embd, c.norm_eps), RMSNorm(c.n_embd, c.norm_eps)
        self.attn_q = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.attn_k = nn.Linear(c.n_embd, kv, bias=False)
        self.attn_v = nn.Linear(c.n_embd, kv, bias=False)
        self.attn_output = nn.Linear(c.n_embd, c.n_embd, bias=False)
        self.ffn_gate = nn.Linear(c.n_embd, c.n_ff, bias=False)
        self.ffn_up = nn.Linear(c.n_embd, c.n_ff, bias=False)
        self.ffn_down = nn.Linear(c.n_ff, c.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = x + self.attention(self.attn_norm(x), cos, sin)
        y = self.ffn_norm(h)
        return h + self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y))

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.attn_q(x).view(b, t, self.c.n_head, -1).transpose(1, 2)  # [B,H,T,D]
        k = self.attn_k(x).view(b, t, self.c.n_head_kv, -1).transpose(1, 2)  # [B,K,T,D]
        v = self.attn_v(x).view(b, t, self.c.n_head_kv, -1).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.attn_output(y.transpose(1, 2).reshape(b, t, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved RoPE, the layout of llama GGUF files: channels 2j and 2j+1 turn together."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


class DemoModel(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c = c
        self.token_embd = nn.Embedding(c.n_vocab, c.n_embd)
        self.blk = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.output_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.output = nn.Linear(c.n_embd, c.n_vocab, bias=False)
        angle = torch.arange(c.n_ctx)[:, None] * c.rope_theta ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                into_stream = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * c.n_layer) if into_stream else 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embd(ids)  # [B,T,E]
        cos, sin = self.cos[: ids.shape[1]].to(x.dtype), self.sin[: ids.shape[1]].to(x.dtype)
        for block in self.blk:
            x = block(x, cos, sin)
        return self.output(self.output_norm(x))  # [B,T,V]


def train_vocabulary(text: Path, n_vocab: int) -> bytes:
    """A Llama-style SentencePiece vocabulary: BPE, byte fallback, split digits, <unk>=0 <s>=1 </s>=2."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.read_text("utf-8").splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=n_vocab,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=16384,
        num_threads=2,
        minloglevel=2,
    )
    return out.getvalue()


def encode(vocabulary: bytes, text: str, lines: int = 200) -> np.ndarray:
    """Token ids of the text, encoded in pieces of whole lines so that newlines stay inside, as a prompt has them."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    rows = text.splitlines(keepends=True)
    pieces = ["".join(rows[i : i + lines]) for i in range(0, len(rows), lines)]
    return np.array([i for ids in sp.encode(pieces) for i in ids], dtype=np.int32)


def windows(ids: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """One epoch: disjoint windows of n−1 tokens from a random offset, shuffled, BOS in front."""
    ids = ids[generator.integers(n) :]
    rows = ids[: len(ids) // (n - 1) * (n - 1)].reshape(-1, n - 1)
    rows = generator.permutation(rows)
    return np.concatenate([np.full((len(rows), 1), BOS, dtype=rows.dtype), rows], axis=1)


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over 2 %, flat, then linear decay to 0 over the last 40 %; as a fraction of the peak."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.4 * steps))


def optimizers(model: DemoModel, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and norms."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("blk.")]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and n.startswith("blk."))]
    return [
        torch.optim.Muon(inside, lr=muon_lr, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(c: DemoConfig, ids: np.ndarray, args: argparse.Namespace, checkpoint: Path) -> DemoModel:
    torch.manual_seed(args.seed)
    generator = np.random.default_rng(args.seed)
    model = DemoModel(c)
    opts = optimizers(model, args.lr, args.muon_lr)
    peaks = [o.param_groups[0]["lr"] for o in opts]
    per_epoch = (len(ids) - c.n_ctx) // (c.n_ctx - 1) // args.batch
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        for o, s in zip(opts, saved["optimizers"], strict=True):
            o.load_state_dict(s)
        start = saved["step"]
    step_fn = torch.compile(loss_of) if args.compile else loss_of
    epoch_rows = np.empty(0)
    t0, seen = time.time(), 0
    for step in range(args.steps):
        if step % per_epoch == 0:  # drawn for skipped steps too: the order does not depend on interruptions
            epoch_rows = windows(ids, c.n_ctx, generator)
        if step < start:
            continue
        i = step % per_epoch * args.batch
        batch = torch.from_numpy(epoch_rows[i : i + args.batch]).long()
        for o, peak in zip(opts, peaks, strict=True):
            o.param_groups[0]["lr"] = peak * learning_rate(step, args.steps)
        loss = step_fn(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        seen += batch.numel()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step}/{args.steps} loss {loss.item():.4f} {seen / (time.time() - t0):.0f} tokens/s", flush=True)
        if step % 100 == 99:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "step": step + 1}
            torch.save(state | {"config": asdict(c)}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return model


def loss_of(model: DemoModel, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--work", type=Path, default=Path("build/demo"))
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--muon-lr", type=float, default=3e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--compile", action="store_true")
    args = p.parse_args()
    c = DemoConfig()
    args.work.mkdir(parents=True, exist_ok=True)
    spm = args.work / "spm.model"
    if not spm.exists():
        spm.write_bytes(train_vocabulary(args.text, c.n_vocab))
    ids_file = args.work / "ids.npy"
    if not ids_file.exists():
        np.save(ids_file, encode(spm.read_bytes(), args.text.read_text("utf-8")))
    ids = np.load(ids_file)
    print(f"{len(ids)} tokens")
    train(c, ids, args, args.work / "checkpoint.pt")


if __name__ == "__main__":
    main()
