"""Which products' activation rounding changes the greedy token of a file that exact arithmetic keeps.

    rounded:  y = round(x) · Wᵀ, the activations x in blocks of 32 (Q8_0, Q8_1) or 256 (Q8_K), each with one scale, max|x| / 127
    exact at a place:  y = x · Wᵀ for the products that read this tap, everything else rounded as before

One channel 300 times the others sets the scale of its whole block, and the others round to nothing.  A place is a cause when exact
activations there, and nowhere else, bring the exact token back; of several such places the one that leaves the least error in the logits.
Near a tie other places bring it back as well, by chance: they leave most of the error, and ``left`` says how much.  The
channels named are those whose blocks make the most error:

    share(c) = Σ over blocks whose largest |x| is at c of Σ_j (x_j − round(x)_j)² · Σ_o W_oj²      of the same sum over all blocks

Source: llama.cpp issue 4755 (Q8_K activations changed the token, Q8_1 did not); ``quantize_row_q8_K_ref`` in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantscope.metrics import first_argmax, rms
from quantscope.model import ops
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.forward import forward
from quantscope.model.ggml_arithmetic import ROUNDED, GgmlArithmetic, StoredTensors
from quantscope.model.taps import READ_BY, READ_IN_LAYER, Recorder, graph_order, place_of
from quantscope.qtypes import KVType, QuantType
from quantscope.quants.activations import round_activations
from quantscope.quants.integers import LAYOUTS
from quantscope.weights import WeightProvider

OF_OTHERS = {  # products that other models than Llama have there; those with no tap before them, as of experts, are always rounded
    "attn_norm": ("attn_qkv", "attn_q_a", "attn_kv_a_mqa"),
    "ffn_norm": ("ffn_gate_inp", "ffn_gate_shexp", "ffn_up_shexp"),
    "ffn_swiglu": ("ffn_down_shexp",),
}
READS = {stem: (*products, *OF_OTHERS.get(stem, ())) for stem, products in READ_BY.items()}
TAP_OF = {product: stem for stem, products in READS.items() for product in products}
MOST_CHANNELS = 8  # named
MOST_LEFT = 0.5  # above this share of the logits' error, others make more of it than the places named
NEAR_TIE = 0.1  # [nats] between the logits of two tokens: one is 10 % more probable than the other
LEAST_SHARE = 0.01  # of the rounding error at a place: a channel that makes less is not named
BLOCKS = {"Q8_0": 32, "Q8_1": 32, "Q8_K": 256}


@dataclass(frozen=True)
class Channel:
    """A channel that sets the scale of its block.  share: of the error that rounding this tap makes in the products, by its blocks."""

    tap: str
    index: int
    block: int  # [elements]; 1 where a float type rounds every element by itself
    times_rms: float  # largest |x| over the positions / RMS of the tap
    share: float


@dataclass(frozen=True)
class ActivationRounding:
    """Why the rounded token is not the exact one.

    gap_exact, gap_rounded: logit of the exact token minus that of the rounded one, by either arithmetic: > 0 and < 0.
    places: the smallest set of taps found at which exact activations restore the exact token; empty where none does.
    left: squared error of the logits that remains with exact activations there, as a share of that of the rounded run; 1 without places.
    alone: every single tap that restores the token.  n_runs: emulated forwards.
    """

    exact_token: int
    rounded_token: int
    gap_exact: float
    gap_rounded: float
    places: tuple[str, ...]
    left: float
    alone: tuple[str, ...]
    channels: tuple[Channel, ...]
    n_runs: int

    @property
    def restored(self) -> bool:
        """Whether exact activations at ``places`` give the exact token."""
        return bool(self.places)

    @property
    def near_tie(self) -> bool:
        """Whether the exact probabilities of the two tokens are within NEAR_TIE of each other: then much smaller changes decide, too."""
        return self.gap_exact < NEAR_TIE


class ExactAt(GgmlArithmetic):
    """ggml's arithmetic, but the products that read these taps get their activations unrounded."""

    def __init__(self, kv: KVType, places: Collection[str]) -> None:
        super().__init__(kv)
        self.places = frozenset(places)

    def layer(self, weights: WeightProvider, i: int, dtype: torch.dtype) -> StoredTensors:
        return _Placed(f"-{i}", weights.layer_names(i), weights.layer(i), weights)

    def top(self, weights: WeightProvider, dtype: torch.dtype) -> StoredTensors:
        return _Placed("", weights.top_names(), weights.top(), weights)

    def linear(self, x: Tensor, w: Mapping[str, Tensor], name: str, *, scale_last: bool = False) -> Tensor:
        assert isinstance(w, _Placed)  # what layer() and top() give
        if name in TAP_OF and TAP_OF[name] + w.suffix in self.places:
            return ops.linear(x, w, name, scale_last=scale_last)
        return super().linear(x, w, name, scale_last=scale_last)


