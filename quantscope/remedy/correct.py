"""Correcting a quantization inside its format and size: layer by layer, every matrix rounded for the inputs it will really get.

    for each layer, in the order of the graph:  H = Σ x̂·x̂ᵀ,  C = Σ x·x̂ᵀ        x: its inputs in the original, x̂: in the corrected model
        W* = W·(C + λI)·(H + λI)⁻¹                                              what best gives the original's outputs from x̂
        Ŵ  = error feedback, descent, new scales, descent                       rounding.py, all under H

The embedding is rounded under the curvature of the predictions at its rows (curvature.py).

A correction is kept where two texts agree: the error of the matrix's outputs, Σ‖W·x − Ŵ·x̂‖², and the KL divergence of the whole model's
predictions with the later layers as they are in the original, must both be lower than with plain rounding on the calibration text *and* on
another.  What is not kept is reported.

Sources: GPTQ (arXiv:2210.17323); targets from the original's activations: QEP (Arai and Ichikawa 2025, arXiv:2504.09629), GPTAQ
(arXiv:2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantscope.metrics import kl_nats
from quantscope.model.forward import embed, head, layer, tables
from quantscope.model.ops import exact_matmul
from quantscope.model.taps import Tap, stem_of
from quantscope.model.wiring import readers
from quantscope.qtypes import QuantType
from quantscope.quants import decode, encode
from quantscope.quants.codes import LAYOUTS, Bytes
from quantscope.remedy.curvature import embedding_curvature
from quantscope.remedy.rounding import descended, error_feedback, output_error, rescaled
from quantscope.remedy.supported import check_remediable
from quantscope.weights import ALL_IDS, LazyTensors, OnTop, Weights, top_tensors

RIDGE = 0.05  # λ of the target: of the mean of diag H
GATE_CHUNKS = 4  # of each text, whose predictions are compared
CURVED_CHUNKS = 16  # of each text, for the curvature at the embedding
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Row:
    """One matrix.  errors: of its outputs with the correction over that with plain rounding; kl likewise [nats], (plain, corrected)."""

    name: str
    qtype: str
    kept: bool
    error: float
    error_elsewhere: float
    kl: tuple[float, float]
    kl_elsewhere: tuple[float, float]


@dataclass(frozen=True)
class Corrected:
    """The bytes of every quantized matrix that was looked at, corrected or plain, and what happened to each."""

    replacements: Mapping[str, Bytes]
    rows: tuple[Row, ...]
    importance: Mapping[str, Tensor] = field(default_factory=dict)


class Rounded(OnTop):
    """A WeightProvider: a file's tensors, some of them as the bytes of another type say."""

    def __init__(self, inner: Weights, types: Mapping[str, QuantType]) -> None:
        super().__init__(inner)
        self.file, self.types = inner, types
        self.bytes: dict[str, Bytes] = {}

    def get(self, name: str, ids: slice = ALL_IDS) -> Tensor:
        raw = self.bytes.get(name)
        if raw is None:
            return self.file.band(name, ids)
        return torch.from_numpy(decode(raw, self.types[name])).reshape(self.file.shape(name))[ids]

    def rows(self, name: str, ids: Tensor) -> Tensor:
        return self.get(name)[ids] if name in self.bytes else self.inner.rows(name, ids)

    def layer(self, i: int) -> Mapping[str, Tensor]:
        return LazyTensors(self.layer_names(i), self.get)

    def top(self, ids: slice = ALL_IDS) -> Mapping[str, Tensor]:
        return top_tensors(self.top_names(), ids, self.get)


@torch.no_grad()
def correct(
    original: Weights,
    types: Mapping[str, QuantType],
    calibration: Tensor,
    elsewhere: Tensor,
    step: Callable[[int, str], None] = lambda done, what: None,
) -> Corrected:
    """Correct the quantization of a model to these types.

    types: tensor → type; tensors that are not named stay as they are.  calibration, elsewhere: ids [C,T] of two texts, the second to see
    that what helps the first is no accident.  step: called with the number of layers done.  Raises what encoding raises.
    """
    check_remediable(original, "Correcting its rounding")
    job = _Job(original, Rounded(original, types), calibration, elsewhere)
    with exact_matmul():
        for i in range(original.config.n_layer):
            step(i, f"layer {i}")
            job.correct_layer(i)
        step(original.config.n_layer, "head")
        job.correct_head()
    return Corrected(job.rounded.bytes, tuple(job.rows), job.importance)


@dataclass
class _Sums:
    """Σ x·xᵀ of the original's inputs, Σ x·x̂ᵀ, Σ x̂·x̂ᵀ, float64 [in,in], and how many there were."""

    original: Tensor
    mixed: Tensor
    own: Tensor
    n: int


