"""How much each matrix in each type costs: the predicted KL divergence, of every pair from one pass over a text.

    forward   h₀ → h₁ → … → h_L, the hidden state before every layer is kept
    head      labels y ~ p, gradient of Σ log p(y) at h_L; the head's own types: KL exactly, from the final states
    back      layer by layer, last one first: computed again, differentiated, and its matrices scored in every type (probe.py)
    embedding the KL exactly, from a run of some chunks with the coarser rows (and the coarser head where it is tied)

The error of a matrix is the actual one, decode(encode(W)) − W.  Memory is one layer with the activations of PART_TOKENS, the hidden
states [L+1,C,T,E], and of each matrix some rows of its input and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantscope.errors import NonFiniteError
from quantscope.model.arithmetic import cast
from quantscope.model.forward import Ropes, check_ids, embed, embedded, layer, logits, output_norm, tables
from quantscope.model.ops import exact_matmul
from quantscope.qtypes import QuantType
from quantscope.quants import Floats, can_encode, decode, encode
from quantscope.recipes import TensorShape, fallback, is_quantizable
from quantscope.remedy.probe import Probe, back_through, from_head, joined, probe
from quantscope.remedy.small_kl import small_kl
from quantscope.remedy.supported import check_remediable
from quantscope.sources.base import show
from quantscope.weights import Weights

PART_TOKENS = 2048  # that go through a layer at a time
SLICE_VALUES = 1 << 24  # logits that are held at a time
SAMPLES = 1024  # rows of each matrix's input and gradient, and positions at which the head is compared
EMBEDDING, HEAD = "token_embd.weight", "output.weight"

Importance = Callable[[str], Floats | None]


@dataclass(frozen=True)
class Sensitivity:
    """kl: tensor → type → predicted increase of the mean KL divergence [nats per token] when that tensor alone is stored in that type.

    stored: tensor → type → the type it would really be, another one where the blocks do not fill its rows; n_bytes likewise.  A type that
    cannot be written to a tensor is missing there.  shapes: [out,in], of stacked experts [n_expert,out,in].  Tensors stand in the order of
    the forward.  idle: (name of a stack, experts that no token reached, experts), where there are some: nothing is known of these.
    """

    kl: Mapping[str, Mapping[str, float]]
    stored: Mapping[str, Mapping[str, str]]
    n_bytes: Mapping[str, Mapping[str, int]]
    shapes: Mapping[str, tuple[int, ...]]
    types: tuple[str, ...]
    n_chunk: int
    n_ctx: int
    idle: tuple[tuple[str, int, int], ...] = ()

    def group(self, key: Callable[[str], str], qtype: str) -> dict[str, float]:
        """Sums of a type's predictions over the tensors with one key, in nats: ``role`` and ``place`` are such keys."""
        sums: dict[str, float] = {}
        for name, row in self.kl.items():
            if qtype in row:
                sums[key(name)] = sums.get(key(name), 0.0) + row[qtype]
        return sums

    def most(self, qtype: str, n: int = 10) -> list[str]:
        """The tensors that cost most in this type."""
        return sorted((name for name in self.kl if qtype in self.kl[name]), key=lambda name: -self.kl[name][qtype])[:n]


def role(name: str) -> str:
    """``"blk.3.ffn_down.weight"`` → "ffn_down"."""
    return name.split(".")[-2]


def place(name: str) -> str:
    """``"blk.3.ffn_down.weight"`` → "3", ``"output.weight"`` → "output"."""
    parts = name.split(".")
    return parts[1] if parts[0] == "blk" else parts[0]


def predict(
    weights: Weights,
    ids: Tensor,
    types: Sequence[QuantType],
    *,
    importance: Importance = lambda name: None,
    samples: int = SAMPLES,
    seed: int = 0,
    step: Callable[[int, str], None] = lambda done, what: None,
) -> Sensitivity:
    """The sensitivity of every matrix of a model in every type, on ids [C,T] int64, all positions counting.

    importance: name → weights of the columns for the encoders, as ``Imatrix.of``.  samples: rows kept of each matrix; more than
    C·T: all.  seed: of the drawn labels and rows.  step: called with the stages done (``n_stages`` in all) and the next one's name.
    Raises PromptError for ids the model cannot take, NonFiniteError where hidden states or gradients are not finite.
    """
    check_ids(ids, weights.config)
    check_remediable(weights, "Predicting its sensitivity")
    run = _Run(weights, ids, types, importance, samples, torch.Generator().manual_seed(seed), step)
    with exact_matmul(), torch.no_grad():
        found = {name: row for names in run.stages() for name, row in names.items()}
    matrices = [name for name in weights.names() if name in found]
    stored = {name: {asked: t for asked, t in run.stored(name).items() if asked in found[name]} for name in matrices}
    return Sensitivity(
        kl={name: found[name] for name in matrices},
        stored={name: {asked: t.name for asked, t in stored[name].items()} for name in matrices},
        n_bytes={name: {asked: _n_bytes(weights.shape(name), t) for asked, t in stored[name].items()} for name in matrices},
        shapes={name: weights.shape(name) for name in matrices},
        types=tuple(t.name for t in types),
        n_chunk=ids.shape[0],
        n_ctx=ids.shape[1],
        idle=tuple((name, *run.idle[name]) for name in matrices if name in run.idle),
    )


