"""A language model in plain numpy: an engine that shares nothing with quantscope but the form of its trace, with faults on request.

    run(model, tokens)                       every tap of quantscope/model/taps.py, float32, exact arithmetic
    run(model, tokens, [Planted(...)])       the same with faults
    run(model, tokens, n_prompt=4)           the tokens from the fifth on one at a time, through a cache of keys and values

Reads GGUF files with the ``gguf`` package: llama, qwen2 and qwen3 without scaled RoPE.  Axis letters as in quantscope/model/__init__.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from benchmarks.numpy_blocks import Array, decode_rows
from benchmarks.numpy_faults import Way, as_loaded, rms_norm, softmax, way_of
from benchmarks.planted import MADE_WITH, ROLES, Planted, Shape, faults_of
from quantscope.trace import Origin, Trace, full_trace

Show: TypeAlias = Callable[[str, Array], None]  # (tap, [T,channels] or [H,T,S])
HALF_SPLIT = {"llama": False, "qwen2": True, "qwen3": True}


@dataclass(frozen=True)
class File:
    """A GGUF file: its sizes and its tensors, right float32 as far as they were asked for."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int  # channels of a head that turn
    theta: float
    eps: float
    bos: int | None
    sha256: str
    raw: dict[str, Any]  # name → the reader's tensor
    right: dict[str, Array] = field(default_factory=dict)

    def type_of(self, name: str) -> str:
        return str(self.raw[name].tensor_type.name)

    def tensor(self, name: str, way: Way) -> Array:
        """The tensor as this way of reading makes it, row-major."""
        wrong = way.decoders.get(self.type_of(name))
        if wrong is not None:
            return decode_rows(self.raw[name].data, self.type_of(name), wrong)
        if name not in self.right:
            tensor = self.raw[name]
            self.right[name] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return self.right[name]

    @property
    def output(self) -> str:
        """The tensor of the head."""
        return "output.weight" if "output.weight" in self.raw else "token_embd.weight"


