"""The diagnosis in sentences: what is wrong, how surely, and what this evidence cannot tell.

Never "no bug": within expected arithmetic means that nothing was found beyond it, with what is excluded and what could not have shown.
"""

from __future__ import annotations

from dataclasses import replace

from quantscope.diagnose.causes import Causes, Named
from quantscope.diagnose.diagnosis import Diagnosis
from quantscope.diagnose.faults import FAULTS
from quantscope.explain import MADE_BY
from quantscope.model.taps import stem_of
from quantscope.wording import count, listed, percent, some

NO_IDS = "the trace does not say its token ids, and it has no whole tensors that could be judged without."
MOST = 6  # names that a sentence lists
LEVELS = (
    "not comparable",
    "within expected arithmetic",
    "excess like rounding",
    "structured excess",
    "operation convicted",
    "cause consistent",
)


def answer(d: Diagnosis) -> str:
    """One paragraph, the verdict first."""
    if d.verdict in ("not comparable", "tokenizer", "file"):
        return _stopped(d)
    if d.probe:
        shown = f"The prompt in one batch is within its floors; the probe `{d.probe}` is not. "
        return shown + answer(replace(d, probe=""))
    if d.verdict == "engine":
        assert d.causes is not None
        return f"{_ENGINE[min(d.causes.level, 5)](d, d.causes)}{_separating(d.causes)}"
    if d.verdict == "activation rounding":
        return (
            f"Activation rounding: the token changes because {d.engine} rounds activations, as it is expected to; neither the code nor the "
            f"weights are at fault. {d.about_logits[-1] if d.about_logits else ''}"
        ).rstrip()
    if d.verdict == "quantization":
        return f"The quantization: computed exactly, the file already gives another token than the original. {_within(d)}"
    return _within(d)


def _stopped(d: Diagnosis) -> str:
    differing = next((r for r in d.evidence if r.conclusion == "differs"), None)
    said = differing.text if differing else f"{NO_IDS} Give what the engine ran with `--tokens 1,2,3` or `--prompt TEXT`."
    head = {"tokenizer": "The prompt: other token ids reached the engine", "file": "The file"}.get(d.verdict, "Not comparable")
    return f"{head}: {said}"


def _consistent(d: Diagnosis, c: Causes) -> str:
    faults = [_fault(n) for n in c.named]
    if len(faults) == 1:
        return f"The engine: {d.engine} {faults[0]}. With this fault the reference shows what the engine showed."
    numbered = "; ".join(f"({k}) it {fault}" for k, fault in enumerate(faults, 1))
    return f"The engine: {d.engine} has {count(len(faults), 'fault')} at once: {numbered}. Together they give what the engine showed."


def _fault(n: Named) -> str:
    twins = [says(name) for name in n.twins]
    alike = f" (or {', or '.join(twins)}: this evidence cannot tell)" if twins else ""
    return f"{n.instance.says} [{n.instance.label}; {n.where}]{alike}"


def says(name: str) -> str:
    """What an engine with the fault of this name does."""
    return next(f.says for f in FAULTS if f.name == name).replace(" ({})", "").replace(" {}", "")


def _convicted(d: Diagnosis, c: Causes) -> str:
    taps = c.taps
    known = f" {_consistent(d, c)}" if c.named else ""
    rest = listed(c.unexplained[:MOST]) + (f" and {len(c.unexplained) - MOST} more" if len(c.unexplained) > MOST else "")
    wrong = f"{count(len(taps), 'operation')} of {d.engine} {'is' if len(taps) == 1 else 'are'} wrong"
    first = f"recomputed from its own inputs, {wrong}, first {taps[0]} ({_made_by(taps[0])})"
    return f"The engine: {first}.{known} None of the known faults explains {rest}."


def _structured(d: Diagnosis, c: Causes) -> str:
    taps = c.taps or ([d.comparison.first_divergence.tap] if d.comparison and d.comparison.first_divergence else [])
    first = f"; the first tap beyond its floor is {taps[0]} ({_made_by(taps[0])})" if taps else ""
    near = [x for x in c.alternatives if x.explained > 0][:1]
    nearest = f" The nearest, {near[0].label}, explains {percent(near[0].explained)} of it." if near else ""
    return (
        f"The engine: {d.engine} differs from the exact run of the same file by more than its arithmetic explains{first}. "
        f"None of the known faults is consistent with it.{nearest}"
    )


def _small(d: Diagnosis, c: Causes) -> str:
    taps = c.taps or ("a tap",)
    return (
        f"Arithmetic that is not modelled: {d.engine} exceeds the predicted rounding from {taps[0]} on, but a little and without a "
        f"direction (gain 1), as another rounding would. Not shown to be a fault."
    )


_ENGINE = {2: _small, 3: _structured, 4: _convicted, 5: _consistent}


def _within(d: Diagnosis) -> str:
    searched = d.causes.searched if d.causes else None
    n = 0 if d.comparison is None else sum(row.verdict == "within" for row in d.comparison.rows)
    excluded, hidden = (searched.excluded, searched.untestable) if searched else ((), ())
    out = f" {len(excluded)} of the {len(excluded) + len(hidden)} known faults would have shown and are excluded." if excluded else ""
    untested = f" Not testable with this evidence: {some(hidden, MOST)}." if hidden else ""
    return f"Nothing found beyond the expected arithmetic of {d.engine} at {count(n, 'tap')}.{out}{untested}"


def _separating(c: Causes) -> str:
    return f" What would tell them apart: {c.separating}." if c.separating else ""


def _made_by(tap: str) -> str:
    return MADE_BY.get(stem_of(tap), ("an operation of its own", ()))[0]
