"""Which rotation turns the q (or k) that an engine recorded before RoPE into the one it recorded after: the setting, by name.

    report = fit_rotation(before, after, n_head, config.rope, positions)
    report.verdict     "The engine rotated with theta 500,000 instead of 10,000: NMSE 2.1e−13 with it, 0.41 with the expected setting."

Everything an engine can set (layout, dimension, theta, scaling, factors, positions, magnitude) is changed one at a time, then two, then
three at a time, until what is left is no more than rounding.  At most one number that is no known one is measured with certainty: an
unknown theta together with an unknown scale of the positions is not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from quantscope.arch.config import RopeConfig
from quantscope.errors import NonFiniteError, ShapeError
from quantscope.language import say
from quantscope.metrics import nmse
from quantscope.phrases import joined, listed, paragraph
from quantscope.rotation.changes import MAKERS, number
from quantscope.rotation.signals import RotationFit, Setting, Signals
from quantscope.wording import sci, sig

Order: TypeAlias = Literal["canonical", "half", "interleaved"]

SETTLED = 2e-5  # NMSE that rounding q before and after to BF16 does not reach
EXPLAINED = 1e-3  # NMSE up to which a setting is named as the cause
AS_GOOD = 1.25  # a setting with fewer changes is preferred up to this multiple of the smallest NMSE
MOST_CHANGES = 3
PROMISING = 12  # settings with two changes to which a fitted number is tried as the third
MOST_SHOWN = 8


@dataclass(frozen=True)
class RotationReport:
    """fits: the best first, those that explain the record with the fewest changes; as_expected: whether the expected setting is among them.

    undecided: settings that fit as well as the first and are no more complicated.  order: the channels' order beside the reference's
    (None: unknown, or neither as in the reference nor permuted).  verdict: what to tell the reader.
    """

    expected_nmse: float
    fits: tuple[RotationFit, ...]
    as_expected: bool
    undecided: tuple[RotationFit, ...]
    order: Order | None
    verdict: str


def fit_rotation(
    before: Tensor,
    after: Tensor,
    n_head: int,
    expected: RopeConfig,
    positions: Sequence[int],
    factors: Tensor | None = None,
    reference: Tensor | None = None,
) -> RotationReport:
    """The settings of RoPE that map ``before`` to ``after``, the expected one first where it fits.

    before, after: [T,H·D], the engine's q or k, its own channel order; n_head: H (K for k); positions: of the T tokens.
    factors: rope_freqs.weight [R].  reference: the reference's ``before`` [T,H·D]: the order of the engine's channels is then found, and
    halves are expected of an engine that holds an interleaved model in Hugging Face's order (docs/decisions/0001).
    Raises ShapeError when the shapes do not fit together, NonFiniteError for NaN and infinity.
    """
    _check(before, after, n_head, expected, positions)
    if not before.any() or not after.any():
        verdict = say("q (or k) is zero before or after the rotation: nothing can be said about it.")
        return RotationReport(float(nmse(after.flatten(), before.flatten())), (), False, (), None, verdict)
    signals = Signals(before.reshape(len(positions), n_head, -1), after.reshape(len(positions), n_head, -1), positions)
    order = None if reference is None else channel_order(reference, before, n_head, expected.dim)
    if order in ("half", "interleaved"):
        expected = replace(expected, layout=order)
    return _report(signals, Setting(expected, factors), order)


def channel_order(reference: Tensor, before: Tensor, n_head: int, dim: int) -> Order | None:
    """How the channels of a head lie in ``before`` beside the reference's, both [T,H·D].

    "canonical": the same.  "half": channel 2i of the reference is channel i, 2i+1 is i + dim/2 (Hugging Face's order of an interleaved
    model).  "interleaved": the reverse of that.  None where none of them is the same signal.
    """
    if reference.shape != before.shape:
        return None
    heads = reference.reshape(len(reference), n_head, -1)  # [T,H,D]
    turning, still = heads[..., :dim], heads[..., dim:]
    halves = torch.cat([turning[..., 0::2], turning[..., 1::2], still], -1)
    pairs = torch.cat([torch.stack(turning.chunk(2, -1), -1).flatten(-2), still], -1)
    orders: dict[Order, Tensor] = {"canonical": heads, "half": halves, "interleaved": pairs}
    errors = {order: float(nmse(x.flatten(), before.flatten())) for order, x in orders.items()}
    best = min(errors, key=lambda order: errors[order])
    return best if errors[best] < 0.1 else None


def _check(before: Tensor, after: Tensor, n_head: int, rope: RopeConfig, positions: Sequence[int]) -> None:
    channels = before.shape[-1] if before.ndim == 2 else 0
    if before.shape != after.shape or not positions or len(before) != len(positions) or not channels or channels % (2 * n_head):
        raise ShapeError(
            f"RoPE check: expected q (or k) before and after of one shape [tokens, heads × channels] with {len(positions)} tokens and "
            f"{n_head} heads, found {tuple(before.shape)} and {tuple(after.shape)}. The tap or the number of heads is another one."
        )
    if rope.dim > channels // n_head:
        raise ShapeError(
            f"RoPE check: expected heads of at least {rope.dim} channels, which turn, found {channels // n_head}. The number of heads "
            f"({n_head}) is that of another tap: q has more heads than k where key/value heads are shared."
        )
    for name, x in (("before", before), ("after", after)):
        if not x.isfinite().all():
            raise NonFiniteError(
                f"RoPE check: q (or k) {name} the rotation has {int((~x.isfinite()).sum())} NaN or infinite values, expected none. Look "
                f"for the first tap that has one with `quantscope compare`: the fault is there."
            )


# ---- Search --------------------------------------------------------------------------------------------------------------


def _search(signals: Signals, expected: Setting) -> list[tuple[float, Setting]]:
    """Settings with their NMSE: the expected one, those with one change, and with more until that helps no further.

    A third change is looked for among known values only, except for the most promising settings: fitting takes a hundred times as long.
    """
    level = [(-1, expected)]  # number of the maker that changed it last
    found = [(signals.error(expected), expected)]
    for n_changes in range(1, MOST_CHANGES + 1):
        before = min(error for error, _ in found)
        n_fitted = len(level) if n_changes < MOST_CHANGES else PROMISING
        level = [pair for k, (last, s) in enumerate(level) for pair in _changed(s, last, signals, fitting=k < n_fitted)]
        rated = sorted(((signals.error(s), k) for k, (_, s) in enumerate(level)))
        found += [(error, level[k][1]) for error, k in rated]
        level = [level[k] for _, k in rated]
        best = min(error for error, _ in found)
        if best <= SETTLED or before <= AS_GOOD * best <= AS_GOOD * EXPLAINED:
            break
    return found


def _changed(s: Setting, last: int, signals: Signals, *, fitting: bool) -> Iterator[tuple[int, Setting]]:
    """The setting with one more change, of an axis that is as expected and by a maker after the last one."""
    for k, (axis, fitted, make) in enumerate(MAKERS):
        if k > last and axis not in s.differs and (fitting or not fitted):
            for words, changed in make(s, signals):
                names = s.fitted | {axis} if fitted else s.fitted
                yield k, replace(changed, differs={**s.differs, axis: words}, fitted=names)


def _report(signals: Signals, expected: Setting, order: Order | None) -> RotationReport:
    found = _search(signals, expected)
    enough = AS_GOOD * min(error for error, _ in found) + signals.floor

    def rank(pair: tuple[float, Setting]) -> tuple[bool, int, int, float]:
        error, s = pair
        if error > enough:
            return True, 0, 0, error
        return False, len(s.differs), len(s.fitted), float(f"{max(error, signals.floor):.2g}")  # rounding decides about nothing

    ranked = sorted(found, key=rank)
    good = [s for error, s in ranked if error <= enough]
    simplest = _simplest(good)
    others = [s for error, s in ranked if error > enough]
    fits = tuple(signals.verified(s) for s in (simplest + others)[:MOST_SHOWN])
    as_expected = good[0] is expected
    n_changes = max(1, len(good[0].differs))
    rivals = [s for s in (good if as_expected else simplest)[1:] if len(s.differs) == n_changes and len(s.fitted) == len(good[0].fitted)]
    undecided = tuple(signals.verified(s) for s in rivals)
    expected_nmse = signals.verified(expected).nmse
    verdict = paragraph([_verdict(signals, expected_nmse, fits[0], undecided, as_expected), _order_words(order)])
    return RotationReport(expected_nmse, fits, as_expected, undecided, order, verdict)


def _simplest(good: Sequence[Setting]) -> list[Setting]:
    """Without those that change all that a better one changes, and more or by a fitted number, and without other names for the same."""
    kept: list[Setting] = []
    for s in good:
        more = any(set(k.differs) <= set(s.differs) and (len(k.differs) < len(s.differs) or s.fitted) for k in kept)
        if not more and not any(_equivalent(k, s) for k in kept):
            kept.append(s)
    return kept


def _equivalent(a: Setting, b: Setting) -> bool:
    """Whether both turn everything alike: dividing positions by 4 is linear scaling by 4."""
    same = (a.rope.layout, a.rope.dim, a.rope.magnitude) == (b.rope.layout, b.rope.dim, b.rope.magnitude)
    return same and all(torch.allclose(x * a.frequencies, y * b.frequencies) for x, y in ((a.scale, b.scale), (a.start, b.start)))


# ---- Words ---------------------------------------------------------------------------------------------------------------


def _verdict(signals: Signals, expected_nmse: float, best: RotationFit, undecided: Sequence[RotationFit], as_expected: bool) -> str:
    if best.nmse > EXPLAINED:
        facts = {"left": sig(best.nmse, 2), "expected": sig(expected_nmse, 2)}
        if best.nmse < 0.5:
            unexplained = say(
                "No setting of RoPE explains what the engine made of q (or k): the closest is {setting}, which leaves NMSE {left} "
                "({expected} with the expected setting).",
                setting=best.text,
                **facts,
            )
        else:
            unexplained = say(
                "No setting of RoPE explains what the engine made of q (or k): the closest leaves NMSE {left} ({expected} with the "
                "expected setting).",
                **facts,
            )
        return paragraph([unexplained, _free(signals, best.setting)])
    rivals = _first(undecided)
    if as_expected:
        rope = best.setting.rope
        if not signals.positions.any():
            return say("Nothing can be said about the rotation: position 0 turns nothing, and nothing was turned. Record more positions.")
        text = say(
            "The engine rotated as expected (theta {theta}, {layout} pairs): NMSE {error}.",
            theta=number(rope.theta),
            layout=rope.layout,
            error=sci(expected_nmse, 2),
        )
        return paragraph([text, say("These positions do not tell it from {settings}.", settings=rivals) if undecided else ""])
    text = say(
        "The engine rotated with {setting}: NMSE {error} with it, {expected} with the expected setting.",
        setting=best.text,
        error=sci(best.nmse, 2),
        expected=sig(expected_nmse, 2),
    )
    return paragraph([text, say("As good: {settings}.", settings=rivals) if undecided else ""])


def _order_words(order: Order | None) -> str:
    if order in (None, "canonical"):
        return ""
    if order == "half":
        where = say(
            "Its channels lie in another order than the reference's: halves are pairs here, neighbours there, as in a Hugging Face "
            "checkpoint and its GGUF file."
        )
    else:
        where = say(
            "Its channels lie in another order than the reference's: neighbours are pairs here, halves there, as in a Hugging Face "
            "checkpoint and its GGUF file."
        )
    return paragraph([where, say("That by itself changes no attention score.")])


def _first(fits: Sequence[RotationFit], n: int = 3) -> str:
    more = len(fits) - n
    texts = [fit.text for fit in fits[:n]]
    return say("{settings} or {n} more", settings=joined(texts), n=more) if more > 0 else say(" or ").join(texts)


def _free(signals: Signals, s: Setting) -> str:
    """Whether the heads at least turn alike, pair by pair, by whatever angle; a single head always does."""
    if signals.before.shape[1] == 1:
        return say("Either its frequencies follow no known rule, or it recorded something else than what it rotated.")
    pairs = signals.pairs(s.rope)
    left = (pairs.rest + pairs.energy - 2 * float(pairs.cross.abs().sum())) / pairs.total
    if left > EXPLAINED:
        return say("The heads do not turn alike: it recorded something else than what it rotated, or does more than rotate.")
    turns = pairs.cross[1:] * pairs.cross[:-1].conj()
    if len(turns) == 0 or (signals.positions.diff() != 1).any():
        return say("All heads do turn alike in {layout} pairs: the frequencies follow another rule.", layout=s.rope.layout)
    rates, expected = turns.sum(0).angle(), s.frequencies
    some = sorted({0, len(rates) // 2, len(rates) - 1})
    shown = [
        say("pair {i} by {rate} (setting: {expected})", i=i, rate=sig(float(rates[i]), 4), expected=sig(float(expected[i]), 4))
        for i in some
    ]
    return say(
        "All heads do turn alike in {layout} pairs, but by other frequencies [rad per position]: {pairs}.",
        layout=s.rope.layout,
        pairs=listed(shown),
    )
