"""The same tensors in two files: do they differ by more than their types explain, where, and how?

    NMSE = Σ (a − b)² / Σ a²        explained:  Σ (a − b)² ≤ FACTOR · Σ (e_A + e_B)

e_A is the squared error that file A's type makes on these values, e_B that of file B's.  Neither file need be the original, and values
that lie on a type's grid already would be encoded without error, so the prediction encodes *dithered* values: in each block, whichever
file has less energy there (garbage must not excuse itself), plus normal noise of DITHER times the block's RMS.  Types without an encoder
take their error from ``MEASURED``.  Then the blocks: one that stands out against its own prediction is corrupt, however small
the error of the whole tensor is.  What is left unexplained goes to ``weight_causes``.

A tensor is read in bands of rows; typical errors come from rows spread over the tensor, and only blocks that exceed
these are encoded one by one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantscope.qtypes import QuantType
from quantscope.quants import can_encode, decode, encode
from quantscope.weight_causes import Cause, Stored, causes
from quantscope.weight_scales import Pair, Scales, found_scales
from quantscope.weights import ALL_IDS, Weights

Floats = NDArray[np.float32]
Sums = NDArray[np.float64]
Verdict = Literal["equal", "explained", "rescaled", "re-tuned", "blocks", "differs", "shape", "only in A", "only in B"]

FACTOR = 4.0  # 2 is the largest |e_A − e_B|² against |e_A|² + |e_B|²; 2 more for importance matrices and other encoders
CORRECTED = (
    4.0  # times that, of a file that `quantscope quantize --correct` wrote: it moves values for the outputs' sake (docs/measured.md)
)
BLOCK_FACTOR = 12.0  # the same for one block; of llama-quantize's own files no tensor exceeded 1.0 and no block 3.3 (docs/measured.md)
SCREEN = 3.0  # a block above this many typical errors is encoded itself
DITHER = 0.5  # of a block's RMS: more than half a step of the coarsest types, so that a grid is left
ROUNDING = 1e-14  # NMSE of values rounded once more to float32, about 2⁻⁴⁸ · 4
MOST = 0.5  # where the types allow a larger NMSE than this, the NMSE alone cannot tell them from unrelated values:
COARSE = 0.4  # then the cosine must be at least this; unrelated values have about 0, TQ1_0 and its original 0.57
RETUNED = 0.9  # cosine of a norm weight with what it was
CORRUPT = 0.2  # when more of the blocks stand out, the whole tensor is wrong
BAND = 1 << 22  # [elements] read at a time
LARGEST_HALF = 65504.0  # dithered values stay finite in F16
SAMPLE = 1 << 16  # [elements] from which the typical error is taken

# NMSE of the types without an encoder here: the largest that ggml's own makes of normal values and of a trained Llama's matrices
# (rounded up; importance matrix of ones where ggml wants one).  Q8_1 as Q8_0: it is no type of files.
# fmt: off
MEASURED: dict[str, float] = {
    "Q8_1": 3.1e-5, "Q8_K": 5.2e-5, "IQ1_S": 0.25, "IQ1_M": 0.37, "IQ2_XXS": 0.125, "IQ2_XS": 0.096, "IQ2_S": 0.073, "IQ3_XXS": 0.047,
    "IQ3_S": 0.03, "IQ4_NL": 0.006, "IQ4_XS": 0.006, "TQ1_0": 0.68, "TQ2_0": 0.68, "MXFP4": 0.0135, "NVFP4": 0.0093, "Q1_0": 0.37,
    "Q2_0": 0.54,
}
# fmt: on


@dataclass(frozen=True)
class Block:
    """A block that stands out: where it begins, its own NMSE, and its error as a multiple of the predicted one (∞: zero in one file)."""

    row: int
    column: int
    size: int  # [elements]
    nmse: float
    times: float


@dataclass(frozen=True)
class TensorDiff:
    """One tensor in two files.  ``expected``: the NMSE that FACTOR times both types' errors allow; ``cosine`` of all values."""

    name: str
    shape_a: tuple[int, ...] | None
    type_a: str
    shape_b: tuple[int, ...] | None
    type_b: str
    verdict: Verdict
    nmse: float = math.nan
    cosine: float = math.nan
    expected: float = math.nan
    n_blocks: int = 0
    bad_blocks: int = 0
    worst: Block | None = None
    causes: tuple[Cause, ...] = ()

    @property
    def ok(self) -> bool:
        return self.verdict in ("equal", "explained", "rescaled", "re-tuned")


@dataclass(frozen=True)
class WeightComparison:
    """All tensors of two files in the order of the graph, and tensors that the forward does not read."""

    path_a: str
    path_b: str
    rows: tuple[TensorDiff, ...]
    unused_a: tuple[str, ...] = ()
    unused_b: tuple[str, ...] = ()
    corrected: tuple[str, ...] = ()  # files that say they were corrected

    @property
    def unexplained(self) -> tuple[TensorDiff, ...]:
        return tuple(row for row in self.rows if not row.ok)


