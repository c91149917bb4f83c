"""The diagnosis in sentences: what is wrong, how surely, and what this evidence cannot tell.

Never "no bug": within expected arithmetic means that nothing was found beyond it, with what is excluded and what could not have shown.
"""

from __future__ import annotations

from dataclasses import replace

from quantscope.diagnose.causes import Causes, Named
from quantscope.diagnose.diagnosis import Diagnosis
from quantscope.diagnose.faults import FAULTS
from quantscope.explain import MADE_BY
from quantscope.language import mark, say, translated
from quantscope.model.taps import stem_of
from quantscope.phrases import clauses, count, listed_some, paragraph, some
from quantscope.wording import percent

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
        shown = say("The prompt in one batch is within its floors; the probe `{probe}` is not.", probe=d.probe)
        return paragraph([shown, answer(replace(d, probe=""))])
    if d.verdict == "engine":
        assert d.causes is not None
        return paragraph([_ENGINE[min(d.causes.level, 5)](d, d.causes), _separating(d.causes)])
    if d.verdict == "activation rounding":
        return paragraph([say(_ROUNDED, engine=d.engine), d.about_logits[-1] if d.about_logits else ""])
    if d.verdict == "quantization":
        head = say("The quantization: computed exactly, the file already gives another token than the original.")
        return paragraph([head, _within(d)])
    return _within(d)


_ROUNDED = mark(
    "Activation rounding: the token changes because {engine} rounds activations, as it is expected to; neither the code nor the weights "
    "are at fault."
)


def _stopped(d: Diagnosis) -> str:
    differing = next((r for r in d.evidence if r.conclusion == "differs"), None)
    if differing is None:
        said = say(
            "the trace does not say its token ids, and it has no whole tensors that could be judged without. Give what the engine ran with "
            "`--tokens 1,2,3` or `--prompt TEXT`."
        )
    else:
        said = differing.text
    if d.verdict == "tokenizer":
        return say("The prompt: other token ids reached the engine: {found}", found=said)
    return say("The file: {found}", found=said) if d.verdict == "file" else say("Not comparable: {found}", found=said)


def _consistent(d: Diagnosis, c: Causes) -> str:
    faults = [_fault(n) for n in c.named]
    if len(faults) == 1:
        return say(
            "The engine: {engine} {fault}. With this fault the reference shows what the engine showed.", engine=d.engine, fault=faults[0]
        )
    return say(
        "The engine: {engine} has {faults} at once: {each}. Together they give what the engine showed.",
        engine=d.engine,
        faults=count(len(faults), "fault"),
        each=clauses(say("({k}) it {fault}", k=k, fault=fault) for k, fault in enumerate(faults, 1)),
    )


def _fault(n: Named) -> str:
    facts = {"fault": n.instance.says, "name": n.instance.label, "where": n.where}
    if not n.twins:
        return say("{fault} [{name}; {where}]", **facts)
    return say(
        "{fault} [{name}; {where}] (or {twins}: this evidence cannot tell)",
        twins=say(", or ").join(says(name) for name in n.twins),
        **facts,
    )


def says(name: str) -> str:
    """What an engine with the fault of this name does, without its place."""
    template = translated(next(f.says for f in FAULTS if f.name == name))
    for place in (" ({place})", "（{place}）", " {place}", "{place}"):
        template = template.replace(place, "")
    return template


def _convicted(d: Diagnosis, c: Causes) -> str:
    taps = c.taps
    first = say(
        "The engine: recomputed from its own inputs, {operations} of {engine} {_are} wrong, first {tap} ({operation}).",
        operations=count(len(taps), "operation"),
        engine=d.engine,
        _are="is" if len(taps) == 1 else "are",
        tap=taps[0],
        operation=_made_by(taps[0]),
    )
    rest = say("None of the known faults explains {taps}.", taps=listed_some(c.unexplained, MOST))
    return paragraph([first, _consistent(d, c) if c.named else "", rest])


def _structured(d: Diagnosis, c: Causes) -> str:
    taps = c.taps or ([d.comparison.first_divergence.tap] if d.comparison and d.comparison.first_divergence else [])
    if taps:
        first = say(
            "The engine: {engine} differs from the exact run of the same file by more than its arithmetic explains; the first tap beyond "
            "its floor is {tap} ({operation}).",
            engine=d.engine,
            tap=taps[0],
            operation=_made_by(taps[0]),
        )
    else:
        first = say(
            "The engine: {engine} differs from the exact run of the same file by more than its arithmetic explains.", engine=d.engine
        )
    unknown = say("None of the known faults is consistent with it.")
    near = [x for x in c.alternatives if x.explained > 0][:1]
    nearest = say("The nearest, {fault}, explains {share} of it.", fault=near[0].label, share=percent(near[0].explained)) if near else ""
    return paragraph([first, unknown, nearest])


def _small(d: Diagnosis, c: Causes) -> str:
    return paragraph(
        [
            say(
                "Arithmetic that is not modelled: {engine} exceeds the predicted rounding from {tap} on, but a little and without a "
                "direction (gain 1), as another rounding would.",
                engine=d.engine,
                tap=c.taps[0] if c.taps else say("a tap"),
            ),
            say("Not shown to be a fault."),
        ]
    )


_ENGINE = {2: _small, 3: _structured, 4: _convicted, 5: _consistent}


def _within(d: Diagnosis) -> str:
    searched = d.causes.searched if d.causes else None
    n = 0 if d.comparison is None else sum(row.verdict == "within" for row in d.comparison.rows)
    excluded, hidden = (searched.excluded, searched.untestable) if searched else ((), ())
    sentences = [say("Nothing found beyond the expected arithmetic of {engine} at {taps}.", engine=d.engine, taps=count(n, "tap"))]
    if excluded:
        n_all = len(excluded) + len(hidden)
        sentences.append(say("{n} of the {total} known faults would have shown and are excluded.", n=len(excluded), total=n_all))
    if hidden:
        sentences.append(say("Not testable with this evidence: {faults}.", faults=some(hidden, MOST)))
    return paragraph(sentences)


def _separating(c: Causes) -> str:
    return say("What would tell them apart: {what}.", what=c.separating) if c.separating else ""


def _made_by(tap: str) -> str:
    return say(MADE_BY.get(stem_of(tap), (mark("an operation of its own"), ()))[0])
