"""The formulas, nothing else: errors between two signals, comparison of logits, and the quantities of the layer tables.

Metrics of two signals take ``(ref, test)``, in that order, and reduce the last axis; flatten first to reduce everything.
Sums are in float64 whatever comes in.  The second half works on plain numbers, so that tables from elsewhere can be fed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from quantscope.errors import ShapeError

FLAG_TIMES = 4.0  # a cell stands out above this multiple of the median of the other variants


def rms(x: Tensor) -> Tensor:
    """Root mean square, sqrt(Σ x² / E).

    x: [..., E], any float dtype; sums in float64.  Returns [...], in the unit of x.
    """
    return x.double().square().mean(-1).sqrt()


def mean(x: Tensor) -> Tensor:
    """Arithmetic mean, Σ x / E.

    x: [..., E], any float dtype; sums in float64.  Returns [...], in the unit of x.
    """
    return x.double().mean(-1)


def nmse(ref: Tensor, test: Tensor) -> Tensor:
    """Normalized mean squared error, Σ (ref − test)² / Σ ref².

    ref, test: [..., E], any float dtype; sums in float64.  Returns [...], a ratio; 0 where identical (also where both are
    zero), +inf where only ref is zero.
    Raises ShapeError when the shapes differ.  Source: as in ggml's test-backend-ops.
    """
    same_shape(ref, test)
    r = ref.double()
    error = (r - test.double()).square().sum(-1)
    return torch.where(error == 0, 0.0, error / r.square().sum(-1))


def sqnr_db(ref: Tensor, test: Tensor) -> Tensor:
    """Signal-to-quantization-noise ratio, −10·log10(nmse) = 10·log10(Σ ref² / Σ (ref − test)²).

    ref, test: [..., E], any float dtype; sums in float64.  Returns [...], dB; +inf where identical.
    Raises ShapeError when the shapes differ.  Source: textbook definition, as in torchao's compute_sqnr.
    """
    return nmse(ref, test).log10().mul(-10)


def cos_sim(ref: Tensor, test: Tensor) -> Tensor:
    """Cosine similarity, Σ ref·test / sqrt(Σ ref² · Σ test²).

    ref, test: [..., E], any float dtype; sums in float64.  Returns [...], in −1 … 1; 1 where both are all zero, 0 where one
    is, as a zero vector has no direction.
    Raises ShapeError when the shapes differ.
    """
    same_shape(ref, test)
    r, t = ref.double(), test.double()
    norm_r, norm_t = r.norm(dim=-1), t.norm(dim=-1)
    cosine: Tensor = ((r * t).sum(-1) / norm_r / norm_t).clamp(-1, 1)  # divided twice: the product of tiny norms would be 0
    return torch.where((norm_r == 0) | (norm_t == 0), (norm_r == norm_t).double(), cosine)


def kl_nats(ref: Tensor, test: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the next-token distributions, Σ p·(ln p − ln q), p = softmax(ref), q = softmax(test).

    ref, test: logits [..., V], any float dtype; log_softmax and sums in float64.  Returns [...], nats, ≥ 0 (rounding below
    zero is cut); a token with p = 0 contributes nothing; +inf where q = 0 < p.
    Raises ShapeError when the shapes differ.  Source: definition; llama-perplexity clamps at max − 16 instead.
    """
    same_shape(ref, test)
    lp, lq = ref.double().log_softmax(-1), test.double().log_softmax(-1)
    p = lp.exp()
    return torch.where(p == 0, 0.0, p * (lp - lq)).sum(-1).clamp(min=0)


def top1_agree(ref: Tensor, test: Tensor) -> Tensor:
    """Whether both have their largest logit at the same token, argmax(ref) = argmax(test).

    ref, test: logits [..., V].  Returns bool [...]; of equal largest logits the smallest id counts, on both sides.
    Raises ShapeError when the shapes differ.
    """
    same_shape(ref, test)
    return first_argmax(ref) == first_argmax(test)


def first_argmax(logits: Tensor) -> Tensor:
    """The smallest id among the largest logits; torch.argmax may return any of them.

    logits: [..., V].  Returns int64 [...]; 0 where a logit is NaN.
    """
    return (logits == logits.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)


def log_prob(logits: Tensor, ids: Tensor) -> Tensor:
    """ln p(id), p = softmax(logits).

    logits: [..., V], any float dtype; log_softmax in float64.  ids: int64 [...].  Returns [...], nats, ≤ 0.
    Raises ShapeError when the leading shapes differ.
    """
    if logits.shape[:-1] != ids.shape:
        raise ShapeError(f"log_prob: expected one id per row of logits {tuple(logits.shape)}, found ids {tuple(ids.shape)}.")
    return logits.double().log_softmax(-1).gather(-1, ids.long()[..., None])[..., 0]


def ppl(logits: Tensor, ids: Tensor) -> Tensor:
    """Perplexity, exp(mean −ln p(id)).

    logits: [..., V]; ids: int64 [...], the token that follows each position.  Returns a scalar, in tokens, ≥ 1.
    Raises ShapeError when the leading shapes differ.
    """
    return (-log_prob(logits, ids).mean()).exp()


def rms_dp(ref: Tensor, test: Tensor, ids: Tensor) -> Tensor:
    """Root mean square change of the probability of the correct token, sqrt(mean (p_test(id) − p_ref(id))²).

    ref, test: logits [..., V]; ids: int64 [...], the token that follows each position.  Returns a scalar, in 0 … 1.
    Raises ShapeError when the shapes differ.  Source: "RMS Δp" of llama-perplexity.
    """
    same_shape(ref, test)
    return (log_prob(test, ids).exp() - log_prob(ref, ids).exp()).square().mean().sqrt()


