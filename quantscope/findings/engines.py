"""What other engines do on the files of a study."""

from __future__ import annotations

from quantscope.results import EngineRun, Finding, Study
from quantscope.wording import listed, sci


def runs(study: Study) -> Finding | None:
    """Each engine on each file: within the floor, where it parts, or how it failed."""
    if not study.engines:
        return None
    parts = [_agreeing([r for r in study.engines if r.agrees])]
    parts += [
        f"{r.engine} on {r.variant} differs from an exact run of the same file. {r.answer}" for r in study.engines if r.agrees is False
    ]
    parts += [f"{r.engine} on {r.variant} failed: {r.failure}" for r in study.engines if r.failure]
    evidence = {"agree": [_name(r) for r in study.engines if r.agrees], "differ": [_name(r) for r in study.engines if r.agrees is False]}
    return Finding("engines", " ".join(p for p in parts if p), evidence | {"failed": [_name(r) for r in study.engines if r.failure]})


def _name(run: EngineRun) -> str:
    return f"{run.engine} on {run.variant}"


def _agreeing(found: list[EngineRun]) -> str:
    """The engines within their floor, with the error at the logits."""
    if not found:
        return ""
    named = listed(f"{_name(r)} (logits {sci(r.rows[-1].engine, 2)})" for r in found)
    return (
        f"Within what its arithmetic predicts at every tap: {named}. What such a file gets wrong comes from the file, not from the engine."
    )