def compare_weights(a: Weights, b: Weights, names: Sequence[str] | None = None) -> WeightComparison:
    """Compare the tensors of two files; names: only these.

    Raises NonFiniteError where a file holds a NaN or an infinity.
    """
    every = list(dict.fromkeys([*a.names(), *b.names()]))
    corrected = tuple(str(w.source.path) for w in (a, b) if _says_corrected(w))
    more = CORRECTED if corrected else 1.0
    rows = [_tensor(a, b, name, more) for name in every if names is None or name in names]
    rows = _without_scales(a, b, _without_retuned(rows, [*_retuned(a), *_retuned(b)]), more)
    return WeightComparison(str(a.source.path), str(b.source.path), tuple(rows), a.unused, b.unused, corrected)


def _account(w: Weights) -> dict[str, Any]:
    """The file's own account of its making."""
    try:
        found = json.loads(str(w.source.metadata.get("quantscope.recipe", "{}")))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _says_corrected(w: Weights) -> bool:
    return "correct" in _account(w)


def _retuned(w: Weights) -> list[str]:
    """Norm weights and biases that were changed for the outputs' sake."""
    return [name for key in ("norms", "bias") for name in _account(w).get(key, [])]


def _without_retuned(rows: Sequence[TensorDiff], names: Collection[str]) -> list[TensorDiff]:
    """A re-tuned norm stays near what it was; a bias is new, or was changed as well."""
    return [
        replace(row, verdict="re-tuned", causes=())
        if row.name in names and not row.ok and (row.name.endswith(".bias") or row.cosine > RETUNED)
        else row
        for row in rows
    ]


def _without_scales(a: Weights, b: Weights, rows: Sequence[TensorDiff], more: float) -> list[TensorDiff]:
    """Tensors that agree once channel scales that cancel are undone are "rescaled"."""

    def pair(name: str) -> Pair | None:
        left, right = _stored(a, name), _stored(b, name)
        return None if left is None or right is None or left.shape != right.shape else (left, right)

    scales = found_scales(a, pair, {row.name for row in rows if row.verdict in ("differs", "blocks", "re-tuned")})
    return [_rescaled(row, pair(row.name), scales, more) if row.name in scales else row for row in rows]


def _rescaled(row: TensorDiff, pair: Pair | None, scales: Scales, more: float) -> TensorDiff:
    if pair is None or row.ok:
        return row
    m = _Measured(_Scaled(pair[0].weights, pair[0].name, scales), pair[1], more)
    return replace(row, verdict="rescaled", nmse=m.nmse, cosine=m.cosine, causes=()) if m.verdict in ("equal", "explained") else row


@dataclass(frozen=True)
class _Scaled(Stored):
    """A's tensor with its factors."""

    scales: Scales

    def some(self, rows: Tensor) -> Tensor:
        return self.scales.applied(self.name, super().some(rows), rows)

    def band(self, rows: slice = ALL_IDS) -> Tensor:
        return self.scales.applied(self.name, super().band(rows), rows)


def _tensor(a: Weights, b: Weights, name: str, more: float = 1.0) -> TensorDiff:
    left, right = _stored(a, name), _stored(b, name)
    if left is None or right is None or left.shape != right.shape:
        verdict: Verdict = "only in B" if left is None else "only in A" if right is None else "shape"
        return TensorDiff(name, *_facts(left), *_facts(right), verdict)
    m = _Measured(left, right, more)
    found = causes(left, right, m.bound) if m.verdict == "differs" else ()
    for side in (left, right):
        side.weights.let_go([side.name])
    n_bad, facts = int(m.bad.sum()), (*_facts(left), *_facts(right))
    return TensorDiff(name, *facts, m.verdict, m.nmse, m.cosine, m.bound, m.error.size, n_bad, m.worst(), found)


def _stored(w: Weights, name: str) -> Stored | None:
    """The tensor under its canonical name; the head of a tied model is its embedding."""
    own = w.top_names().get(name, name)
    return Stored(w, own) if own in w.names() else None


def _facts(side: Stored | None) -> tuple[tuple[int, ...] | None, str]:
    return (None, "") if side is None else (side.shape, side.qtype.name)