def rank(logits: Tensor, ids: Tensor) -> Tensor:
    """1 + the number of logits before this one in falling order; equal logits are ordered by id.

    logits: [..., V]; ids: int64 [...].  Returns int64 [...], 1 … V; the token greedy decoding takes has rank 1.
    Raises ShapeError when the leading shapes differ.
    """
    if logits.shape[:-1] != ids.shape:
        raise ShapeError(f"rank: expected one id per row of logits {tuple(logits.shape)}, found ids {tuple(ids.shape)}.")
    column = ids.long()[..., None]  # [..., 1]
    own = logits.gather(-1, column)
    earlier = torch.arange(logits.shape[-1], device=logits.device) < column
    return 1 + ((logits > own) | ((logits == own) & earlier)).sum(-1)


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error, sqrt(Σ (x − mean)² / (n − 1) / n).

    values: [n], any float dtype or bool; sums in float64.  The standard error takes the values as independent and is NaN
    for n < 2; both are NaN for n = 0.
    """
    x = values.double().flatten()
    n = x.numel()
    m = x.mean().item() if n else math.nan
    return m, (x.std(correction=1).item() / math.sqrt(n) if n > 1 else math.nan)


def same_shape(ref: Tensor, test: Tensor) -> None:
    """ShapeError unless both tensors have the same shape (no broadcasting: it would hide a transposed signal)."""
    if ref.shape != test.shape:
        raise ShapeError(
            f"two signals to compare: expected equal shapes, found ref {tuple(ref.shape)} and test {tuple(test.shape)}. "
            f"They probably come from different prompts or different models: compare runs on the same token ids."
        )


# ---- Quantities of the layer tables, on plain numbers -------------------------------------------------------------------


def rms_growth(output_rms: Sequence[float]) -> list[float]:
    """RMS growth, output RMS(i) / output RMS(0), for each layer i; 1 for the first.

    NaN for every layer when the first RMS is 0 or NaN.  Source: the seed analysis of 2025-10-08.
    """
    return [_ratio(x, output_rms[0]) for x in output_rms]


def mean_drift(means: Sequence[float]) -> float:
    """Mean drift, mean(last layer) / mean(first layer), with sign: negative when the mean changed its sign on the way.

    NaN when the first mean is 0.  A large value says little where the first mean is near zero: see ``mean_to_rms``.
    Source: the seed analysis of 2025-10-08.
    """
    return _ratio(means[-1], means[0])


def mean_to_rms(mean_value: float, rms_value: float) -> float:
    """|mean| / RMS, 0 … 1: how much of a signal is a common offset.  NaN when the RMS is 0."""
    return abs(_ratio(mean_value, rms_value))


def times_of_others(value: float, others: Sequence[float]) -> tuple[float, float]:
    """(value / median(others), median(others)): how far one cell is from the same cell elsewhere.

    +inf when only the median is 0, NaN when both are, or when there is nothing finite to compare with.
    """
    finite = [x for x in others if math.isfinite(x)]
    if not finite:
        return math.nan, math.nan
    m = median(finite)
    return (math.inf if m == 0 < value else _ratio(value, m)), m


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


@dataclass(frozen=True)
class Knee:
    """From ``layer`` on the curve climbs by ``after`` per layer, before it by ``before``, in the unit of the curve."""

    layer: float
    before: float
    after: float


MIN_KNEE_POINTS = 6  # a bent line has 4 parameters


def knee(layers: Sequence[float], values: Sequence[float], min_gain: float = 0.5) -> Knee | None:
    """Where a curve starts to climb faster: the best fit of a + b·i + c·max(0, i − k) with c > 0, over the bends k.

    layers: rising layer numbers; values: one per layer, e.g. the error in dB.  The bend k is one of the inner layers and the
    faster part is said to begin at the layer after it.  None with fewer than 6 points, when a value is not finite, when no
    bend turns upward, and when the bend does not take away at least ``min_gain`` of the squared residuals that a straight
    line leaves (then the curve is as well described without a knee).  Source: least squares with one free knot.
    """
    x, y = torch.tensor(layers, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
    if len(x) < MIN_KNEE_POINTS or not y.isfinite().all():
        return None
    straight = torch.stack([torch.ones_like(x), x], 1)
    line = _residual(straight, y)
    best: tuple[float, int, Tensor] | None = None
    for j in range(1, len(x) - 1):
        bent = torch.column_stack([straight, (x - x[j]).clamp(min=0)])
        fit = torch.linalg.lstsq(bent, y[:, None]).solution[:, 0]
        rest = (bent @ fit - y).square().sum().item()
        if fit[2] > 0 and (best is None or rest < best[0]):
            best = rest, j, fit
    if best is None or best[0] > (1 - min_gain) * line or line <= 1e-12 * y.square().sum().item():
        return None
    _, j, fit = best
    return Knee(layer=float(x[j + 1]), before=fit[1].item(), after=(fit[1] + fit[2]).item())


def _residual(columns: Tensor, y: Tensor) -> float:
    """Σ (fit − y)² of the least-squares fit."""
    fit = torch.linalg.lstsq(columns, y[:, None]).solution[:, 0]
    return float((columns @ fit - y).square().sum())