class _Job:
    """The hidden states of two texts in the original and in the corrected model, layer by layer."""

    def __init__(self, original: Weights, rounded: Rounded, calibration: Tensor, elsewhere: Tensor) -> None:
        self.original, self.rounded = original, rounded
        self.rows: list[Row] = []
        self.importance: dict[str, Tensor] = {}
        self.texts = [_Text(ids, original, rounded) for ids in (calibration, elsewhere)]
        plain = self._plain(EMBEDDING, None)
        if plain is not None and self.original.top_names()["output.weight"] != EMBEDDING:  # a tied one is the head too
            self._correct_embedding(plain, [embedding_curvature(ids[:CURVED_CHUNKS], original) for ids in (calibration, elsewhere)])
        for text in self.texts:
            text.start()

    def _correct_embedding(self, plain: Bytes, curvature: Sequence[Tensor]) -> None:
        """Rows rounded under the curvature of the predictions, which has the part of the inputs' products."""
        w, qtype = self.original.get(EMBEDDING).double(), self.rounded.types[EMBEDDING]
        before = [text.kl_of_embedding() for text in self.texts]
        new = _improved(w, curvature[0], qtype)
        self.rounded.bytes[EMBEDDING] = new
        after = [text.kl_of_embedding() for text in self.texts]
        ratios = [output_error(w, new, c, qtype) / (output_error(w, plain, c, qtype) or 1.0) for c in curvature]
        self._keep(EMBEDDING, plain, ratios, before, after)

    def _keep(self, name: str, plain: Bytes, ratios: Sequence[float], before: Sequence[float], after: Sequence[float]) -> None:
        """Keep a correction that helped on both texts, and note what happened."""
        kept = all(r < 1 for r in ratios) and all(a < b for a, b in zip(after, before, strict=True))
        if not kept:
            self.rounded.bytes[name] = plain
        qtype = self.rounded.types[name].name
        self.rows.append(Row(name, qtype, kept, ratios[0], ratios[1], (before[0], after[0]), (before[1], after[1])))

    def _plain(self, name: str, importance: Tensor | None) -> Bytes | None:
        """Round a tensor as llama-quantize does; None where it stays as it is."""
        qtype = self.rounded.types.get(name)
        if qtype is None or qtype.name not in LAYOUTS:
            return None
        w = self.original.get(name)
        raw = encode(w.numpy(), qtype, w.shape[-1], importance=None if importance is None else importance.float().numpy())
        self.rounded.bytes[name] = raw
        return raw

    def correct_layer(self, i: int) -> None:
        for tap, names in readers(self.original.config, i, self.original.layer_names(i)).items():
            matrices = [f"blk.{i}.{name}.weight" for name in names]
            if any(self._quantized(name) for name in matrices):
                sums = [text.sums(i, stem_of(tap)) for text in self.texts]
                for name in matrices:
                    self._correct(name, i, sums)
        for text in self.texts:
            text.advance(i)

    def correct_head(self) -> None:
        name = self.original.top_names()["output.weight"]
        if name == HEAD and self._quantized(name):
            self._correct(
                name, self.original.config.n_layer, [text.sums(self.original.config.n_layer, "result_norm") for text in self.texts]
            )

    def _quantized(self, name: str) -> bool:
        qtype = self.rounded.types.get(name)
        return qtype is not None and qtype.name in LAYOUTS

    def _correct(self, name: str, i: int, sums: Sequence[_Sums]) -> None:
        here = sums[0]
        importance = here.original.diagonal() / here.n
        plain = self._plain(name, None if name == HEAD else importance)
        if plain is None:
            return
        self.importance[name] = importance.float()
        w, qtype = self.original.get(name).double(), self.rounded.types[name]
        before = [text.kl(i) for text in self.texts]
        errors = [output_errors(w, plain, qtype, s) for s in sums]
        new = _corrected(w, here, qtype)
        self.rounded.bytes[name] = new
        after = [text.kl(i) for text in self.texts]
        ratios = [output_errors(w, new, qtype, s) / e if e else 1.0 for s, e in zip(sums, errors, strict=True)]
        self._keep(name, plain, ratios, before, after)


def _corrected(w: Tensor, s: _Sums, qtype: QuantType) -> Bytes:
    """The bytes of the target W* under H."""
    ridge = RIDGE * s.own.diagonal().mean() * torch.eye(len(s.own), dtype=torch.float64)
    target = torch.linalg.solve(s.own + ridge, (w @ (s.mixed + ridge)).T).T  # H is symmetric
    return _improved(target, s.own, qtype)


