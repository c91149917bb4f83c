"""Tables about whole distributions: KL divergence, perplexity and their spread, and which of two variants is better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from quantscope.report.table import Section, Table, label
from quantscope.results import LogitStats, Paired, Study
from quantscope.wording import MISSING, count, fixed, listed, percent, printable, sig

Columns: TypeAlias = tuple[tuple[str, Callable[[LogitStats], str]], ...]  # heading, what stands below it


def logits(study: Study) -> Section:
    """KL divergence, top-1 agreement and perplexity with their standard errors; the distributions behind the means when there is a text."""
    shown = [(v, v.logits) for v in study.variants if v.logits]
    n = listed(f"{i:,}" for i in sorted({s.n_positions for _, s in shown}))
    tables = [_of_variants(study, _MEANS)]
    if study.text:
        tables += [_of_variants(study, columns, caption) for caption, columns in _DISTRIBUTIONS.items()]
    return Section(
        "Logits",
        f"Over {n} positions, ± standard error. KL divergence of the next-token distribution from the original's: 0 = the same.",
        tuple(t for t in tables if t is not None),
    )


def _of_variants(study: Study, columns: Columns, caption: str = "") -> Table | None:
    """A row per variant that has any of the numbers; columns without a number are left out, and so is a table without columns."""
    shown = [(v, v.logits) for v in study.variants if v.logits]
    used = [(name, show) for name, show in columns if any(show(s) != MISSING for _, s in shown)]
    rows = [(label(study, v), *(show(s) for _, show in used)) for v, s in shown]
    having = tuple(row for row in rows if set(row[1:]) != {MISSING})
    return Table(("variant", *(name for name, _ in used)), having, caption) if used else None


def _with_error(value: str, error: str) -> str:
    return value if value == MISSING or error in (MISSING, "NaN") else f"{value} ± {error}"


def _ppl_change(s: LogitStats) -> str:
    """Change of perplexity against the original, exp(ln ratio) − 1."""
    if s.ln_ppl_ratio is None:
        return MISSING
    return f"{'+' if s.ln_ppl_ratio >= 0 else ''}{fixed(100 * math.expm1(s.ln_ppl_ratio), 2)}%"


def _same_top(s: LogitStats) -> str:
    if s.top1_agree is None:
        return MISSING
    return _with_error(f"{fixed(100 * s.top1_agree, 2)}%", MISSING if s.top1_agree_se is None else f"{sig(100 * s.top1_agree_se, 2)}%")


def _kl_interval(s: LogitStats) -> str:
    return MISSING if s.kl_nats_low is None else f"{sig(s.kl_nats_low)} to {sig(s.kl_nats_high)}"


def _dp(x: float | None) -> str:
    return MISSING if x is None else f"{fixed(100 * x, 3)}%"


_MEANS: Columns = (
    ("KL [nats]", lambda s: _with_error(sig(s.kl_nats), sig(s.kl_nats_se, 2))),
    ("same top token", _same_top),
    ("RMS Δp", lambda s: _with_error(percent(s.rms_dp, 3), percent(s.rms_dp_se))),
    ("perplexity", lambda s: _with_error(fixed(s.ppl, 3), fixed(s.ppl_se, 3))),
    ("change", _ppl_change),
)
_DISTRIBUTIONS: dict[str, Columns] = {
    "KL divergence [nats]: 95 % interval of the mean, and percentiles over the positions": (
        ("mean", _kl_interval),
        ("1 %", lambda s: sig(s.kl_nats_p01, 2)),
        ("median", lambda s: sig(s.kl_nats_median)),
        ("90 %", lambda s: sig(s.kl_nats_p90)),
        ("99 %", lambda s: sig(s.kl_nats_p99)),
        ("99.9 %", lambda s: sig(s.kl_nats_p999)),
        ("largest", lambda s: sig(s.kl_nats_max)),
    ),
    "Δp, the change of the next token's probability: mean, and percentiles over the positions": (
        ("mean", lambda s: _with_error(_dp(s.dp_mean), _dp(s.dp_mean_se))),
        ("smallest", lambda s: _dp(s.dp_min)),
        ("1 %", lambda s: _dp(s.dp_p01)),
        ("10 %", lambda s: _dp(s.dp_p10)),
        ("median", lambda s: _dp(s.dp_median)),
        ("90 %", lambda s: _dp(s.dp_p90)),
        ("99 %", lambda s: _dp(s.dp_p99)),
        ("largest", lambda s: _dp(s.dp_max)),
    ),
    "Perplexity against the original's, paired by position": (
        ("ln ratio", lambda s: _with_error(sig(s.ln_ppl_ratio), sig(s.ln_ppl_ratio_se, 2))),
        ("ratio", lambda s: _with_error(fixed(s.ppl_ratio, 5), fixed(s.ppl_ratio_se, 5))),
        ("difference", lambda s: _with_error(fixed(s.ppl_diff, 4), fixed(s.ppl_diff_se, 4))),
        ("correlation of ln PPL", lambda s: MISSING if s.ln_ppl_cor is None else f"{fixed(100 * s.ln_ppl_cor, 3)}%"),
    ),
}


def paired(study: Study) -> Section:
    """Neighbours in the order of their KL divergence, compared position by position; nothing without a text."""
    pairs = study.neighbours() if study.text else ()
    rows = tuple((printable(p.b), printable(p.a), sig(p.mean_nats), _interval(p), "yes" if p.better else "not told apart") for p in pairs)
    unit = count(pairs[0].n_units, pairs[0].unit) if pairs else ""
    return Section(
        "Which is better",
        f"Every two neighbours in the order of KL on the same positions; the interval is of the mean difference (Student's t over {unit}). "
        f"study.json has all pairs.",
        (Table(("closer", "farther", "by [nats]", "95 % interval", "settled"), rows, text_columns=frozenset({0, 1, 4})),) if rows else (),
    )


def _interval(p: Paired) -> str:
    return f"{sig(p.low_nats)} to {sig(p.high_nats)}"
