"""What an engine may set differently, one axis at a time: known values first, then values that are measured.

A maker takes a setting and yields it with one more change, and the words for it; ``MAKERS`` is the table of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from quantscope.arch.config import Llama3Scaling, RopeLayout
from quantscope.language import mark, say
from quantscope.rotation.signals import Pairs, Setting, Signals
from quantscope.weights import llama3_factors
from quantscope.wording import fixed

THETAS = (1e3, 1e4, 1e5, 1.5e5, 5e5, 1e6, 5e6, 1e7)  # of published models
LLAMA3 = {"Llama 3.1": Llama3Scaling(8.0, 1.0, 4.0, 8192), "Llama 3.2": Llama3Scaling(32.0, 1.0, 4.0, 8192)}
FARTHEST = 4096  # [tokens] offsets of positions that are tried

Change: TypeAlias = tuple[str, Setting]  # words, setting
Maker: TypeAlias = Callable[[Setting, Signals], Iterator[Change]]


def _layouts(s: Setting, signals: Signals) -> Iterator[Change]:
    other: RopeLayout = "half" if s.rope.layout == "interleaved" else "interleaved"
    words = {"half": say("halves (i, i + dim/2)"), "interleaved": say("neighbours (2i, 2i + 1)")}
    yield (
        say("pairs of {found} instead of {expected}", found=words[other], expected=words[s.rope.layout]),
        replace(s, rope=replace(s.rope, layout=other)),
    )


def _dims(s: Setting, signals: Signals) -> Iterator[Change]:
    D, dim = signals.head_dim, s.rope.dim
    for d in sorted({D, D // 2, D // 4} - {dim, 0}):
        if d % 2:
            continue
        factors = None if s.factors is None or len(s.factors) < d // 2 else s.factors[: d // 2]
        both = say("{found} channels of a head turning instead of {expected} (and {found} in the exponent)", found=d, expected=dim)
        yield both, replace(s, rope=replace(s.rope, dim=d), factors=factors)
        kept = replace(s.rope, dim=d, theta=s.rope.theta ** (d / dim))
        one = say("{found} channels of a head turning instead of {expected} (with {expected} in the exponent)", found=d, expected=dim)
        yield one, replace(s, rope=kept, factors=factors)


def _named_thetas(s: Setting, signals: Signals) -> Iterator[Change]:
    theta, dim = s.rope.theta, s.rope.dim
    for known in THETAS:
        if not math.isclose(known, theta, rel_tol=1e-6):
            yield _theta_words(known, theta), replace(s, rope=replace(s.rope, theta=known))
    D = signals.head_dim
    for e in sorted({dim // 2, 2 * dim, D // 2, D, 2 * D, D * signals.before.shape[1]} - {dim, 0}):
        words = say("{found} channels in the exponent of theta instead of {expected}", found=e, expected=dim)
        yield words, replace(s, rope=replace(s.rope, theta=theta ** (dim / e)))


def _scalings(s: Setting, signals: Signals) -> Iterator[Change]:
    rope = s.rope
    if rope.scaling == "none" or rope.factor == 1:
        return
    name = {"linear": "linear", "yarn": "YaRN"}[rope.scaling]
    plain = replace(rope, scaling="none", factor=1.0)
    by = {"name": name, "factor": number(rope.factor)}
    yield say("no {name} scaling (by {factor})", **by), replace(s, rope=replace(plain, magnitude=1.0))
    if rope.magnitude != 1:
        yield say("no {name} scaling (by {factor}) of the frequencies", **by), replace(s, rope=plain)
    if rope.scaling == "yarn":
        linear = replace(rope, scaling="linear")
        words = say("linear scaling by {factor} of every pair instead of YaRN's", factor=by["factor"])
        yield words, replace(s, rope=replace(linear, magnitude=1.0))
        yield say("linear scaling by {factor} of every pair instead of YaRN's ramp", factor=by["factor"]), replace(s, rope=linear)
    else:
        yield say("linear scaling by {factor} applied twice", factor=by["factor"]), replace(s, rope=replace(rope, factor=rope.factor**2))


def _factors(s: Setting, signals: Signals) -> Iterator[Change]:
    if s.factors is not None:
        yield say("the frequency factors (rope_freqs.weight) ignored"), replace(s, factors=None)
        yield say("the frequency factors (rope_freqs.weight) applied twice"), replace(s, factors=s.factors.double() ** 2)
        yield say("frequencies multiplied by their factors (rope_freqs.weight), not divided"), replace(s, factors=1 / s.factors.double())
    elif s.rope.scaling == "none":
        for name, scaling in LLAMA3.items():
            factors = llama3_factors(s.rope.theta, s.rope.dim, scaling)
            if (factors != 1).any():
                yield say("{name}'s frequency factors, which this model has not", name=name), replace(s, factors=factors)


def _named_positions(s: Setting, signals: Signals) -> Iterator[Change]:
    yield say("no rotation at all"), replace(s, scale=0.0)
    yield say("positions 1 too high (counted from 1?)"), replace(s, start=1.0)
    yield say("positions 1 too low"), replace(s, start=-1.0)
    yield say("the reverse rotation (the sign of sin)"), replace(s, scale=-1.0)
    yield say("the rotation applied twice"), replace(s, scale=2.0)
    for factor in (2, 4, 8, 16):
        yield say("positions divided by {factor} (linear scaling)", factor=factor), replace(s, scale=1 / factor)


def _fitted_positions(s: Setting, signals: Signals) -> Iterator[Change]:
    pairs, p, freqs = signals.pairs(s.rope), signals.positions, s.frequencies
    offsets = torch.arange(-FARTHEST, FARTHEST + 1, dtype=torch.float64)
    start = float(offsets[_summed(pairs, p, freqs, offsets).argmax()])
    if start:
        words = mark("positions {n} too high") if start > 0 else mark("positions {n} too low")
        yield say(words, n=f"{abs(start):.0f}"), replace(s, start=start)
    constant = float(offsets[FARTHEST:][_summed(pairs, 0 * p, freqs, offsets[FARTHEST:]).argmax()])
    if len(p) > 1 and constant:
        yield say("position {position} for every token", position=f"{constant:.0f}"), replace(s, scale=0.0, start=constant)
    scale = _best_scale(pairs, freqs, signals)
    words = say("positions times {scale}", scale=number(scale))
    if scale > 0:
        words = say("positions times {scale} (linear scaling by {factor})", scale=number(scale), factor=number(1 / scale))
    yield words, replace(s, scale=scale)


def _fitted_theta(s: Setting, signals: Signals) -> Iterator[Change]:
    theta = _best_theta(s, signals)
    yield _theta_words(theta, s.rope.theta), replace(s, rope=replace(s.rope, theta=theta))


def _fitted_magnitude(s: Setting, signals: Signals) -> Iterator[Change]:
    pairs = signals.pairs(s.rope)
    angles = s.places(signals.positions)[:, None] * s.frequencies
    magnitude = float(pairs.agreement(angles)) / pairs.energy if pairs.energy else 0.0
    if magnitude > 0:
        words = say("magnitude {found} instead of {expected}", found=number(magnitude, 5), expected=number(s.rope.magnitude, 5))
        yield words, replace(s, rope=replace(s.rope, magnitude=magnitude))


def _theta_words(theta: float, expected: float) -> str:
    return say("theta {found} instead of {expected}", found=number(theta), expected=number(expected))


def number(x: float, digits: int = 6) -> str:
    """Significant digits without zeros at the end: ``10,000``, ``0.3``, ``3.33333``."""
    text = fixed(x, max(1, digits - 1 - math.floor(math.log10(abs(x)))) if x else 1)
    return text.rstrip("0").rstrip(".")


MAKERS: tuple[tuple[str, bool, Maker], ...] = (  # axis, whether it is fitted, maker; fitted ones last: they need the others to be right
    ("layout", False, _layouts),
    ("dim", False, _dims),
    ("theta", False, _named_thetas),
    ("scaling", False, _scalings),
    ("factors", False, _factors),
    ("positions", False, _named_positions),
    ("positions", True, _fitted_positions),
    ("theta", True, _fitted_theta),
    ("magnitude", True, _fitted_magnitude),
)


# ---- Fitting a number ----------------------------------------------------------------------------------------------------


def _summed(pairs: Pairs, places: Tensor, freqs: Tensor, offsets: Tensor) -> Tensor:
    """Agreement with the places moved by each of the offsets [N] → [N]; the sum over the tokens comes first."""
    turned = pairs.cross * torch.polar(torch.ones(()).double(), -places[:, None] * freqs)  # [T,R]
    return replace(pairs, cross=turned.sum(0, keepdim=True)).agreement((offsets[:, None] * freqs)[:, None])


def _best_theta(s: Setting, signals: Signals) -> float:
    """The theta that agrees best, 4 … 10⁹; YaRN's ramp depends on it a little: there the search is repeated with the last one's."""
    theta = s.rope.theta
    for _ in range(3 if s.rope.scaling == "yarn" else 1):
        theta = _theta_beside(replace(s, rope=replace(s.rope, theta=theta)), signals)
    return theta


def _theta_beside(s: Setting, signals: Signals) -> float:
    """The theta t that agrees best when the setting's frequencies are multiplied by (t/theta)^(−2i/dim)."""
    places, freqs, known = s.places(signals.positions), s.frequencies, math.log(s.rope.theta)
    exponents = torch.arange(len(freqs), dtype=torch.float64) * (2 / s.rope.dim)  # [R]

    def score(at: Tensor) -> Callable[[Tensor], Tensor]:
        pairs = signals.pairs(s.rope).of_tokens(at)
        return lambda logs: pairs.agreement(places[at, None] * (freqs * torch.exp((known - logs[:, None]) * exponents))[:, None])

    def step(at: Tensor) -> float:  # d(p·θᵢ)/d ln(theta) is 0.27 p at most for theta ≥ 4
        return min(0.25, 1 / (0.27 * max(1.0, float(places[at].abs().max()))))

    near = _peak(score(signals.near), math.log(4), math.log(1e9), step(signals.near))
    around = 4 * step(signals.spread)
    return math.exp(_peak(score(signals.spread), near - around, near + around, around / 8))


def _best_scale(pairs: Pairs, freqs: Tensor, signals: Signals) -> float:
    """The factor of the positions that agrees best, −8 … 8."""

    def score(at: Tensor) -> Callable[[Tensor], Tensor]:
        angles, chosen = signals.positions[at, None] * freqs, pairs.of_tokens(at)
        return lambda scales: chosen.agreement(scales[:, None, None] * angles)

    def step(at: Tensor) -> float:
        return 0.5 / max(1.0, float(signals.positions[at].abs().max()))

    near = _peak(score(signals.near), -8.0, 8.0, step(signals.near))
    around = 4 * step(signals.spread)
    return _peak(score(signals.spread), near - around, near + around, around / 8)


def _peak(score: Callable[[Tensor], Tensor], low: float, high: float, step: float) -> float:
    """Where a score is largest, to 10⁻⁹: the best point of a grid, then of a closer grid around it, and so on."""
    grid = torch.arange(low, high + step / 2, step, dtype=torch.float64)
    while True:
        best = float(grid[torch.cat([score(grid[a : a + 64]) for a in range(0, len(grid), 64)]).argmax()])
        if step < 1e-9:
            return best
        grid, step = best + torch.linspace(-step, step, 17, dtype=torch.float64), step / 8
