"""What is done to an engine on purpose: the record of one fault, and which faults a model can show.

    faults_of(shape, clean)  →  [Planted(cause, taps, layers, detail), ...]

shared by the engines that plant them (``numpy_engine``, ``transformers_faults``) and the fault benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.numpy_blocks import mistakes_of
from quantscope.trace import Full, Trace

MADE_WITH = {  # tensor → the tap that it makes
    "token_embd": "embd",
    "attn_norm": "attn_norm",
    "attn_q": "Qcur_pre",
    "attn_k": "Kcur_pre",
    "attn_v": "Vcur",
    "attn_q_norm": "Qcur_normed",
    "attn_k_norm": "Kcur_normed",
    "attn_output": "attn_out",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn_gate",
    "ffn_up": "ffn_up",
    "ffn_down": "ffn_out",
    "output_norm": "result_norm",
    "output": "result_output",
}
NORMS = ("attn_norm", "ffn_norm", "output_norm")
NORM_FAULTS = ("norm-weight-missing", "norm-weight-twice", "norm-weight-plus-one", "norm-layernorm", "norm-missing")
ROLES = ("ffn_down", "attn_q", "attn_v", "attn_output", "ffn_gate")
EPSILONS = (1e-6, 1e-3, 1e-2, 1e-1)  # the first that shows is planted
SHOWS = 1e-5  # NMSE
THETAS = (10_000.0, 500_000.0)
F16_MAX = 65504.0

# Faults without a detail → the taps that they make wrong by themselves
ALWAYS = {
    "embedding-column": ("embd",),
    "head-layout": ("result_output",),
    "head-missing": ("result_output",),
    "head-zero": ("result_output",),
    "rope-layout": ("Qcur", "Kcur"),
    "rope-offset": ("Qcur", "Kcur"),
    "rope-offset-q": ("Qcur",),
    "rope-stuck": ("Qcur", "Kcur"),
    "rope-missing": ("Qcur", "Kcur"),
    "rope-missing-q": ("Qcur",),
    "rope-missing-k": ("Kcur",),
    "rope-reversed": ("Qcur", "Kcur"),
    "mask-missing": ("kq_soft_max",),
    "mask-next": ("kq_soft_max",),
    "mask-self": ("kq_soft_max",),
    "scale-missing": ("kq_soft_max",),
    "scale-embd": ("kq_soft_max",),
    "scale-linear": ("kq_soft_max",),
    "head-dim-half": ("Qcur", "Kcur", "kq_soft_max", "kqv_out"),
    "softmax-queries": ("kq_soft_max",),
    "softmax-heads": ("kq_soft_max",),
    "act-gelu-erf": ("ffn_swiglu",),
    "act-gelu-tanh": ("ffn_swiglu",),
    "act-relu": ("ffn_swiglu",),
    "act-missing": ("ffn_swiglu",),
    "act-sigmoid": ("ffn_swiglu",),
    "residual-missing-attn": ("ffn_inp",),
    "residual-missing-ffn": ("l_out",),
    "bos-missing": ("embd",),
}
IN_DECODING = {"cache-stale": ("kq_soft_max",), "cache-off-by-one": ("kq_soft_max",)}  # shown by steps after a prompt only


@dataclass(frozen=True)
class Planted:
    """One fault in one engine.

    taps: stems of the taps that the faulty operations make, so what local replay of whole tensors convicts; where ``kq_soft_max`` was not
    recorded, ``kqv_out`` stands for it.  layers: None is every layer, or the embedding or the head where the taps are theirs.
    """

    cause: str  # an id of the fault catalogue
    taps: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    detail: str = ""  # matrix, norm or type that is wrong, and the wrong value: "ffn_down", "attn_norm 0.001", "Q4_0"

    @property
    def where(self) -> str:
        """The first word of the detail."""
        return self.detail.partition(" ")[0]

    @property
    def value(self) -> float:
        """The last word of the detail, a number."""
        return float(self.detail.rpartition(" ")[2])

    def at(self, layer: int | None) -> bool:
        """Whether the fault is in this layer; None stands for the embedding and the head."""
        return self.layers is None or layer in self.layers


@dataclass(frozen=True)
class Shape:
    """What decides which faults a model can show."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    theta: float
    eps: float
    square: frozenset[str] = frozenset()  # roles whose matrix is as high as wide
    biases: tuple[str, ...] = ()  # roles that have one
    head_norms: bool = False
    rope_factors: bool = False
    types: dict[str, str] = field(default_factory=dict)  # full tensor name → ggml type


def faults_of(shape: Shape, clean: Trace) -> list[Planted]:
    """Every fault that changes something in this model; clean: what a right engine shows on a typical prompt."""
    return [*_matrices(shape), *_norms(shape, clean), *_operations(shape), *_flow(shape, clean), *_types(shape)]


