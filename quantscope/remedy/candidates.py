"""What a recipe is chosen from: the presets of llama-quantize, rules of thumb, and assignments; each with its size and predicted KL.

    bytes = header + Σ padded(tensor bytes)            predicted KL = Σ kl[tensor][type]            bpw = 8 · Σ tensor bytes / Σ weights

Sizes are those of the file that llama-quantize writes.  Room for the keys by which quantscope says what a file was made from is left by the
search and by the rules of thumb, so that the file that is written stays below the target.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json import dumps

import numpy as np
from numpy.typing import NDArray

from quantscope.language import english, mark
from quantscope.qtypes import QTYPES, QuantType
from quantscope.quants import can_encode
from quantscope.recipes import PRESETS, Options, TensorShape, assign_types, fallback, is_quantizable, layer_order
from quantscope.remedy.export import FILE_TYPE, QUANTIZATION
from quantscope.remedy.gguf_file import padded, uint32, write_head
from quantscope.remedy.original import Original
from quantscope.remedy.search import Choices, smallest
from quantscope.remedy.sensitivity import Sensitivity, place, role
from quantscope.sources.base import RawTensor
from quantscope.weights import Weights

SEARCHED, PRESET, RULE = "search", "preset", "rule of thumb"
LADDER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")  # of the rules of thumb; where hardly any is allowed: those that are
UNIFORM = mark("uniform ({types})")
STEPS_UP = 2
REST = "Q8_0"  # of matrices that the forward does not read, so that nothing is known about them
FLOATS = ("F16",)
WIDEST = "MXFP4_MOE"  # no type or preset has a longer name
OTHER_KEYS = 1024  # [bytes] version, source, its SHA-256, and the importance matrix's

Types = Mapping[str, QuantType]  # canonical name → type
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """types: of every tensor.  n_bytes: of the file.  predicted: KL [nats].  here, elsewhere: measured KL of each chunk of the calibration
    text and of the other text, None where it was not measured."""

    name: str
    kind: str
    types: Types
    n_bytes: int
    bpw: float
    predicted: float
    here: Floats | None = field(default=None, repr=False)
    elsewhere: Floats | None = field(default=None, repr=False)

    @property
    def kl(self) -> tuple[float, float] | None:
        """Measured on the calibration text and on the other one."""
        return None if self.here is None or self.elsewhere is None else (float(self.here.mean()), float(self.elsewhere.mean()))


def default_types() -> list[QuantType]:
    """The types of llama-quantize's presets that can be written here, and F16."""
    names = dict.fromkeys([*(p.qtype.name for p in PRESETS.values() if p.qtype.is_quantized), *FLOATS])
    return [QTYPES[name] for name in names if can_encode(QTYPES[name])]


def unscored(model: Original, weights: Weights, types: Sequence[QuantType]) -> Sensitivity:
    """The matrices and types of a sensitivity, every KL 0: sizes need no more."""
    shapes = {n: weights.shape(n) for n in weights.stored_names() if is_quantizable(TensorShape(n, weights.shape(n)), model.facts.arch)}
    stored = {name: {t.name: fallback(t, shape[-1]).name for t in types} for name, shape in shapes.items()}
    nothing = {name: dict.fromkeys(row, 0.0) for name, row in stored.items()}
    return Sensitivity(nothing, stored, {}, shapes, tuple(t.name for t in types), 0, 0)


