"""Correcting a quantization inside its format: layer by layer, every matrix for the inputs it will really get.

    equalize    channel scales that the model does not notice, before anything is rounded         equalize.py
    scales      the float16 scales of plainly rounded blocks, for the outputs                      rounding.py
    rounding    error feedback, descent, new scales, descent, toward the target W*                 rounding.py, refit.py
    norms       the norm weight before the matrices, once they are rounded                         refit.py
    bias        the mean error of the outputs, as a tensor of its own where llama.cpp loads one    refit.py

All sums are over the inputs that a matrix has in the *already corrected* model.  The embedding is rounded under the curvature of the
predictions at its rows (curvature.py).

A correction is kept where two texts agree: the error of the outputs, Σ‖W·x − Ŵ·x̂‖², and the KL divergence of the whole model's
predictions with the later layers as they are in the original, must both be lower than without it on the calibration text *and* on
another.  What is not kept is reported.

Sources: GPTQ (arXiv:2210.17323) and those of the modules named above.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantscope.metrics import nmse
from quantscope.model.ops import exact_matmul
from quantscope.model.taps import MAKERS, stem_of
from quantscope.model.wiring import layer_wiring, readers
from quantscope.qtypes import QuantType
from quantscope.quants import encode
from quantscope.quants.codes import LAYOUTS, Bytes
from quantscope.remedy.curvature import embedding_curvature
from quantscope.remedy.equalize import POWERS, Equalized, of_maker, scales
from quantscope.remedy.experts import STACKS, Improve, Inputs, Stack, corrected_stack, importance_of, plain_stack
from quantscope.remedy.refit import Product, Sums, bias, gain, product_error, target
from quantscope.remedy.rounding import descended, error_feedback, output_error, rescaled
from quantscope.remedy.supported import check_remediable
from quantscope.remedy.two_models import Rounded, Text
from quantscope.weights import Weights

METHODS = ("equalize", "scales", "rounding", "norms", "bias")
# correction of a matrix's values → how it is made; where both are wanted the first, which has the other in it
HOW: dict[str, Improve] = {"rounding": lambda goal, plain, gram, qtype: _improved(goal, gram, qtype), "scales": rescaled}
CURVED_CHUNKS = 16  # of each text, for the curvature at the embedding
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
NORMS = {"attn_norm": "attn_norm.weight", "ffn_norm": "ffn_norm.weight", "result_norm": "output_norm.weight"}  # tap → its weight
QKV = frozenset({"attn_q", "attn_k", "attn_v"})
# architecture → matrices whose bias llama.cpp adds (create_tensor_qkv and src/models/*.cpp); it refuses files with others
BIASES = {
    "llama": QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    "qwen2": QKV,
    "qwen3": QKV,
}
SAME = 1e-9  # NMSE of a layer's output up to which an equalized layer is the same function


@dataclass(frozen=True)
class Row:
    """One correction of one tensor.  error: of the outputs with it over that without; kl likewise [nats], (without, with)."""

    name: str
    qtype: str
    kept: bool
    error: float
    error_elsewhere: float
    kl: tuple[float, float]
    kl_elsewhere: tuple[float, float]
    correction: str = "rounding"


@dataclass(frozen=True)
class Corrected:
    """What the new file has in place of the original's tensors, and what happened to each.

    replacements: bytes of every quantized matrix that was looked at, corrected or plain.  floats: values of tensors that were changed and
    are not quantized here.  extra: new tensors (biases).  notes: what could not be tried.
    """

    replacements: Mapping[str, Bytes]
    rows: tuple[Row, ...]
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    floats: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def arrays(self) -> dict[str, Mapping[str, Any]]:
        """The keyword arguments with which ``export`` writes them."""
        return {
            "replacements": self.replacements,
            "floats": {name: x.numpy() for name, x in self.floats.items()},
            "extra": {name: x.numpy() for name, x in self.extra.items()},
        }


@torch.no_grad()
def correct(
    original: Weights,
    types: Mapping[str, QuantType],
    calibration: Tensor,
    elsewhere: Tensor,
    step: Callable[[int, str], None] = lambda done, what: None,
    methods: Collection[str] = ("rounding",),
) -> Corrected:
    """Correct the quantization of a model to these types.

    types: tensor → type; tensors that are not named stay as they are.  calibration, elsewhere: ids [C,T] of two texts, the second to see
    that what helps the first is no accident.  step: called with the number of layers done.  methods: some of METHODS.  Raises what encoding
    raises.
    """
    check_remediable(original, "Correcting its rounding")
    job = _Job(original, types, calibration, elsewhere, frozenset(methods))
    with exact_matmul():
        job.correct_embedding()
        for i in range(original.config.n_layer):
            step(i, f"layer {i}")
            job.correct_layer(i)
        step(original.config.n_layer, "head")
        job.correct_head()
    return job.result()


class _Job:
    """The hidden states of two texts in the original and in the corrected model, layer by layer."""

    def __init__(
        self, file: Weights, types: Mapping[str, QuantType], calibration: Tensor, elsewhere: Tensor, methods: frozenset[str]
    ) -> None:
        self.original = Equalized(file)
        self.rounded = Rounded(self.original, types)
        self.methods, self.config = methods, file.config
        self.how = next((method for method in HOW if method in methods), None)
        self.ids = calibration, elsewhere
        self.rows: list[Row] = []
        self.importance: dict[str, Tensor] = {}
        self.notes: list[str] = []
        if "bias" in methods and self.config.arch not in BIASES:
            self.notes.append(f"no bias was corrected: llama.cpp loads none with the architecture {self.config.arch}.")
        if self.config.experts is not None and {"norms", "equalize"} & methods:
            self.notes.append("the norms before experts were neither re-tuned nor equalized: not every token goes through what reads them.")
        self.texts = [Text(ids, self.original, self.rounded) for ids in self.ids]

    def result(self) -> Corrected:
        """What the job has come to."""
        values = {name: self.original.get(name) for name in self.original.changed() if name not in self.rounded.bytes}
        values |= self.rounded.floats
        there = set(self.original.file.names())
        return Corrected(
            self.rounded.bytes,
            tuple(self.rows),
            self.importance,
            {name: x for name, x in values.items() if name in there},
            {name: x for name, x in values.items() if name not in there},
            tuple(self.notes),
        )

    # ---- what is corrected, in the order of the graph

    def correct_embedding(self) -> None:
        """Rows rounded under the curvature of the predictions, which has the part of the inputs' products."""
        plain = self._plain(EMBEDDING, None)
        if plain is not None and "rounding" in self.methods and self.original.top_names()["output.weight"] != EMBEDDING:
            curvature = [embedding_curvature(ids[:CURVED_CHUNKS], self.original.file) for ids in self.ids]
            w, qtype = self.original.get(EMBEDDING).double(), self.rounded.types[EMBEDDING]
            before = [text.kl_of_embedding() for text in self.texts]
            new = _improved(w, curvature[0], qtype)
            self.rounded.bytes[EMBEDDING] = new
            after = [text.kl_of_embedding() for text in self.texts]
            ratios = [output_error(w, new, c, qtype) / (output_error(w, plain, c, qtype) or 1.0) for c in curvature]
            if not self._judged(EMBEDDING, "rounding", ratios, before, after):
                self.rounded.bytes[EMBEDDING] = plain
        for text in self.texts:
            text.start()

    def correct_layer(self, i: int) -> None:
        if "equalize" in self.methods:
            for tap in MAKERS:
                if tap != self._read_by_experts(i):
                    self._equalize(i, tap)
        for tap, names in readers(self.config, i, self.original.layer_names(i)).items():
            stem = stem_of(tap)
            self._correct_readers(i, stem, [f"blk.{i}.{name}.weight" for name in names], f"blk.{i}.{NORMS.get(stem)}")
        there = self.original.layer_names(i)
        for stacks in STACKS:
            self._correct_experts(i, [stem for stem in stacks if self._quantized(there.get(f"{stem}.weight", ""))])
        for text in self.texts:
            text.advance(i)

    def _read_by_experts(self, i: int) -> str | None:
        """The tap that the experts of a layer read."""
        return layer_wiring(self.config, i, self.original.layer_names(i))["ffn_moe_logits"][0] if self.config.routes(i) else None

    def _correct_experts(self, i: int, stems: Sequence[str]) -> None:
        """The stacks that read the same inputs."""
        if not stems:
            return
        original = self.texts[0].expert_inputs(i, stems[0], own=False)
        own = [text.expert_inputs(i, stems[0], own=True) for text in self.texts]
        for stem in stems:
            self._round_experts(i, f"blk.{i}.{stem}.weight", original, own)

    def correct_head(self) -> None:
        name = self.original.top_names()["output.weight"]
        if name == HEAD:  # a tied one is rounded already, as the embedding
            self._correct_readers(self.config.n_layer, "result_norm", [name], NORMS["result_norm"])

    def _correct_readers(self, i: int, tap: str, matrices: Sequence[str], norm: str) -> None:
        """The matrices that read a tap, then the norm before them, then their biases."""
        quantized = [name for name in matrices if self._quantized(name)]
        if not quantized:
            return
        sums: Sequence[Sums] = [text.sums(i, tap) for text in self.texts]
        for name in quantized:
            self._round(i, name, sums)
        retunes = "norms" in self.methods and tap in NORMS and not (i < self.config.n_layer and tap == self._read_by_experts(i))
        if retunes and f"{norm.removesuffix('weight')}bias" not in self.original.file.names():
            sums = self._retune(i, norm, [name for name in matrices if name in self.original.file.names()], sums)
        if "bias" in self.methods:
            for name in quantized:
                if name.split(".")[-2] in BIASES.get(self.config.arch, frozenset()):
                    self._add_bias(i, name, sums)

    def _quantized(self, name: str) -> bool:
        qtype = self.rounded.types.get(name)
        return qtype is not None and qtype.name in LAYOUTS

    def _plain(self, name: str, importance: Tensor | None) -> Bytes | None:
        """Round a tensor as llama-quantize does; None where it stays as it is."""
        if not self._quantized(name):
            return None
        w = self.original.get(name)
        weights = None if importance is None else importance.float().numpy()
        raw = encode(w.numpy(), self.rounded.types[name], w.shape[-1], importance=weights)
        self.rounded.bytes[name] = raw
        return raw

    # ---- the corrections, each tried and judged

    def _round(self, i: int, name: str, sums: Sequence[Sums]) -> None:
        here, qtype = sums[0], self.rounded.types[name]
        plain = self._plain(name, None if name == HEAD else here.importance)
        assert plain is not None
        self.importance[name] = here.importance.float()
        if self.how is None:
            return
        new = HOW[self.how](target(self.original.get(name).double(), here), plain, here.own, qtype)

        def apply(to: Bytes) -> None:
            self.rounded.bytes[name] = to

        self._try(i, name, self.how, lambda: [self._error([name], s) for s in sums], lambda: apply(new), lambda: apply(plain))

    def _round_experts(self, i: int, name: str, original: Inputs, own: Sequence[Inputs]) -> None:
        n_expert, _, n_in = self.original.shape(name)
        qtype, importance = self.rounded.types[name], importance_of(original, n_expert, n_in)

        def matrix(e: int) -> Tensor:
            return self.original.band(name, slice(e, e + 1))[0]

        raw = plain_stack(matrix, importance, qtype)
        self.importance[name] = importance.flatten()
        self.rounded.bytes[name] = raw.reshape(-1)
        if self.how is None:
            return
        before, after = corrected_stack(matrix, raw, own, qtype, HOW[self.how])
        now = before

        def apply(to: Stack) -> None:
            nonlocal now
            now, self.rounded.bytes[name] = to, to.raw.reshape(-1)

        self._try(i, name, self.how, lambda: list(now.errors), lambda: apply(after), lambda: apply(before))

    def _retune(self, i: int, norm: str, readers: Sequence[str], sums: Sequence[Sums]) -> Sequence[Sums]:
        """The norm weight times what best gives the readers' outputs; the sums as they are then."""
        g, former = gain(self._products(readers), sums[0]), self.rounded.get(norm)
        one = torch.ones_like(g)
        scaled = [s.scaled(one, g) for s in sums]
        now = list(sums)

        def apply() -> None:
            self.rounded.floats[norm] = (former.double() * g).float()
            now[:] = scaled

        def undo() -> None:
            del self.rounded.floats[norm]
            now[:] = sums

        self._try(i, norm, "norms", lambda: [self._error(readers, s) for s in now], apply, undo)
        return now

    def _add_bias(self, i: int, name: str, sums: Sequence[Sums]) -> None:
        at = f"{name.removesuffix('weight')}bias"
        missing = bias(self._products([name])[0], sums[0])
        former = self.original.get(at) if at in self.original.file.names() else torch.zeros(len(missing))
        added: list[Tensor] = []

        def apply() -> None:
            self.rounded.floats[at] = (former.double() + missing).float()
            added.append(missing)

        def undo() -> None:
            del self.rounded.floats[at]

        self._try(i, at, "bias", lambda: [self._error([name], s, *added) for s in sums], apply, undo)

    def _equalize(self, i: int, tap: str) -> None:
        """The channels of a tap, by the scales with which plain rounding errs least; everything of the layer is unrounded yet."""
        names = self.original.layer_names(i)
        maker = f"{MAKERS[tap]}.weight"
        reading = [names[f"{m}.weight"] for m in readers(self.config, i, names).get(f"{tap}-{i}", ())]
        if maker not in names or not any(map(self._quantized, reading)):
            return
        sums, was = [text.sums(i, tap) for text in self.texts], self.texts[0].output(i)
        sizes, now = (sums[0].importance.sqrt(), self._columns(reading)), list(sums)

        def apply(powers: tuple[float, float]) -> None:
            s = scales(*sizes, powers, tap, self.config)
            self.original.row_factors[names[maker]] = of_maker(s, tap, self.config)
            self.original.column_factors |= dict.fromkeys(reading, s)
            now[:] = [x.scaled(1 / s.double(), 1 / s.double()) for x in sums]
            round_plainly()

        def undo() -> None:
            del self.original.row_factors[names[maker]]
            for name in reading:
                del self.original.column_factors[name]
            now[:] = sums
            round_plainly()

        def round_plainly() -> None:
            for name in reading:
                self._plain(name, now[0].importance)

        def error() -> list[float]:
            return [self._error(reading, s) for s in now]

        apply(POWERS[-1])
        same = float(nmse(was, self.texts[0].output(i)).max()) < SAME
        undo()
        if same:
            found = {}
            for powers in POWERS:
                apply(powers)
                found[powers] = error()[0]
                undo()
            best = min(found, key=found.__getitem__)
            self._try(i, names[maker], "equalize", error, lambda: apply(best), undo)
        else:
            self.notes.append(f"layer {i} was not equalized before {', '.join(reading)}: something else reads the same channels.")
        for name in reading:
            self.rounded.bytes.pop(name, None)

    def _columns(self, names: Sequence[str]) -> Tensor:
        """RMS of the columns of some matrices together, float64 [in]."""
        squares = [self.original.get(name).double().square().mean(0) for name in names]
        return torch.stack(squares).mean(0).sqrt()

    def _products(self, names: Sequence[str]) -> list[Product]:
        return [(self.original.get(name).double(), self.rounded.get(name).double()) for name in names]

    def _error(self, names: Sequence[str], s: Sums, b: Tensor | None = None) -> float:
        return product_error(self._products(names), s, b)

    def _try(
        self, i: int, name: str, correction: str, errors: Callable[[], list[float]], apply: Callable[[], None], undo: Callable[[], None]
    ) -> bool:
        """Apply a correction in layer i, and take it back unless both texts agree that it helps."""
        kl, error = [text.kl(i) for text in self.texts], errors()
        apply()
        ratios = [new / old if old else 1.0 for new, old in zip(errors(), error, strict=True)]
        kept = self._judged(name, correction, ratios, kl, [text.kl(i) for text in self.texts])
        if not kept:
            undo()
        return kept

    def _judged(self, name: str, correction: str, ratios: Sequence[float], before: Sequence[float], after: Sequence[float]) -> bool:
        """Whether a correction helped on both texts; what happened is noted."""
        kept = all(r < 1 for r in ratios) and all(a < b for a, b in zip(after, before, strict=True))
        qtype = self.rounded.types[name].name if name in self.rounded.bytes else "F32"
        self.rows.append(Row(name, qtype, kept, ratios[0], ratios[1], (before[0], after[0]), (before[1], after[1]), correction))
        return kept


def _improved(goal: Tensor, gram: Tensor, qtype: QuantType) -> Bytes:
    raw = error_feedback(goal, gram, qtype)
    for improve in (descended, rescaled, descended):
        raw = improve(goal, raw, gram, qtype)
    return raw