def open_file(model: Path) -> File:
    """The file, kept open between runs while it does not change."""
    return _opened(Path(model).resolve(), model.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _opened(path: Path, changed: int) -> File:
    reader = gguf.GGUFReader(path)
    arch = str(reader.fields["general.architecture"].contents())

    def key(name: str, default: Any = None) -> Any:
        found = reader.fields.get(f"{arch}.{name}")
        return default if found is None else found.contents()

    if arch not in HALF_SPLIT or (key("rope.scaling.type", "none") != "none" and key("rope.scaling.factor", 1) != 1):
        raise ValueError(f"{path}: this engine runs {', '.join(HALF_SPLIT)} without scaled RoPE, found {arch}")
    raw = {tensor.name: tensor for tensor in reader.tensors}
    if scales := [name for name in raw if name.endswith(".scale")]:
        raise ValueError(f"{path}: this engine has no scales of matrices, found {scales[0]}")
    n_head = key("attention.head_count")
    head_dim = key("attention.key_length", key("embedding_length") // n_head)
    bos = reader.fields.get("tokenizer.ggml.bos_token_id")
    return File(
        arch=arch,
        n_layer=key("block_count"),
        n_embd=key("embedding_length"),
        n_head=n_head,
        n_head_kv=key("attention.head_count_kv", n_head),
        head_dim=head_dim,
        n_rot=key("rope.dimension_count", head_dim),
        theta=key("rope.freq_base", 10000.0),
        eps=key("attention.layer_norm_rms_epsilon"),
        bos=None if bos is None else int(bos.contents()),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        raw=raw,
    )


def run(model: Path, tokens: Sequence[int], planted: Sequence[Planted] = (), *, n_prompt: int | None = None) -> Trace:
    """The trace of one run.  n_prompt: how many tokens go through at once; None: all of them."""
    file = open_file(model)
    if any(fault.cause == "bos-missing" for fault in planted):
        tokens, n_prompt = tokens[1:], n_prompt and n_prompt - 1
    engine = Engine(file, planted, len(tokens), n_prompt or len(tokens))
    engine.step(list(tokens[: engine.n_prompt]))
    for token in tokens[engine.n_prompt :]:
        engine.step([token])
    origin = Origin(
        engine="numpy",
        engine_version=f"numpy {np.__version__}",
        arithmetic="exact float32",
        model=Path(model).resolve().name,
        model_sha256=file.sha256,
        arch=file.arch,
        tokens=tuple(int(token) for token in tokens),
    )
    return full_trace(origin, {name: torch.from_numpy(x) for name, x in engine.taps().items()})


def plantable(model: Path) -> list[Planted]:
    """The faults that show in this model; clipping and eps are set by what a short run of random ids reaches."""
    file = open_file(model)
    n_vocab = len(file.tensor("token_embd.weight", Way()))
    ids = np.random.default_rng(0).integers(0, n_vocab, 12)
    return faults_of(shape_of(file), run(model, [1 if file.bos is None else file.bos, *ids.tolist()]))


def shape_of(file: File) -> Shape:
    """What decides which faults this file can show."""
    sizes = {role: file.raw[f"blk.0.{role}.weight"].shape for role in ROLES}
    return Shape(
        n_layer=file.n_layer,
        n_embd=file.n_embd,
        n_head=file.n_head,
        n_head_kv=file.n_head_kv,
        head_dim=file.head_dim,
        theta=file.theta,
        eps=file.eps,
        square=frozenset(role for role, (columns, rows) in sizes.items() if columns == rows),
        biases=tuple(role for role in MADE_WITH if f"blk.0.{role}.bias" in file.raw),
        head_norms="blk.0.attn_q_norm.weight" in file.raw,
        rope_factors="rope_freqs.weight" in file.raw,
        types={name: file.type_of(name) for name in file.raw},
    )


class Engine:
    """One run: the cache, the positions done so far, and what was seen at the taps."""

    def __init__(self, file: File, planted: Sequence[Planted], n_tokens: int, n_prompt: int) -> None:
        self.file, self.n_tokens, self.n_prompt = file, n_tokens, n_prompt
        self.top = way_of(planted, None)
        self.ways = [way_of(planted, i) for i in range(file.n_layer)]
        self.n_past = 0
        self.cache: dict[tuple[int, int], tuple[Array, Array, Array]] = {}  # layer, time → k and v [S,K,D], their positions [S]
        self.seen: dict[str, list[Array]] = {}

    def show(self, name: str, x: Array) -> None:
        self.seen.setdefault(name, []).append(np.ascontiguousarray(x, np.float32))

    def taps(self) -> dict[str, Array]:
        """The pieces of every step joined, [T,channels] or [H,T,S]."""
        return {name: np.concatenate(pieces, axis=pieces[0].ndim - 2) for name, pieces in self.seen.items()}

    def step(self, ids: list[int]) -> None:
        """The next tokens through all layers."""
        at = np.arange(self.n_past, self.n_past + len(ids))
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite was planted
            h = self.embed(ids)
            for i, way in enumerate(self.ways):
                h = self.layer(h, i, way, at)
            self.head(h)
        self.n_past += len(ids)

    def embed(self, ids: list[int]) -> Array:
        table = self.file.tensor("token_embd.weight", self.top)  # [V,E]
        h = table.reshape(table.shape[::-1])[:, ids].T if self.top.embedding == "column" else table[ids]
        self.show("embd", h)
        return h

    def layer(self, h: Array, i: int, way: Way, at: Array) -> Array:
        """One layer, as often as it is run; what is shown are the taps of the last time."""
        came = h
        for time in range(way.times):
            last = time == way.times - 1
            h = Block(self, i, time, self.show if last else lambda name, x: None).run(h, at)
        h = came if way.dropped else np.clip(h, -way.largest, way.largest)
        self.show(f"l_out-{i}", h)
        return h

    def head(self, h: Array) -> None:
        file, way = self.file, self.top
        x = way.norms.get("output_norm", rms_norm)(h, file.tensor("output_norm.weight", way), file.eps)
        self.show("result_norm", x)
        w = file.tensor(file.output, way)  # [V,E]
        logits = x @ way.matrices.get("output", as_loaded)(w).T
        if way.biases and "output.bias" in file.raw:
            logits = logits + file.tensor("output.bias", way)
        if way.head != "there":
            logits = np.zeros_like(logits)
        if way.head == "missing":
            logits[:, : x.shape[1]] = x
        self.show("result_output", logits)


class Block:
    """One decoder layer."""

    def __init__(self, engine: Engine, i: int, time: int, show: Show) -> None:
        self.engine, self.i, self.time, self._show = engine, i, time, show
        self.file, self.way = engine.file, engine.ways[i]

    def show(self, name: str, x: Array) -> None:
        self._show(f"{name}-{self.i}", x.reshape(len(x), -1) if name != "kq_soft_max" else x)

    def run(self, h: Array, at: Array) -> Array:
        out = self.attention(self.norm("attn_norm", h, shown="attn_norm"), at)
        h = h + out if self.way.attn_residual else out
        self.show("ffn_inp", h)
        out = self.ffn(self.norm("ffn_norm", h, shown="ffn_norm"))
        return h + out if self.way.ffn_residual else out

    def norm(self, name: str, x: Array, shown: str) -> Array:
        weight = self.file.tensor(f"blk.{self.i}.{name}.weight", self.way)
        x = self.way.norms.get(name, rms_norm)(x, weight, self.file.eps)
        self.show(shown, x)
        return x

    def project(self, name: str, x: Array, shown: str) -> Array:
        """x [T,in] times the matrix, with its bias where there is one."""
        tensor = f"blk.{self.i}.{self.way.names.get(name, name)}"
        w = self.file.tensor(f"{tensor}.weight", self.way)
        y = np.einsum("ti,oi->to", x, self.way.matrices.get(name, as_loaded)(w), optimize=True)
        if self.way.biases and f"{tensor}.bias" in self.file.raw:
            y = y + self.file.tensor(f"{tensor}.bias", self.way)
        self.show(shown, y)
        return y

    def attention(self, x: Array, at: Array) -> Array:
        file, way, T = self.file, self.way, len(x)
        D = file.head_dim
        q = self.project("attn_q", x, "Qcur_pre").reshape(T, -1, D)  # [T,H,D]
        k = self.project("attn_k", x, "Kcur_pre").reshape(T, -1, D)  # [T,K,D]
        v = self.project("attn_v", x, "Vcur").reshape(T, -1, D)  # [T,K,D]
        if f"blk.{self.i}.attn_q_norm.weight" in file.raw:
            q = self.norm("attn_q_norm", q, shown="Qcur_normed")
            k = self.norm("attn_k_norm", k, shown="Kcur_normed")
        if way.halved_heads:
            D //= 2
            q, k, v = (z.reshape(T, -1, D) for z in (q, k, v))  # [T,2H,D/2], [T,2K,D/2] twice
        q, k = self.turned(q, at, way.position_of_q), self.turned(k, at, way.position_of_k)
        self.show("Qcur", q)
        self.show("Kcur", k)
        k, v, key_at = self.remembered(k, v, at)
        probs = self.probabilities(q, k, at, key_at)  # [H,T,S]
        H, K = q.shape[1], k.shape[1]
        mixed = np.stack([probs[h] @ v[:, way.kv_head(h, H, K)] for h in range(H)], axis=1)  # [T,H,D]
        self.show("kqv_out", mixed)
        return self.project("attn_output", mixed.reshape(T, -1), "attn_out")

    def turned(self, x: Array, at: Array, position: Callable[[Array], Array] | None) -> Array:
        """RoPE: x [T,H,D], each pair of channels turned by its position."""
        if position is None:
            return x
        n_rot = self.file.n_rot // 2 if self.way.halved_heads else self.file.n_rot
        R = n_rot // 2
        speed = (self.way.theta or self.file.theta) ** (-np.arange(R) / R)  # [R]
        if self.way.factors and "rope_freqs.weight" in self.file.raw:
            speed = speed / self.file.tensor("rope_freqs.weight", self.way)[:R]
        angle = self.way.turns * position(at)[:, None, None] * speed  # [T,1,R]
        cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        half_split = HALF_SPLIT[self.file.arch] != self.way.other_layout
        first, second = (slice(0, R), slice(R, n_rot)) if half_split else (slice(0, n_rot, 2), slice(1, n_rot, 2))
        y = x.copy()
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., first] * sin + x[..., second] * cos
        return y

    def remembered(self, k: Array, v: Array, at: Array) -> tuple[Array, Array, Array]:
        """Keys, values and their positions that this step sees; the new ones go into the cache."""
        cache, way, place = self.engine.cache, self.way, (self.i, self.time)
        old = cache.get(place)
        if old is None:
            cache[place] = k, v, at
            return cache[place]
        joined = np.concatenate([old[0], k]), np.concatenate([old[1], v]), np.concatenate([old[2], at])
        if way.cache != "stale":
            cache[place] = joined
        return old if way.cache == "late" else joined

    def probabilities(self, q: Array, k: Array, at: Array, key_at: Array) -> Array:
        """softmax(q·kᵀ·scale + mask), [H,T,S]; shown with a column for every token of the run."""
        way, (T, H, D), K = self.way, q.shape, k.shape[1]
        seen = way.sees(at[:, None], key_at[None, :])  # [T,S]
        scale = np.float32(way.scale(D, self.file.n_embd))
        scores = np.empty((H, T, len(k)), np.float32)
        for h in range(H):
            of_head = np.einsum("td,sd->ts", q[:, h], k[:, way.kv_head(h, H, K)], optimize=True) * scale
            scores[h] = np.where(seen, of_head, -np.inf)
        probs = softmax(scores, way.softmax_axis)
        shown = np.zeros((H, T, self.engine.n_tokens), np.float32)
        shown[:, :, key_at] = probs
        self.show("kq_soft_max", shown)
        return probs

    def ffn(self, x: Array) -> Array:
        way = self.way
        gate, up = self.project("ffn_gate", x, "ffn_gate"), self.project("ffn_up", x, "ffn_up")  # [T,F] each
        if way.swapped:
            gate, up = up, gate
        act = way.activation(gate) * up
        act = np.where(np.abs(act) > way.overflow, np.copysign(np.inf, act), act).astype(np.float32)
        self.show("ffn_swiglu", act)
        return self.project("ffn_down", act, "ffn_out")
