"""The catalogue: what engines have got wrong, each as a change of the reference.

    for instance in instances(setup):  wrong = instance.apply(setup)        the setup of an engine with this fault

A row says what it is called, which operations it touches, where it can be, how it is applied, and what the engine does then.  Weights are
[out,in], row-major in memory; "flat" is that memory.  docs/faults.md is this table (``python -m tools.fault_table``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from quantscope.arch.config import ModelConfig, RopeConfig
from quantscope.diagnose.altered import Altered, Sees, attending, causal, turning
from quantscope.diagnose.decodings import DECODINGS, Decoding
from quantscope.diagnose.setup import EMBEDDING, Edited, Setup, file_weights
from quantscope.language import mark, say
from quantscope.model.arithmetic import Arithmetic
from quantscope.weights import Weights

Change: TypeAlias = Callable[[Setup, str], Setup | None]  # (setup, place) → with the fault; None where this model has no such place
Places: TypeAlias = Callable[[ModelConfig, Sequence[float]], Iterable[str]]  # (config, limits: see ``instances``) → places

# where a fault can be → the taps that the operation makes
MATRICES = {
    "attn_q": "Qcur_pre",
    "attn_k": "Kcur_pre",
    "attn_v": "Vcur",
    "attn_output": "attn_out",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_down": "ffn_out",
    "output": "result_output",
}
NORMS = {
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "output_norm": "result_norm",
    "attn_q_norm": "Qcur_normed",
    "attn_k_norm": "Kcur_normed",
    "attn_q_a_norm": "Qcur_pre",
    "attn_kv_a_norm": "Kcur_latent",
}
STEMS = MATRICES | NORMS
ALL = "all"
ATTENTION = ("kq_soft_max", "kqv_out")
ROPE_Q, ROPE_K = ("Qcur", "Qcur_latent"), ("Kcur", "Kcur_latent")
ROPE = (*ROPE_Q, *ROPE_K)
F16_MAX = 65504.0


@dataclass(frozen=True)
class Fault:
    """One row.  says: completes "the engine ...", {place} is the place.  more: places that the model has or the evidence suggests."""

    name: str
    says: str
    change: Change
    ops: tuple[str, ...] = ()  # stems of the taps whose operation is wrong; empty: those of the place
    places: tuple[str, ...] = ("",)
    more: Places | None = None


@dataclass(frozen=True)
class Instance:
    """A fault at a place."""

    fault: Fault
    place: str = ""

    @property
    def label(self) -> str:
        return f"{self.fault.name} ({self.place})" if self.place else self.fault.name

    @property
    def says(self) -> str:
        return say(self.fault.says, place=say(_EVERY) if self.place == ALL else self.place)

    @property
    def ops(self) -> tuple[str, ...]:
        """Stems of the taps whose operation is touched."""
        if self.fault.ops:
            return self.fault.ops
        return tuple(STEMS[p] for p in self.fault.places if p in STEMS and self.place in (ALL, p))

    def apply(self, setup: Setup) -> Setup | None:
        """The setup with the fault; None where it would change nothing in this model."""
        return self.fault.change(setup, self.place)


_EVERY = mark("every one of them")


def instances(setup: Setup, limits: Sequence[float] = ()) -> Iterator[Instance]:
    """The catalogue as far as it applies to this model.  limits: magnitudes at which the evidence suggests that values were clipped."""
    for fault in FAULTS:
        for place in (*fault.places, *(fault.more(setup.config, limits) if fault.more else ())):
            if fault.change(setup, place) is not None:
                yield Instance(fault, place)


# ---- how each is applied -------------------------------------------------------------------------------------------------------------


def _computes(**operations: Callable[..., Any]) -> Change:
    return lambda s, place: replace(s, arithmetic=Altered(s.arithmetic, **operations))


def _turns(applies: Callable[[ModelConfig], bool] = lambda c: True, **settings: Any) -> Change:
    return lambda s, place: replace(s, arithmetic=turning(s.arithmetic, **settings)) if applies(s.config) else None


def _attends(applies: Callable[[ModelConfig], bool] = lambda c: True, **settings: Any) -> Change:
    return lambda s, place: replace(s, arithmetic=attending(s.arithmetic, **settings)) if applies(s.config) else None


def _scaled(factor: Callable[[ModelConfig], float]) -> Change:
    def change(s: Setup, place: str) -> Setup | None:
        f = factor(s.config) / s.config.kq_scale
        return None if math.isclose(f, 1) else replace(s, arithmetic=attending(s.arithmetic, factor=f))

    return change


def _has(s: Setup, local: str) -> bool:
    return local in (s.weights.top_names() if local.startswith("output") else s.weights.layer_names(0))


def _reads(change: Callable[[Tensor], Tensor]) -> Change:
    """Another tensor than the file's, of one matrix or norm, or of all that the fault can be at."""

    def changed(s: Setup, place: str) -> Setup | None:
        if place != ALL and not _has(s, f"{place}.weight"):
            return None
        wanted = [f"{p}.weight" for p in STEMS] if place == ALL else [f"{place}.weight"]
        return replace(s, weights=Edited(s.weights, matrices=lambda local, _, x: change(x) if local in wanted else x))

    return changed