class Catalog:
    """The sizes and predictions of one model: what an assignment of types to its tensors weighs and costs."""

    def __init__(self, model: Original, found: Sensitivity, allowed: Collection[str]) -> None:
        self.model, self.found, self.allowed = model, found, tuple(allowed)
        self.shapes = [TensorShape(name, t.shape, t.qtype) for name, t in model.tensors.items()]
        self.n_elements = sum(t.n_elements for t in model.tensors.values())
        self._fixed = {t.name: _fixed(t, model) for t in self.shapes if t.name not in found.kl}
        self._kl = {name: {found.stored[name][asked]: kl for asked, kl in row.items()} for name, row in found.kl.items()}
        self._head = self._head_bytes()

    # ---- sizes

    def choices(self) -> Choices:
        """Of every matrix that the prediction knows: each allowed type, with padded bytes and predicted KL."""
        out: dict[str, dict[str, tuple[int, float]]] = {}
        for name, row in self.found.kl.items():
            stored = dict.fromkeys(self.found.stored[name][asked] for asked in row if asked in self.allowed)
            out[name] = {t: (self._padded(name, QTYPES[t]), self._kl[name][t]) for t in stored}
        return out

    def fixed_bytes(self) -> int:
        """The header, and the tensors that have no choice."""
        return self._head + sum(self._padded(name, t) for name, t in self._fixed.items())

    def bytes_of_bpw(self, bpw: float) -> int:
        """The size of a file with so many bits per weight."""
        return self._head + int(bpw * self.n_elements / 8 + 1e-6)

    def key_bytes(self) -> int:
        """At most what the keys take that a file made here has beside llama-quantize's: its recipe, above all."""
        types = {t.name: WIDEST for t in self.shapes if is_quantizable(t, self.model.facts.arch)}
        return len(dumps({"version": 1, "base": WIDEST, "types": types}, ensure_ascii=False).encode()) + OTHER_KEYS

    def original_bytes(self) -> int:
        """All tensors as they are."""
        return self._head + sum(self._padded(t.name, t.qtype) for t in self.shapes)

    def smallest(self) -> Candidate:
        """Every matrix in its smallest type."""
        return self.candidate("smallest", SEARCHED, {name: QTYPES[t] for name, t in smallest(self.choices()).types.items()})

    def candidate(self, name: str, kind: str, types: Types) -> Candidate:
        """types: of the matrices that have a choice, or of all tensors."""
        whole = {t.name: types.get(t.name, self._fixed.get(t.name, t.qtype)) for t in self.shapes}
        n_bytes = self._head + sum(self._padded(n, t) for n, t in whole.items())
        bits = 8 * sum(self._raw(n, t).n_bytes for n, t in whole.items())
        predicted = sum(row[whole[n].name] for n, row in self._kl.items())
        return Candidate(name, kind, whole, n_bytes, bits / self.n_elements, predicted)

    def _raw(self, name: str, qtype: QuantType) -> RawTensor:
        return RawTensor(name, qtype, self.model.tensors[name].shape)

    def _padded(self, name: str, qtype: QuantType) -> int:
        return padded(self._raw(name, qtype).n_bytes, self.model.alignment)

    def _head_bytes(self) -> int:
        out, tensors = io.BytesIO(), sorted(self.shapes, key=layer_order)
        pairs = self.model.pairs() | {QUANTIZATION: uint32(0), FILE_TYPE: uint32(0)}
        write_head(out, pairs, [RawTensor(t.name, t.qtype, t.shape) for t in tensors], self.model.alignment)
        return len(out.getbuffer())

    # ---- candidates

    def presets(self) -> list[Candidate]:
        """Every preset whose types are predicted, the smallest first, one of those that are the same for this model.

        With an importance matrix, as encoding is with one.
        """
        out: list[Candidate] = []
        for name in PRESETS:
            types = assign_types(name, self.shapes, self.model.facts, Options(imatrix=True))
            if all(types[n].name in row for n, row in self._kl.items()) and all(types != c.types for c in out):
                out.append(self.candidate(name, PRESET, types))
        return sorted(out, key=lambda c: c.n_bytes)

    def allows(self, c: Candidate) -> bool:
        """Whether all its matrices have allowed types, or those that take their place where blocks do not fill the rows."""
        return all(c.types[name].name in options for name, options in self.choices().items())

    def rules(self, most: int) -> Iterator[Candidate]:
        """The rules of thumb, each as large as fits into ``most`` bytes; those that fit nowhere are missing."""
        last = str(self.model.facts.n_layer - 1)
        raised: Sequence[tuple[str, Callable[[str], bool]]] = (
            (UNIFORM, lambda name: False),
            (mark("first and last layers high ({types})"), lambda name: place(name) in ("0", last)),
            (mark("attn_v and ffn_down high ({types})"), lambda name: role(name) in ("attn_v", "ffn_down", "ffn_down_exps")),
        )
        steps = [t for t in LADDER if t in self.allowed]
        if len(steps) < 2:
            steps = sorted((t for t in self.allowed if QTYPES[t].is_quantized), key=lambda t: QTYPES[t].bpw)
        for title, high in raised:
            sizes = [self._uniform(title, i, steps, high) for i in range(len(steps))]
            fitting = [c for c in sizes if c.n_bytes <= most]
            if fitting:
                yield fitting[-1]

    def _uniform(self, title: str, i: int, steps: Sequence[str], high: Callable[[str], bool]) -> Candidate:
        """Step i for all matrices, and two steps above it for the high ones."""
        low, up = QTYPES[steps[i]], QTYPES[steps[min(i + STEPS_UP, len(steps) - 1)]]
        types = {n: fallback(up if high(n) else low, self.found.shapes[n][-1]) for n in self.found.kl}
        what = f"{low}" if low == up or title == UNIFORM else f"{low}, {up}"
        return self.candidate(english(title, types=what), RULE, types)


def _fixed(t: TensorShape, model: Original) -> QuantType:
    """The type of a tensor that the prediction does not know: a norm keeps its own, an unused matrix gets REST."""
    if not is_quantizable(t, model.facts.arch) or t.qtype.is_quantized:
        return t.qtype
    return fallback(QTYPES[REST], t.shape[-1])
