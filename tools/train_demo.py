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

from tools.demo_gguf import perplexity, write_card, write_gguf

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


def train(c: DemoConfig, ids: np.ndarray, args: argparse.Namespace, checkpoint: Path) -> tuple[DemoModel, list[float]]:
    torch.manual_seed(args.seed)
    generator = np.random.default_rng(args.seed)
    model = DemoModel(c)
    opts = optimizers(model, args.lr, args.muon_lr)
    peaks = [o.param_groups[0]["lr"] for o in opts]
    per_epoch = (len(ids) - c.n_ctx) // (c.n_ctx - 1) // args.batch
    start, losses = 0, list[float]()
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        for o, s in zip(opts, saved["optimizers"], strict=True):
            o.load_state_dict(s)
        start, losses = saved["step"], saved["losses"]
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
        losses.append(loss.item())
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step}/{args.steps} loss {loss.item():.4f} {seen / (time.time() - t0):.0f} tokens/s", flush=True)
        if step % 100 == 99:
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts], "step": step + 1, "losses": losses}
            torch.save(state | {"config": asdict(c)}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    return model, losses


def loss_of(model: DemoModel, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch)
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch[:, 1:].flatten())


def held_out_windows(ids: np.ndarray, n: int) -> Tensor:
    """Disjoint windows of n tokens in order, the first token of each replaced by BOS, as llama-perplexity cuts a text."""
    rows = ids[: len(ids) // n * n].reshape(-1, n).copy()
    rows[:, 0] = BOS
    return torch.from_numpy(rows).long()


def as_stored(model: DemoModel) -> DemoModel:
    """The model with its matrices rounded to F16, as the GGUF file holds them."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_(p.half().float())
    return model


def publish(model: DemoModel, vocabulary: bytes, losses: list[float], args: argparse.Namespace) -> None:
    """GGUF and model card into ``--out``."""
    model = as_stored(model)
    args.out.mkdir(parents=True, exist_ok=True)
    write_gguf(args.out / "demo-f16.gguf", model, vocabulary)
    text = encode(vocabulary, args.eval.read_text("utf-8"), lines=1 << 30)
    ppl, scored = perplexity(model, held_out_windows(np.concatenate([[BOS], text]), model.c.n_ctx))
    tokens = args.steps * args.batch * model.c.n_ctx
    facts = {
        "seed": args.seed, "steps": args.steps, "tokens_per_step": args.batch * model.c.n_ctx, "tokens": tokens / 1e6,
        "epochs": tokens / args.n_train_tokens, "loss": float(np.mean(losses[-100:])), "ppl": ppl, "scored": scored,
    }  # fmt: skip
    write_card(args.out / "demo-model-card.md", model, vocabulary, facts)
    print(f"held-out perplexity {ppl:.2f} over {scored} tokens; wrote {args.out}")


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", type=Path, required=True, help="training text, UTF-8")
    p.add_argument("--eval", type=Path, required=True, help="held-out text, UTF-8, for the perplexity in the model card")
    p.add_argument("--out", type=Path, default=Path("quantscope/data"))
    p.add_argument("--work", type=Path, default=Path("build/demo"), help="vocabulary, token ids and checkpoint")
    p.add_argument("--steps", type=int, default=1300)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--lr", type=float, default=3e-3, help="peak for embeddings, head and norms (AdamW)")
    p.add_argument("--muon-lr", type=float, default=3e-3, help="peak for the matrices inside the layers (Muon)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--compile", action="store_true", help="torch.compile the training step: about a quarter faster after a minute")
    return p.parse_args()


def main() -> None:
    args = arguments()
    c = DemoConfig()
    args.work.mkdir(parents=True, exist_ok=True)
    spm = args.work / "spm.model"
    if not spm.exists():
        spm.write_bytes(train_vocabulary(args.text, c.n_vocab))
    ids_file = args.work / "ids.npy"
    if not ids_file.exists():
        np.save(ids_file, encode(spm.read_bytes(), args.text.read_text("utf-8")))
    ids = np.load(ids_file)
    args.n_train_tokens = len(ids)
    print(f"{len(ids)} tokens")
    model, losses = train(c, ids, args, args.work / "checkpoint.pt")
    publish(model, spm.read_bytes(), losses, args)


if __name__ == "__main__":
    main()