class _Measured:
    """Sums of every block of a tensor, [n_rows, blocks of a row] float64, and what follows from them."""

    def __init__(self, a: Stored, b: Stored, more: float = 1.0) -> None:
        """more: times what the types explain that is allowed."""
        self._more = more
        self.types = (a.qtype, b.qtype)
        n, m = _matrix(a.shape)
        widest = max(32, *(t.block_size for t in self.types))
        self.size = m if m % widest else widest
        sample = torch.arange(0, n, max(1, n * m // SAMPLE))
        self.typical = self._typical(*(s.some(sample) if n > 1 else s.band() for s in (a, b)))
        step = max(1, BAND // m)
        parts = [self._band(a.band(rows), b.band(rows)) for rows in (slice(i, i + step) for i in range(0, n, step))]
        self.error, self.allowed, self.energy, self.energy_b, self.dot = (np.concatenate(p) for p in zip(*parts, strict=True))
        self.bad = self.error > BLOCK_FACTOR * self.allowed

    def _blocks(self, product: Sums) -> Sums:
        sums: Sums = product.reshape(len(product), -1, self.size).sum(-1)
        return sums

    def _typical(self, x: Tensor, y: Tensor) -> float:
        """NMSE that the two types make on some rows together."""
        low, energy = self._lower(x.numpy(), y.numpy())
        total = float(energy.sum())
        return self._more * float(self._type_errors(low, energy).sum()) / total if total else 0.0

    def _lower(self, x: Floats, y: Floats) -> tuple[Floats, Sums]:
        """Each block of whichever file has less energy there, [n,m], and that energy."""
        energies = [self._blocks(np.square(v, dtype=np.float64)) for v in (x, y)]
        first = np.repeat(energies[0] <= energies[1], self.size, axis=1)
        return np.where(first, x, y), np.minimum(*energies)

    def _type_errors(self, low: Floats, energy: Sums) -> Sums:
        """Σ over both types of the squared error each makes on every block of the dithered values."""
        noise = np.random.default_rng(0).standard_normal(low.shape, np.float32)
        spread = np.repeat(DITHER * np.sqrt(energy / self.size), self.size, axis=1).astype(np.float32)
        values = np.clip(low + noise * spread, -LARGEST_HALF, LARGEST_HALF)
        return sum((self._type_error(values, energy, t) for t in self.types), ROUNDING * energy)

    def _type_error(self, values: Floats, energy: Sums, qtype: QuantType) -> Sums:
        if not can_encode(qtype):
            return MEASURED[qtype.name] * energy
        stored = decode(encode(values, qtype, values.shape[1]), qtype).reshape(values.shape)
        return self._blocks(np.square(np.subtract(values, stored, dtype=np.float64)))

    def _band(self, a: Tensor, b: Tensor) -> tuple[Sums, ...]:
        x, y = a.numpy(), b.numpy()
        energies = [self._blocks(np.square(v, dtype=np.float64)) for v in (x, y)]
        error = self._blocks(np.square(np.subtract(x, y, dtype=np.float64)))
        allowed = self.typical * np.minimum(*energies)
        high = error > SCREEN * allowed
        rows = high.any(axis=1)
        if 0 < high.sum() <= high.size / 2:  # when most blocks are wrong, it is not the blocks
            allowed[rows] = np.maximum(allowed[rows], self._more * self._type_errors(*self._lower(x[rows], y[rows])))
        return error, allowed, *energies, self._blocks(np.multiply(x, y, dtype=np.float64))

    @property
    def nmse(self) -> float:
        return _over(float(self.error.sum()), float(self.energy.sum()))

    @property
    def cosine(self) -> float:
        lengths = math.sqrt(float(self.energy.sum()) * float(self.energy_b.sum()))
        return float(self.dot.sum()) / lengths if lengths else math.nan

    @property
    def bound(self) -> float:
        """The NMSE that the types explain; of the blocks with less energy, as ``allowed`` is."""
        return FACTOR * _over(float(self.allowed.sum()), float(np.minimum(self.energy, self.energy_b).sum()))

    @property
    def verdict(self) -> Verdict:
        good = ~self.bad
        within = float(self.error[good].sum()) <= FACTOR * float(self.allowed[good].sum())
        if not self.error.any():
            return "equal"
        if self.bad.any():
            return "blocks" if within and self.bad.mean() <= CORRUPT else "differs"
        return "explained" if within and (self.bound <= MOST or self.cosine >= COARSE) else "differs"

    def worst(self) -> Block | None:
        """The bad block with the largest error for its prediction."""
        if not self.bad.any():
            return None
        times = np.divide(self.error, self.allowed, out=np.full_like(self.error, math.inf), where=self.allowed > 0)
        times[~self.bad] = 0
        row, column = (int(i) for i in np.unravel_index(int(times.argmax()), times.shape))
        nmse = _over(float(self.error[row, column]), float(self.energy[row, column]))
        return Block(row, column * self.size, self.size, nmse, float(times[row, column]))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and their length; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _over(error: float, energy: float) -> float:
    return error / energy if energy else math.inf if error else 0.0