def n_stages(n_layer: int) -> int:
    """What ``step`` counts to."""
    return 2 * n_layer + 2


def quantized(w: Tensor, qtype: QuantType, importance: Floats | None = None) -> Tensor:
    """The values that a matrix [out,in] has once it is stored in this type."""
    raw = encode(w.cpu().numpy(), qtype, w.shape[-1], importance)
    return torch.from_numpy(decode(raw, qtype)).reshape(w.shape).to(w.device)


def _n_bytes(shape: tuple[int, ...], qtype: QuantType) -> int:
    return math.prod(shape[:-1]) * qtype.row_bytes(shape[-1])


@dataclass
class _Run:
    """One prediction: what it was asked, the hidden states, and the gradient that goes back."""

    weights: Weights
    ids: Tensor  # [C,T]
    types: Sequence[QuantType]
    importance: Importance
    samples: int
    draw: torch.Generator
    step: Callable[[int, str], None]
    done: int = 0
    idle: dict[str, tuple[int, int]] = field(default_factory=dict)  # name → experts that no token reached, of how many

    def stages(self) -> Iterator[dict[str, dict[str, float]]]:
        """tensor → type → nats, of some tensors at a time."""
        n_layer = self.weights.config.n_layer
        h = embed(self.ids, self.weights)  # [C,T,E]
        rope, before = tables(h, self.weights), [h]
        for i in range(n_layer):
            self._tick(f"layer {i} forward")
            h = self._through(h, i, rope)
            before.append(h)
        self._check_finite(h, "hidden state")
        self._tick("head")
        grad = self._from_head(h)
        if not self.weights.config.tied:
            yield {HEAD: self._head_kl(h)}
        for i in reversed(range(n_layer)):
            self._tick(f"layer {i} back")
            probes, grad = self._back(before.pop(i), grad, i, rope)
            yield {name: self._scores(name, p) for name, p in probes.items()}
            self.weights.let_go(self.weights.layer_names(i).values())
        self._tick("embedding")
        yield {EMBEDDING: self._embedding_kl()}
        self._tick("done")

    def stored(self, name: str) -> dict[str, QuantType]:
        """What each wanted type becomes for a tensor, the types that can be written."""
        actual = {t.name: fallback(t, self.weights.shape(name)[-1]) for t in self.types}
        return {asked: t for asked, t in actual.items() if can_encode(t)}

    def _tick(self, what: str) -> None:
        self.step(self.done, what)
        self.done += 1

    def _parts(self, n_chunk: int) -> Iterator[slice]:
        """Slices of chunks."""
        each = max(1, PART_TOKENS // self.ids.shape[1])
        return (slice(a, min(a + each, n_chunk)) for a in range(0, n_chunk, each))

    def _images(self, name: str, w: Tensor, e: int = 0) -> Iterator[tuple[str, Tensor]]:
        """(asked type, the values once stored), one at a time; w: the matrix, or some of its rows, or expert e's."""
        made, columns = dict[QuantType, Tensor](), self.importance(name)
        own = None if columns is None else columns.reshape(-1, w.shape[-1])[e]  # of a stack those of one expert after the other
        for asked, actual in self.stored(name).items():
            if actual not in made:
                made = {actual: quantized(w, actual, own)}
            yield asked, made[actual]

    def _through(self, h: Tensor, i: int, rope: Ropes) -> Tensor:
        """[C,T,E] → [C,T,E]"""
        out = torch.empty_like(h)
        for part in self._parts(len(h)):
            out[part] = layer(h[part], cast(self.weights.layer(i), h.dtype), i, self.weights.config, rope)
        self.weights.let_go(self.weights.layer_names(i).values())
        return out

    # ---- head

    def _slices(self, n: int) -> Iterator[slice]:
        each = max(1, SLICE_VALUES // self.weights.config.n_vocab)
        return (slice(a, a + each) for a in range(0, n, each))

    def _from_head(self, h: Tensor) -> Tensor:
        """The gradient of Σ log p(y) at h [C,T,E], labels drawn from p."""
        top, flat = dict(self.weights.top()), h.flatten(0, 1)  # [C·T,E]
        grad = torch.empty_like(flat)

        def log_p(x: Tensor) -> Tensor:
            log = logits(output_norm(x, top, self.weights.config), top, self.weights.config).log_softmax(-1)  # [n,V]
            self._check_finite(log, "output")
            return log

        for part in self._slices(len(flat)):
            grad[part] = from_head(flat[part], log_p, self.draw)
        self._check_finite(grad, "gradient")
        return grad.reshape(h.shape)

    def _check_finite(self, x: Tensor, what: str) -> None:
        if not torch.isfinite(x).all():
            raise NonFiniteError(
                f"{show(self.weights.source.path)}: the {what} is NaN or infinite on this text, expected numbers: there is no "
                f"sensitivity to predict. The file is damaged, or the model overflows: look for the place with `quantscope study MODEL "
                f"--text FILE`."
            )

    def _head_kl(self, h: Tensor) -> dict[str, float]:
        """Exactly, at some of the positions of h [C,T,E]."""
        flat = h.flatten(0, 1)
        chosen = torch.randperm(len(flat), generator=self.draw)[: self.samples].to(flat.device)
        top = dict(self.weights.top())
        x = output_norm(flat[chosen], top, self.weights.config)  # [n,E]
        return {asked: self._compared(x, top, x, {**top, HEAD: w}) for asked, w in self._images(HEAD, top[HEAD])}

    def _compared(self, ref: Tensor, ref_top: Mapping[str, Tensor], test: Tensor, test_top: Mapping[str, Tensor]) -> float:
        """Mean KL divergence in nats of the logits made of two sets of normed states, [n,E] each."""
        sums, config = 0.0, self.weights.config
        for part in self._slices(len(ref)):
            sums += float(small_kl(logits(ref[part], ref_top, config), logits(test[part], test_top, config)).double().sum())
        return sums / len(ref)

    # ---- layers

    def _back(self, h: Tensor, grad: Tensor, i: int, rope: Ropes) -> tuple[dict[str, Probe], Tensor]:
        """Canonical name → probe of layer i's matrices, and the gradient at its input h; all [C,T,E]."""
        names, parts = self.weights.layer_names(i), list[dict[str, Probe]]()
        before = torch.empty_like(grad)
        for part in self._parts(len(h)):
            w = cast(self.weights.layer(i), h.dtype)
            before[part], products = back_through(h[part], grad[part], w, i, self.weights.config, rope)
            share = -(-self.samples * (part.stop - part.start) // len(h))
            scored = {names[f"{local}.weight"]: p for local, p in products.items()}
            parts.append({name: probe(p, share, self.draw) for name, p in scored.items() if self._has_types(name)})
        self._check_finite(before, "gradient")
        return {name: joined([p[name] for p in parts]) for name in parts[0]}, before

    def _has_types(self, name: str) -> bool:
        """Whether a tensor is one that llama-quantize gives another type; a router keeps its own."""
        return is_quantizable(TensorShape(name, self.weights.shape(name)), self.weights.config.arch)

    def _scores(self, name: str, p: Probe) -> dict[str, float]:
        """Of a stack the experts that tokens reach, one at a time; the others change nothing on this text."""
        reached = p.reached.nonzero()[:, 0].tolist()
        if len(reached) < len(p.reached):
            self.idle[name] = len(p.reached) - len(reached), len(p.reached)
        felt = dict.fromkeys(self.stored(name), p.nothing())
        for e in reached:
            w = self._matrix(name, e)
            for asked, image in self._images(name, w, e):
                felt[asked] += p.felt(image - w, e)
        return {asked: p.kl_of(f) for asked, f in felt.items()}

    def _matrix(self, name: str, e: int) -> Tensor:
        """[out,in], of a stack that of expert e."""
        return self.weights.get(name) if len(self.weights.shape(name)) == 2 else self.weights.band(name, slice(e, e + 1))[0]

    # ---- embedding

    def _embedding_kl(self) -> dict[str, float]:
        """Exactly, from the first chunks that have ``samples`` tokens; all types walk through the layers together."""
        ids = self.ids[: -(-self.samples // self.ids.shape[1])]  # [c,T]
        used, at = torch.unique(ids, return_inverse=True)  # rows are encoded one by one, so these are enough
        rows = self.weights.rows(EMBEDDING, used)  # [used,E]
        images = dict(self._images(EMBEDDING, rows))
        h = embedded(torch.cat([rows[at], *(w[at] for w in images.values())]), self.weights)  # [(1+types)·c,T,E]
        rope = tables(h, self.weights)
        for i in range(self.weights.config.n_layer):
            h = self._through(h, i, rope)
        top = dict(self.weights.top())
        ref, *others = output_norm(h, top, self.weights.config).reshape(1 + len(images), -1, h.shape[-1])  # [c·T,E] each
        if not self.weights.config.tied:
            return {asked: self._compared(ref, top, x, top) for asked, x in zip(images, others, strict=True)}
        heads = self._images(EMBEDDING, top[HEAD])
        return {asked: self._compared(ref, top, x, {**top, HEAD: w}) for x, (asked, w) in zip(others, heads, strict=True)}
