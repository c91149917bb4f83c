"""Tables about whole distributions: KL divergence, perplexity and their spread, and which of two variants is better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from quantscope.findings.logits import units
from quantscope.language import mark, say
from quantscope.phrases import between, listed
from quantscope.report.table import Section, Table, label
from quantscope.results import LogitStats, Paired, Study
from quantscope.wording import MISSING, fixed, percent, printable, sig

Columns: TypeAlias = tuple[tuple[str, Callable[[LogitStats], str]], ...]  # heading, what stands below it


def logits(study: Study) -> Section:
    """KL divergence, top-1 agreement and perplexity with their standard errors; the distributions behind the means when there is a text."""
    shown = [(v, v.logits) for v in study.variants if v.logits]
    n = listed(f"{i:,}" for i in sorted({s.n_positions for _, s in shown}))
    tables = [_of_variants(study, _MEANS)]
    if study.text:
        tables += [_of_variants(study, columns, say(caption)) for caption, columns in _DISTRIBUTIONS.items()]
    return Section(
        say("Logits"),
        say(
            "Over {n} positions, ± standard error. KL divergence of the next-token distribution from the original's: 0 = the same.",
            n=n,
        ),
        tuple(t for t in tables if t is not None),
    )


def _of_variants(study: Study, columns: Columns, caption: str = "") -> Table | None:
    """A row per variant that has any of the numbers; columns without a number are left out, and so is a table without columns."""
    shown = [(v, v.logits) for v in study.variants if v.logits]
    used = [(name, show) for name, show in columns if any(show(s) != MISSING for _, s in shown)]
    rows = [(label(study, v), *(show(s) for _, show in used)) for v, s in shown]
    having = tuple(row for row in rows if set(row[1:]) != {MISSING})
    return Table((say("variant"), *(say(name) for name, _ in used)), having, caption) if used else None


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
    return MISSING if s.kl_nats_low is None else between(sig(s.kl_nats_low), sig(s.kl_nats_high))


def _dp(x: float | None) -> str:
    return MISSING if x is None else f"{fixed(100 * x, 3)}%"


_MEANS: Columns = (
    (mark("KL [nats]"), lambda s: _with_error(sig(s.kl_nats), sig(s.kl_nats_se, 2))),
    (mark("same top token"), _same_top),
    (mark("RMS Δp"), lambda s: _with_error(percent(s.rms_dp, 3), percent(s.rms_dp_se))),
    (mark("perplexity"), lambda s: _with_error(fixed(s.ppl, 3), fixed(s.ppl_se, 3))),
    (mark("change"), _ppl_change),
)
_DISTRIBUTIONS: dict[str, Columns] = {
    mark("KL divergence [nats]: 95 % interval of the mean, and percentiles over the positions"): (
        (mark("mean"), _kl_interval),
        (mark("1 %"), lambda s: sig(s.kl_nats_p01, 2)),
        (mark("median"), lambda s: sig(s.kl_nats_median)),
        (mark("90 %"), lambda s: sig(s.kl_nats_p90)),
        (mark("99 %"), lambda s: sig(s.kl_nats_p99)),
        (mark("99.9 %"), lambda s: sig(s.kl_nats_p999)),
        (mark("largest"), lambda s: sig(s.kl_nats_max)),
    ),
    mark("Δp, the change of the next token's probability: mean, and percentiles over the positions"): (
        (mark("mean"), lambda s: _with_error(_dp(s.dp_mean), _dp(s.dp_mean_se))),
        (mark("smallest"), lambda s: _dp(s.dp_min)),
        (mark("1 %"), lambda s: _dp(s.dp_p01)),
        (mark("10 %"), lambda s: _dp(s.dp_p10)),
        (mark("median"), lambda s: _dp(s.dp_median)),
        (mark("90 %"), lambda s: _dp(s.dp_p90)),
        (mark("99 %"), lambda s: _dp(s.dp_p99)),
        (mark("largest"), lambda s: _dp(s.dp_max)),
    ),
    mark("Perplexity against the original's, paired by position"): (
        (mark("ln ratio"), lambda s: _with_error(sig(s.ln_ppl_ratio), sig(s.ln_ppl_ratio_se, 2))),
        (mark("ratio"), lambda s: _with_error(fixed(s.ppl_ratio, 5), fixed(s.ppl_ratio_se, 5))),
        (mark("difference"), lambda s: _with_error(fixed(s.ppl_diff, 4), fixed(s.ppl_diff_se, 4))),
        (mark("correlation of ln PPL"), lambda s: MISSING if s.ln_ppl_cor is None else f"{fixed(100 * s.ln_ppl_cor, 3)}%"),
    ),
}


def paired(study: Study) -> Section:
    """Neighbours in the order of their KL divergence, compared position by position; nothing without a text."""
    pairs = study.neighbours() if study.text else ()
    rows = tuple((printable(p.b), printable(p.a), sig(p.mean_nats), _interval(p), _settled(p)) for p in pairs)
    columns = (say("closer"), say("farther"), say("by [nats]"), say("95 % interval"), say("settled"))
    return Section(
        say("Which is better"),
        say(
            "Every two neighbours in the order of KL on the same positions; the interval is of the mean difference (Student's t over "
            "{units}). study.json has all pairs.",
            units=units(pairs[0]) if pairs else "",
        ),
        (Table(columns, rows, text_columns=frozenset({0, 1, 4})),) if rows else (),
    )


def _settled(p: Paired) -> str:
    return say("yes") if p.better else say("not told apart")


def _interval(p: Paired) -> str:
    return between(sig(p.low_nats), sig(p.high_nats))