class _Placed(StoredTensors):
    """The tensors of a layer, which know of which: suffix "-3", or "" for the head."""

    def __init__(self, suffix: str, names: Mapping[str, str], tensors: Mapping[str, Tensor], weights: WeightProvider) -> None:
        super().__init__(names, tensors, weights)
        self.suffix = suffix


def activation_rounding(weights: WeightProvider, ids: Tensor, kv: KVType = "F16") -> ActivationRounding | None:
    """What changes the token after ids [1,T] in the emulated arithmetic; None where it does not change.

    The places are sought from coarse to fine: one tap in all layers, then that tap layer by layer, and only where no single place is
    enough, several: added in rising order of the error that each leaves, then each left out that is not needed.  So no member of ``places``
    can be spared, but a smaller set that this order does not meet may exist.  Enough is what restores the token and leaves at most
    MOST_LEFT of the error; where nothing does both, what restores the token.  Forwards: 7 to 12 + n_layer as a rule, at most 5 · places.
    """
    bench = _Bench(weights, ids, kv)
    exact, rounded = bench.exact, bench.run(())
    token, changed = bench.token, int(first_argmax(rounded.logits))
    if token == changed:
        return None
    alone, places = _smallest(bench)
    return ActivationRounding(
        token,
        changed,
        float(exact[token] - exact[changed]),
        float(rounded.logits[token] - rounded.logits[changed]),
        places,
        bench.run(places).error / rounded.error,
        alone,
        _channels(weights, ids, kv, places),
        bench.n_runs,
    )


@dataclass(frozen=True)
class _Run:
    """Logits [V] float64 of the last position; whether greedy decoding takes the exact token; squared error against the exact logits."""

    logits: Tensor
    restored: bool
    error: float


class _Bench:
    """Emulated forwards of one prompt, each set of exact places once."""

    def __init__(self, weights: WeightProvider, ids: Tensor, kv: KVType) -> None:
        self.weights, self._ids, self._kv = weights, ids, kv
        self.exact = self._last(EXACT)
        self.token = int(first_argmax(self.exact))
        self._runs: dict[frozenset[str], _Run] = {}

    @property
    def n_runs(self) -> int:
        return len(self._runs)

    def _last(self, arithmetic: Arithmetic) -> Tensor:
        return forward(self._ids, self.weights, arithmetic=arithmetic)[0, -1].double()  # [V]

    def run(self, places: Iterable[str]) -> _Run:
        """With exact activations at these taps."""
        key = frozenset(places)
        if key not in self._runs:
            logits = self._last(ExactAt(self._kv, key))
            self._runs[key] = _Run(logits, int(first_argmax(logits)) == self.token, float((logits - self.exact).square().sum()))
        return self._runs[key]

    def restored(self, places: Iterable[str]) -> bool:
        return self.run(places).restored

    def explained(self, places: Iterable[str]) -> bool:
        """Whether they restore the token and leave at most MOST_LEFT of the error."""
        return self.restored(places) and self.run(places).error <= MOST_LEFT * self.run(()).error


