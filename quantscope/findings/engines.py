"""What other engines do on the files of a study."""

from __future__ import annotations

from quantscope.language import retold, say
from quantscope.phrases import listed, paragraph
from quantscope.results import EngineRun, Finding, Study
from quantscope.wording import sci


def runs(study: Study) -> Finding | None:
    """Each engine on each file: within the floor, where it parts, or how it failed."""
    if not study.engines:
        return None
    parts = [_agreeing([r for r in study.engines if r.agrees])]
    parts += [
        say(
            "{engine} on {file} differs from an exact run of the same file. {answer}",
            engine=r.engine,
            file=r.variant,
            answer=_told(r.answer or ""),
        )
        for r in study.engines
        if r.agrees is False
    ]
    parts += [
        say("{engine} on {file} failed: {failure}", engine=r.engine, file=r.variant, failure=r.failure) for r in study.engines if r.failure
    ]
    evidence = {"agree": [_name(r) for r in study.engines if r.agrees], "differ": [_name(r) for r in study.engines if r.agrees is False]}
    return Finding("engines", paragraph(parts), evidence | {"failed": [_name(r) for r in study.engines if r.failure]})


def _told(answer: str) -> str:
    """The engine's answer as it was kept, in the reader's language."""
    said, rope, turned = answer.partition(" RoPE: ")
    return paragraph([retold(said), say("RoPE: {verdict}", verdict=retold(turned)) if rope else ""])


def _name(run: EngineRun) -> str:
    return f"{run.engine} on {run.variant}"


def _agreeing(found: list[EngineRun]) -> str:
    """The engines within their floor, with the error at the logits."""
    if not found:
        return ""
    named = listed(
        say("{engine} on {file} (logits {error})", engine=r.engine, file=r.variant, error=sci(r.rows[-1].engine, 2)) for r in found
    )
    return say(
        "Within what its arithmetic predicts at every tap: {runs}. What such a file gets wrong comes from the file, not from the engine.",
        runs=named,
    )