def _matrices(shape: Shape) -> Iterator[Planted]:
    """``weight-transposed`` of the head is ``head-layout``; of a square matrix, reinterpreted is transposed."""
    for role in ROLES:
        yield Planted("weight-transposed", (MADE_WITH[role],), detail=role)
    for role in (*ROLES, "output"):
        if role not in shape.square:
            yield Planted("weight-reinterpreted", (MADE_WITH[role],), detail=role)
    if shape.biases:
        yield Planted("bias-ignored", tuple(MADE_WITH[role] for role in shape.biases))
    yield Planted("gate-up-swapped", ("ffn_gate", "ffn_up"), detail="loaded")
    yield Planted("gate-up-swapped", ("ffn_swiglu",), detail="used")


def _norms(shape: Shape, clean: Trace) -> Iterator[Planted]:
    of_heads = ("Qcur_normed", "Kcur_normed") if shape.head_norms else ()
    for name in NORMS:
        for cause in NORM_FAULTS:
            yield Planted(cause, (MADE_WITH[name],), detail=name)
        if (eps := _showing_eps(shape, clean, (name,))) is not None:
            yield Planted("norm-eps", (MADE_WITH[name],), detail=f"{name} {eps:g}")
    if (eps := _showing_eps(shape, clean, NORMS)) is not None:
        yield Planted("norm-eps", ("attn_norm", *of_heads, "ffn_norm", "result_norm"), detail=f"all {eps:g}")
    if of_heads:
        yield Planted("q-norm-ignored", of_heads)


def _showing_eps(shape: Shape, clean: Trace, names: tuple[str, ...]) -> float | None:
    """The first wrong eps that changes the output of each of these norms, in some layer, by an NMSE of ``SHOWS``."""
    n = shape.n_layer
    inputs = {
        "attn_norm": ["embd", *(f"l_out-{i}" for i in range(n - 1))],
        "ffn_norm": [f"ffn_inp-{i}" for i in range(n)],
        "output_norm": [f"l_out-{n - 1}"],
    }
    squares = [[_values(clean, tap).double().square().mean(-1) for tap in inputs[name]] for name in names]  # [T] a tap

    def change(square: Tensor, eps: float) -> float:
        gain = ((square + shape.eps) / (square + eps)).sqrt()
        return float((gain - 1).square().mean())

    return next((eps for eps in EPSILONS if all(max(change(square, eps) for square in of) > SHOWS for of in squares)), None)


def _operations(shape: Shape) -> Iterator[Planted]:
    for cause, taps in ALWAYS.items():
        if cause != "head-dim-half" or shape.head_dim % 4 == 0:
            yield Planted(cause, taps)
    if 1 < shape.n_head_kv < shape.n_head:
        yield Planted("gqa-tile", ("kq_soft_max", "kqv_out"))
    for theta in THETAS:
        if not 0.5 < theta / shape.theta < 2:
            yield Planted("rope-theta", ("Qcur", "Kcur"), detail=f"{theta:g}")
    if shape.rope_factors:
        yield Planted("rope-factors-ignored", ("Qcur", "Kcur"))
    for cause, taps in IN_DECODING.items():
        yield Planted(cause, taps, detail="decoding")


def _flow(shape: Shape, clean: Trace) -> Iterator[Planted]:
    second = min(1, shape.n_layer - 1)
    yield Planted("layer-skipped", ("l_out",), (second,), "not-run")
    yield Planted("layer-skipped", ("l_out",), (second,), "dropped")
    yield Planted("layer-repeated", ("attn_norm", "ffn_inp"), (second,))
    stream = max(float(_values(clean, f"l_out-{i}").abs().max()) for i in range(shape.n_layer))
    yield Planted("activations-clipped", ("l_out",), detail=f"{stream / 2:.4g}")
    if max(float(_values(clean, f"ffn_swiglu-{i}").abs().max()) for i in range(shape.n_layer)) > F16_MAX:
        yield Planted("f16-overflow", ("ffn_swiglu",))


def _types(shape: Shape) -> Iterator[Planted]:
    """The mistakes of every block type in the file, with the taps and layers where tensors of that type are used."""
    for name in sorted(set(shape.types.values())):
        tensors = [tensor for tensor, type_name in shape.types.items() if type_name == name]
        used = {MADE_WITH[tensor.split(".")[-2]] for tensor in tensors if tensor.split(".")[-2] in MADE_WITH}
        if "token_embd.weight" in tensors and "output.weight" not in shape.types:
            used.add("result_output")
        layers = tuple(sorted({int(tensor.split(".")[1]) for tensor in tensors if tensor.startswith("blk.")}))
        some = 0 < len(layers) < shape.n_layer and not used & {"embd", "result_output"}
        for cause in mistakes_of(name):
            yield Planted(cause, tuple(tap for tap in MADE_WITH.values() if tap in used), layers if some else None, name)


def _values(trace: Trace, tap: str) -> Tensor:
    full = trace.find(tap, Full)
    if full is None:
        raise ValueError(f"{tap} is not in the trace of {trace.title}: expected whole tensors of every tap")
    return torch.as_tensor(full.values)