def _smallest(bench: _Bench) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(single places that restore the token, smallest set found): one that explains the error, else one that only restores the token."""
    n_layer = bench.weights.config.n_layer
    by_stem = {stem: [f"{stem}-{i}" for i in range(n_layer)] if stem in READ_IN_LAYER else [stem] for stem in READ_BY}
    sought = [place for stem, places in by_stem.items() if bench.restored(places) for place in places]
    if not any(bench.explained([place]) for place in sought):
        sought = [place for places in by_stem.values() for place in places]
    ranked = sorted(sought, key=lambda place: bench.run([place]).error)
    alone = tuple(sorted((place for place in ranked if bench.restored([place])), key=graph_order))
    for enough in (bench.explained, bench.restored):
        one = tuple(place for place in ranked if enough([place]))[:1]
        if places := one or _several(ranked, enough):
            return alone, places
    return (), ()


def _several(ranked: list[str], enough: Callable[[Iterable[str]], bool]) -> tuple[str, ...]:
    """The first places in this order that together are enough, without those that can be spared."""
    n = next((n for n in range(2, len(ranked) + 1) if enough(ranked[:n])), 0)
    kept = ranked[:n]
    for place in reversed(ranked[:n]):
        rest = [p for p in kept if p != place]
        if rest and enough(rest):
            kept = rest
    return tuple(sorted(kept, key=graph_order))


# ---- The channels -------------------------------------------------------------------------------------------------------


def _channels(weights: WeightProvider, ids: Tensor, kv: KVType, places: Collection[str]) -> tuple[Channel, ...]:
    """Those that make the most error at these taps of the rounded run, the largest share first."""
    seen, m = Recorder(places), GgmlArithmetic(kv)
    if places:
        forward(ids, weights, seen, arithmetic=m)
    found: list[Channel] = []
    for place in places:
        stem, layer = place_of(place)
        w = m.top(weights, torch.float32) if layer is None else m.layer(weights, layer, torch.float32)
        products = [f"{product}.weight" for product in READS[stem] if f"{product}.weight" in w]
        found += channels(place, seen.taps[place][0], [(w.type_of(name), w[name]) for name in products])
    return tuple(sorted(found, key=lambda c: -c.share)[:MOST_CHANNELS])


def channels(tap: str, x: Tensor, products: Iterable[tuple[QuantType, Tensor]]) -> list[Channel]:
    """The channels of x [T,K] whose blocks make at least LEAST_SHARE of the error in the products with these (type, W [out,K])."""
    error, block = torch.zeros(x.shape[-1], dtype=torch.float64), 1
    for kind, w in products:
        block, own = _error_by_channel(x, kind, w.double().square().sum(0))
        error += own
    total = float(error.sum())
    peaks = x.abs().amax(0)
    return [
        Channel(tap, int(c), block, float(peaks[c] / rms(x.flatten())), float(error[c]) / total)
        for c in error.argsort(descending=True)[:MOST_CHANNELS]
        if total and float(error[c]) >= LEAST_SHARE * total
    ]


def _error_by_channel(x: Tensor, kind: QuantType, gain: Tensor) -> tuple[int, Tensor]:
    """(block size, error [K] float64): of each block at the channel that sets its scale.  gain: Σ_o W_oj², [K]."""
    T, K = x.shape
    if kind.name not in LAYOUTS:
        rounded = x.to(ROUNDED.get(kind.name, torch.float32)).double()
        return 1, ((x.double() - rounded).square() * gain).sum(0)
    activation = LAYOUTS[kind.name].activation
    a, size = round_activations(np.ascontiguousarray(x.numpy()), activation), BLOCKS[activation]
    rounded = torch.from_numpy(a.codes[:T].astype(np.float64) * np.repeat(a.scales[:T].astype(np.float64), size, axis=1))  # [T,K]
    by_block = ((x.double() - rounded).square() * gain).reshape(T, -1, size).sum(-1)  # [T,K/size]
    largest = x.abs().reshape(T, -1, size).argmax(-1) + torch.arange(0, K, size)  # [T,K/size] channel
    return size, torch.zeros(K, dtype=torch.float64).index_add(0, largest.flatten(), by_block.flatten())