def _improved(target: Tensor, gram: Tensor, qtype: QuantType) -> Bytes:
    raw = error_feedback(target, gram, qtype)
    for improve in (descended, rescaled, descended):
        raw = improve(target, raw, gram, qtype)
    return raw


def output_errors(w: Tensor, raw: Bytes, qtype: QuantType, s: _Sums) -> float:
    """Σ‖W·x − Ŵ·x̂‖² = tr(W·Σxxᵀ·Wᵀ) − 2·tr(W·Σxx̂ᵀ·Ŵᵀ) + tr(Ŵ·Σx̂x̂ᵀ·Ŵᵀ)."""
    v = torch.from_numpy(decode(raw, qtype)).reshape(w.shape).double()
    return float(((w @ s.original) * w).sum() - 2 * ((w @ s.mixed) * v).sum() + ((v @ s.own) * v).sum())


class _Text:
    """One text in both models: the hidden state before the layer at work, a chunk at a time."""

    def __init__(self, ids: Tensor, original: Weights, rounded: Rounded) -> None:
        self.original, self.rounded = original, rounded
        self.chunks = torch.split(ids, 1)
        self.before = [embed(chunk, original) for chunk in self.chunks]  # [1,T,E] each
        self.own: list[Tensor] = []
        self.targets = [self._from(0, h, original) for h in self.before[:GATE_CHUNKS]]  # the original's logits

    def start(self) -> None:
        """From the embedding as it will be."""
        self.own = [embed(chunk, self.rounded) for chunk in self.chunks]

    def kl_of_embedding(self) -> float:
        """KL(original ‖ the rounded embedding, all else original) [nats]."""
        made = [self._from(0, embed(chunk, self.rounded), self.original) for chunk in self.chunks[:GATE_CHUNKS]]
        return sum(float(kl_nats(a[0], b[0]).mean()) for a, b in zip(self.targets, made, strict=True)) / len(made)

    def sums(self, i: int, tap: str) -> _Sums:
        """Over all inputs that a tap of layer i (n_layer: of the head) has in both models."""
        found: _Sums | None = None
        for x, y in zip(self._inputs(i, tap, self.before, self.original), self._inputs(i, tap, self.own, self.rounded), strict=True):
            parts = x.T @ x, x.T @ y, y.T @ y
            if found is None:
                found = _Sums(*parts, len(x))
            else:
                for whole, part in zip((found.original, found.mixed, found.own), parts, strict=True):
                    whole += part
                found.n += len(x)
        assert found is not None
        return found

    def _inputs(self, i: int, tap: str, hidden: Sequence[Tensor], w: Weights | Rounded) -> Iterator[Tensor]:
        """[T,channels] float64 of each chunk."""
        for h in hidden:
            seen = _One(tap)
            if i < w.config.n_layer:
                layer(h, w.layer(i), i, w.config, tables(h, w), seen)
            else:
                head(h, w.top(), w.config, seen)
            yield seen.value[0].double()

    def advance(self, i: int) -> None:
        """Past layer i."""
        for hidden, w in ((self.before, self.original), (self.own, self.rounded)):
            for k, h in enumerate(hidden):
                hidden[k] = layer(h, w.layer(i), i, w.config, tables(h, w))

    def kl(self, i: int) -> float:
        """KL(original ‖ corrected up to layer i, original after it), the mean over the gate's chunks [nats]."""
        total = 0.0
        for h, target in zip(self.own, self.targets, strict=False):
            total += float(kl_nats(target[0], self._through(i, h)[0]).mean())
        return total / len(self.targets)

    def _through(self, i: int, h: Tensor) -> Tensor:
        """Logits from the state before layer i: this layer as corrected, the others as in the original."""
        if i == self.original.config.n_layer:
            return head(h, self.rounded.top(), self.original.config)
        h = layer(h, self.rounded.layer(i), i, self.original.config, tables(h, self.original))
        return self._from(i + 1, h, self.original)

    def _from(self, i: int, h: Tensor, w: Weights) -> Tensor:
        rope = tables(h, w)
        for k in range(i, w.config.n_layer):
            h = layer(h, w.layer(k), k, w.config, rope)
        return head(h, w.top(), w.config)


class _One(Tap):
    """A tap that keeps one tensor."""

    def __init__(self, stem: str) -> None:
        self._stem = stem
        self.value = torch.empty(0)

    def wants(self, name: str) -> bool:
        return stem_of(name) == self._stem

    def __call__(self, name: str, x: Tensor, /) -> None:
        if self.wants(name):
            self.value = x