def _reads_matrices(change: Callable[[Tensor], Tensor]) -> Change:
    return _reads(lambda x: change(x) if x.ndim == 2 else x)


def _reads_norms(change: Callable[[Tensor], Tensor]) -> Change:
    return _reads(lambda x: change(x) if x.ndim == 1 else x)


def _norms(norm: Callable[..., Tensor]) -> Change:
    """Another norm at one place or at all: norm(arithmetic, x, w, name, eps)."""

    def change(s: Setup, place: str) -> Setup | None:
        if place != ALL and not _has(s, f"{place}.weight"):
            return None

        def rms_norm(m: Arithmetic, x: Tensor, w: Any, name: str, eps: float) -> Tensor:
            return norm(m, x, w, name, eps) if place in (ALL, name) else m.rms_norm(x, w, name, eps)

        return replace(s, arithmetic=Altered(s.arithmetic, rms_norm=rms_norm))

    return change


def _no_qk_norm(s: Setup, place: str) -> Setup | None:
    if not _has(s, "attn_q_norm.weight"):
        return None

    def rms_norm(m: Arithmetic, x: Tensor, w: Any, name: str, eps: float) -> Tensor:
        return x if name in ("attn_q_norm", "attn_k_norm") else m.rms_norm(x, w, name, eps)

    return replace(s, arithmetic=Altered(s.arithmetic, rms_norm=rms_norm))


def _eps(s: Setup, place: str) -> Setup | None:
    """place: "1e-06" of all norms, "1e-06 in ffn_norm" of one."""
    value, _, norm = place.partition(" in ")
    other = float(value)
    if math.isclose(other, s.config.norm_eps, rel_tol=1e-3) or (norm and not _has(s, f"{norm}.weight")):  # the file's is a float32
        return None

    def rms_norm(m: Arithmetic, x: Tensor, w: Any, name: str, eps: float) -> Tensor:
        return m.rms_norm(x, w, name, other if norm in ("", name) else eps)

    return replace(s, arithmetic=Altered(s.arithmetic, rms_norm=rms_norm))


def _theta(s: Setup, place: str) -> Setup | None:
    theta = float(place)
    if math.isclose(theta, s.config.rope.theta, rel_tol=1e-3):
        return None
    return replace(s, arithmetic=turning(s.arithmetic, config=lambda c: replace(c, theta=theta)))


def _offset(s: Setup, place: str) -> Setup | None:
    n, only = int(place.split()[0]), {"q": "q", "k": "k"}.get(place.split()[-1])
    return replace(s, arithmetic=turning(s.arithmetic, positions=lambda p: p + n, only=only))  # type: ignore[arg-type]


