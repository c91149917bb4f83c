"""What is known of a case, for the ledger of hypotheses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

from quantscope.compare import Comparison
from quantscope.diagnose.activation_rounding import ActivationRounding
from quantscope.diagnose.attribution import LogitSplit
from quantscope.diagnose.causes import Causes
from quantscope.diagnose.evidence import Evidence
from quantscope.diagnose.ledger import Divergence, Facts, split_facts
from quantscope.errors import QuantscopeError
from quantscope.metrics import rms
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Trace
from quantscope.weight_compare import compare_weights
from quantscope.weights import Weights


def facts_of(
    e: Evidence,
    ref: Trace | None = None,
    original: Trace | None = None,
    c: Comparison | None = None,
    causes: Causes | None = None,
    logits: LogitSplit | None = None,
    rounding: ActivationRounding | None = None,
) -> Facts:
    by_id = {r.id: r.conclusion for r in e.records}
    known: Mapping[str, bool | None] = {"agrees": True, "differs": False, "not measured": None}
    first = None if c is None else c.first_divergence
    replayed, searched = (None, None) if causes is None else (causes.replayed, causes.searched)
    return Facts(
        model=e.model,
        engine=e.against or e.test.origin.engine,
        original=e.original,
        same_file=known[by_id.get("file", "not measured")],
        same_ids=known[by_id.get("ids", "not measured")],
        same_tokenization=known[by_id.get("tokenizer", "not measured")],
        **({} if logits is None else split_facts(logits)),  # type: ignore[arg-type]
        growth_original=_growth(original),
        growth_quantized=_growth(ref),
        growth_engine=_growth(e.test),
        compared_taps=None if c is None else sum(row.verdict != "not shown" for row in c.rows),
        first_divergence=None if first is None else Divergence(first.tap, first.nmse, first.floor),
        convicted=None if replayed is None else tuple(row.tap for row in replayed.those("convicted")),
        other_tensors=_other_tensors(e),
        rounding=rounding,
        excluded=() if searched is None else searched.excluded,
        untestable=() if searched is None else searched.untestable,
    )


def _growth(trace: Trace | None) -> float | None:
    """Output RMS of the last layer over that of the first, of whole tensors over all positions."""
    if trace is None or trace.origin.config is None:
        return None
    first, last = (trace.find(f"l_out-{i}", Full) for i in (0, int(trace.origin.config["n_layer"]) - 1))
    if first is None or last is None or first.values.shape != last.values.shape:
        return None
    return float(rms(last.values.flatten()) / rms(first.values.flatten()))


def _other_tensors(e: Evidence) -> tuple[str, ...] | None:
    """Tensors of the file that differ from the original's beyond their types; None without an original."""
    if e.original is None:
        return None
    try:
        with closing(open_source(e.original)) as a, closing(open_source(e.model)) as b:
            return tuple(row.name for row in compare_weights(Weights(a), Weights(b)).unexplained)
    except QuantscopeError:
        return None