def _no_factors(s: Setup, place: str) -> Setup | None:
    return None if s.weights.rope_factors() is None else replace(s, arithmetic=turning(s.arithmetic, factors=False))


def _no_scaling(s: Setup, place: str) -> Setup | None:
    plain = partial(replace, scaling="none", factor=1.0, magnitude=1.0)
    return None if s.config.rope.scaling == "none" else replace(s, arithmetic=turning(s.arithmetic, config=plain))


def _other_layout(c: RopeConfig) -> RopeConfig:
    return replace(c, layout="half" if c.layout == "interleaved" else "interleaved")


def _half_heads(s: Setup, place: str) -> Setup | None:
    """Heads of half the size, twice as many: in RoPE, whose frequencies follow the size, and in the attention."""
    if s.config.head_dim % 4 or s.config.rope.dim != s.config.head_dim or s.weights.rope_factors() is not None:
        return None
    turned = turning(s.arithmetic, config=lambda c: replace(c, dim=c.dim // 2))

    def rotate(m: Arithmetic, x: Tensor, tables: Any, which: Any) -> Tensor:
        return m.rotate(x.reshape(*x.shape[:2], 2 * x.shape[2], -1), tables, which).reshape(x.shape)

    return replace(s, arithmetic=attending(Altered(turned, rotate=rotate), parts=2, factor=math.sqrt(2)))


def _sees(visible: Callable[[Setup], Sees | None]) -> Change:
    def change(s: Setup, place: str) -> Setup | None:
        sees = visible(s)
        return None if sees is None else replace(s, arithmetic=attending(s.arithmetic, sees=sees))

    return change


def _everything(s: Setup) -> Sees:
    """The whole batch: of a decoding, the prompt."""
    n = s.ids.shape[1] if s.n_prompt is None else s.n_prompt
    return lambda query, key: (key < n) | causal(query, key)


def _stale(s: Setup) -> Sees | None:
    n = s.n_prompt
    return None if n is None else lambda query, key: causal(query, key) & ((key < n) | (key == query))


def _late(s: Setup) -> Sees | None:
    n = s.n_prompt
    return None if n is None else lambda query, key: causal(query, key) & ((query < n) | (key != query))


def _renamed(a: str, b: str) -> Change:
    def change(s: Setup, place: str) -> Setup | None:
        names = s.weights.layer_names(0)
        swapped = {**_pairs(a, b, names), **_pairs(b, a, names)}
        return replace(s, weights=Edited(s.weights, renamed=swapped))

    return change


def _pairs(a: str, b: str, names: Any) -> dict[str, str]:
    return {local: b + local.removeprefix(a) for local in names if local.startswith(f"{a}.") and b + local.removeprefix(a) in names}


def _no_bias(s: Setup, place: str) -> Setup | None:
    def hidden(local: str) -> bool:
        return local.endswith(".bias") and place in (ALL, local.removesuffix(".bias"))

    there = any(hidden(local) for local in (*s.weights.layer_names(0), *s.weights.top_names()))
    return replace(s, weights=Edited(s.weights, without=hidden)) if there else None


def _embedding(change: Callable[[Tensor], Tensor]) -> Change:
    return lambda s, place: replace(s, weights=Edited(s.weights, embedding=change))


def _head(logits: Callable[[Tensor, int], Tensor]) -> Change:
    def change(s: Setup, place: str) -> Setup | None:
        def linear(m: Arithmetic, x: Tensor, w: Any, name: str, **more: Any) -> Tensor:
            return logits(x, s.config.n_vocab) if name == "output" else m.linear(x, w, name, **more)

        return replace(s, arithmetic=Altered(s.arithmetic, linear=linear))

    return change


def _decoded(decoding: Decoding) -> Change:
    """Tensors of some types dequantized otherwise, the embedding too."""

    def change(s: Setup, place: str) -> Setup | None:
        file = file_weights(s.weights)
        if not isinstance(file, Weights) or file.source.format != "gguf":
            return None
        wrong = {name for name in file.stored_names() if file.stored(name).qtype.name in decoding.types}
        if not wrong:
            return None

        def read(name: str) -> Tensor:
            stored = file.stored(name)
            return torch.from_numpy(decoding.wrong(file.source.raw(stored.name), stored.qtype)).reshape(stored.shape)

        edited = Edited(
            s.weights,
            matrices=lambda _, name, x: read(name) if name in wrong else x,
            embedding=(lambda _: read(EMBEDDING)) if EMBEDDING in wrong else None,
        )
        return replace(s, weights=edited)

    return change


def _without_residual(branch: str) -> Change:
    return _computes(residual=lambda m, h, x, b: x if b == branch else m.residual(h, x, b))


def _times(n: int) -> Change:
    def change(s: Setup, place: str) -> Setup | None:
        i = int(place)
        return replace(s, times={**s.times, i: n}) if i < s.config.n_layer else None

    return change


def _clipped(s: Setup, place: str) -> Setup | None:
    c = float(place)
    return _computes(residual=lambda m, h, x, b: m.residual(h, x, b).clamp(-c, c) if b == "ffn" else m.residual(h, x, b))(s, place)


def _no_bos(s: Setup, place: str) -> Setup | None:
    return replace(s, ids=s.ids[:, 1:]) if s.ids.shape[1] > 1 else None


def transposed(w: Tensor) -> Tensor:
    """The memory read with the axes in the wrong order, W′[o,i] = flat[i·out + o]."""
    return w.reshape(w.shape[1], w.shape[0]).T


def _layer_norm(m: Arithmetic, x: Tensor, w: Any, name: str, eps: float) -> Tensor:
    return m.rms_norm(x - x.mean(-1, keepdim=True), w, name, eps)


def _shared(c: ModelConfig) -> bool:
    """Whether the order of sharing shows: 1 < K < H."""
    return 1 < c.n_head_kv < c.n_head


# ---- the table -----------------------------------------------------------------------------------------------------------------------

_ALL_MATRICES, _ALL_NORMS = (ALL, *MATRICES), (ALL, *NORMS)
_EPS = tuple(
    f"{eps}{at}"
    for eps in ("0", "1e-12", "1e-08", "1e-06", "1e-05", "0.0001", "0.001", "0.01", "0.1")
    for at in ("", *(f" in {n}" for n in NORMS))
)
_THETAS = ("10000", "100000", "500000", "1000000", "8000000")


def _each_layer(config: ModelConfig, limits: Sequence[float]) -> Iterable[str]:
    """each layer"""
    return map(str, range(config.n_layer))


def _each_limit(config: ModelConfig, limits: Sequence[float]) -> Iterable[str]:
    """the largest magnitude of the stream"""
    return (f"{c:.9g}" for c in limits)


def _gelu(form: str) -> Change:
    return _computes(swiglu=lambda m, g, u: F.gelu(g, approximate=form) * u)


def _hidden(x: Tensor, n_vocab: int) -> Tensor:
    return F.pad(x, (0, n_vocab - x.shape[-1]))


def _zeros(x: Tensor, n_vocab: int) -> Tensor:
    return x.new_zeros(*x.shape[:-1], n_vocab)


FAULTS: tuple[Fault, ...] = (
    # weights: layout
    Fault(
        "weight-transposed", "reads the matrix with its axes in the wrong order ({place})", _reads_matrices(transposed), (), _ALL_MATRICES
    ),
    Fault(
        "weight-reinterpreted",
        "takes the transposed matrix's memory for the matrix ({place})",
        _reads_matrices(lambda w: w.T.reshape(w.shape)),
        (),
        _ALL_MATRICES,
    ),
    Fault("embedding-column", "reads a column of the embedding instead of a row", _embedding(transposed), ("embd",)),
    Fault("gate-up-swapped", "exchanges gate and up: silu(up) · gate", _computes(swiglu=lambda m, g, u: m.swiglu(u, g)), ("ffn_swiglu",)),
    Fault(
        "gate-up-swapped", "loads ffn_gate for ffn_up and the reverse", _renamed("ffn_gate", "ffn_up"), ("ffn_gate", "ffn_up"), ("loaded",)
    ),
    Fault("bias-ignored", "leaves out the bias ({place})", _no_bias, (), _ALL_MATRICES),
    # weights: dequantization
    *(
        Fault(name, says, _decoded(DECODINGS[name]), ("embd", *MATRICES.values()))
        for name, says in {
            "nibble-order-q4_0": mark("takes low and high nibbles of a block of 32 as neighbours"),
            "nibble-order-q4_k": mark("takes low and high nibbles of each 64 elements of a K-block as neighbours"),
            "k-scale-min": mark("unpacks the 6-bit scales and mins of the sub-blocks 4 to 7 of Q4_K and Q5_K wrongly"),
            "q6_k-order": mark("takes the elements of Q6_K in sequence instead of l, l+32, l+64, l+96"),
            "q6_k-offset": mark("does not subtract 32 from Q6_K codes"),
            "block-scale-bf16": mark("reads the float16 scale of a block as bfloat16"),
            "block-min-ignored": mark("does not subtract the min of a block"),
            "q5-high-bits": mark("ignores the fifth bit of Q5 codes"),
            "q4_0-offset": mark("does not subtract 8 from Q4_0 codes (16 from Q5_0)"),
        }.items()
        if name in DECODINGS
    ),
    # norms
    Fault("norm-eps", "adds {place} to the mean square in its norms, another eps than the file's", _eps, tuple(NORMS.values()), _EPS),
    Fault("norm-weight-missing", "does not multiply with the norm's weight ({place})", _reads_norms(torch.ones_like), (), _ALL_NORMS),
    Fault("norm-weight-twice", "multiplies with the norm's weight twice ({place})", _reads_norms(torch.square), (), _ALL_NORMS),
    Fault("norm-weight-plus-one", "multiplies with 1 + the norm's weight ({place})", _reads_norms(lambda w: w + 1), (), _ALL_NORMS),
    Fault("norm-layernorm", "subtracts the mean: LayerNorm for RMSNorm ({place})", _norms(_layer_norm), (), _ALL_NORMS),
    Fault("q-norm-ignored", "does not norm q and k", _no_qk_norm, ("Qcur_normed", "Kcur_normed")),
    Fault("norm-missing", "leaves out the norm ({place})", _norms(lambda m, x, w, name, eps: x), (), _ALL_NORMS),
    # rotation
    Fault("rope-layout", "pairs channels the other way (interleaved for half-split or the reverse)", _turns(config=_other_layout), ROPE),
    Fault("rope-theta", "rotates with the base {place}", _theta, ROPE, _THETAS),
    Fault("rope-offset", "counts positions from another start on q and k ({place})", _offset, ROPE, ("1", "-1")),
    Fault("rope-offset-q", "counts the positions of q otherwise than those of k ({place})", _offset, ROPE_Q, ("1 q", "-1 q")),
    Fault("rope-offset-k", "counts the positions of k otherwise than those of q ({place})", _offset, ROPE_K, ("1 k", "-1 k")),
    Fault("rope-missing", "does not rotate q and k", _turns(never="qk"), ROPE),
    Fault("rope-stuck", "rotates every position as position 0", _turns(positions=torch.zeros_like), ROPE),
    Fault("rope-missing-k", "does not rotate k", _turns(never="k"), ROPE_K),
    Fault("rope-missing-q", "does not rotate q", _turns(never="q"), ROPE_Q),
    Fault("rope-reversed", "rotates the other way", _turns(tables=lambda t: t._replace(sin=-t.sin)), ROPE),
    Fault("rope-factors-ignored", "does not divide the frequencies by rope_freqs.weight", _no_factors, ROPE),
    Fault("rope-scaling-ignored", "does not scale the positions for a longer context", _no_scaling, ROPE),
    # attention
    Fault("mask-missing", "lets every position see the whole batch", _sees(_everything), ATTENTION),
    Fault("mask-next", "lets a position see the one after it", _attends(sees=lambda q, k: k <= q + 1), ATTENTION),
    Fault("mask-self", "does not let a position see itself", _attends(sees=lambda q, k: (k < q) | ((q == 0) & (k == 0))), ATTENTION),
    Fault("scale-missing", "does not scale q·k", _scaled(lambda c: 1.0), ATTENTION),
    Fault("scale-embd", "scales q·k by 1/√n_embd", _scaled(lambda c: c.n_embd**-0.5), ATTENTION),
    Fault("scale-linear", "scales q·k by 1/head_dim", _scaled(lambda c: 1 / c.head_dim), ATTENTION),
    Fault("gqa-tile", "gives query head h the key/value head h mod K instead of h // (H/K)", _attends(_shared, tiled=True), ATTENTION),
    Fault("head-dim-half", "takes a head for two of half the size", _half_heads, (*ROPE, *ATTENTION)),
    Fault("softmax-queries", "takes the softmax over the queries", _attends(axis=-2), ATTENTION),
    Fault("softmax-heads", "takes the softmax over the heads", _attends(axis=1), ATTENTION),
    Fault("cache-stale", "does not store keys and values of decoded tokens in its cache", _sees(_stale), ATTENTION),
    Fault("cache-off-by-one", "does not see the newest cell of its cache", _sees(_late), ATTENTION),
    # feed-forward
    Fault("act-gelu-erf", "has GELU for SiLU", _gelu("none"), ("ffn_swiglu",)),
    Fault("act-gelu-tanh", "has GELU (tanh form) for SiLU", _gelu("tanh"), ("ffn_swiglu",)),
    Fault("act-relu", "has ReLU for SiLU", _computes(swiglu=lambda m, g, u: g.relu() * u), ("ffn_swiglu",)),
    Fault("act-missing", "has no activation: gate · up", _computes(swiglu=lambda m, g, u: g * u), ("ffn_swiglu",)),
    Fault("act-sigmoid", "has the logistic function for SiLU", _computes(swiglu=lambda m, g, u: g.sigmoid() * u), ("ffn_swiglu",)),
    Fault(
        "f16-overflow",
        "stores the feed-forward's activations in float16, which overflows",
        _computes(swiglu=lambda m, g, u: m.swiglu(g, u).half().float()),
        ("ffn_swiglu",),
    ),
    # residual stream
    Fault("residual-missing-attn", "does not add the stream to the attention's output", _without_residual("attn"), ("ffn_inp",)),
    Fault("residual-missing-ffn", "does not add the stream to the feed-forward's output", _without_residual("ffn"), ("l_out",)),
    Fault("layer-skipped", "does not run layer {place}", _times(0), ("l_out",), (), _each_layer),
    Fault("layer-repeated", "runs layer {place} twice", _times(2), ("attn_norm", "ffn_inp"), (), _each_layer),
    Fault("activations-clipped", "clips the residual stream at ±{place}", _clipped, ("l_out",), ("10", "100"), _each_limit),
    # head
    Fault("head-layout", "indexes the output matrix as h·V + v instead of v·H + h", _reads_matrices(transposed), (), ("output",)),
    Fault("head-missing", "has no output matrix: the hidden state is given as logits", _head(_hidden), ("result_output",)),
    Fault("head-zero", "has not loaded the output matrix: all logits are 0", _head(_zeros), ("result_output",)),
    # ids
    Fault("bos-missing", "ran the ids without the first, BOS", _no_bos, ("embd",)),
)
