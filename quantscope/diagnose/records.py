"""What the comparison and the replay have shown, as pieces of evidence with the commands that measure them again."""

from __future__ import annotations

from quantscope.compare import Comparison
from quantscope.diagnose.causes import Causes
from quantscope.diagnose.evidence import Evidence, Record
from quantscope.language import mark, say
from quantscope.phrases import paragraph


def tap_records(e: Evidence, c: Comparison, causes: Causes) -> tuple[Record, ...]:
    return tuple(r for r in (_weights_record(e, c), _taps_record(e, c), _replay_record(e, causes)) if r is not None)


def _commands(e: Evidence) -> tuple[str, str]:
    """(how to make the reference, how to compare it)."""
    ids = ",".join(map(str, e.test.origin.tokens or e.ids or ()))
    trace = f"quantscope trace {e.model} --tokens {ids} -o exact.safetensors"
    engines = ("llama.cpp", "transformers")
    own = f" && quantscope trace {e.model} --engine {e.against} --tokens {ids} -o engine.safetensors" if e.against in engines else ""
    return trace + own, f"quantscope compare exact.safetensors {'engine.safetensors' if own else e.against}"


def _weights_record(e: Evidence, c: Comparison) -> Record | None:
    """Whether the weights decode alike, by the elements of the embedding: the only tap that is nothing but weights."""
    row = next((r for r in c.rows if r.tap == "embd"), None)
    made, compared = _commands(e)
    if row is None:
        measured = say("rows of token_embd.weight, element by element")
        return Record("weights", measured, "not measured", say("The trace has no embedding."), made)
    if row.kind in ("values", "sample"):
        text = say("{n} of {total} values compared.", n=row.n, total=row.n_all)
    else:
        text = say("compared by its fingerprint.") if row.kind == "fingerprint" else say("compared by its statistics.")
    conclusion = "differs" if row.verdict == "differs" else "agrees" if row.verdict == "within" else "not measured"
    return Record("weights", say("rows of token_embd.weight"), conclusion, text, f"{made} && {compared}", row.nmse, row.floor)  # type: ignore[arg-type]


def _taps_record(e: Evidence, c: Comparison) -> Record:
    made, compared = _commands(e)
    command, what = f"{made} && {compared}", say("every tap against the exact run")
    first = c.first_divergence
    n = sum(row.verdict == "differs" for row in c.rows)
    if first is not None:
        text = say(EXCEED, n=n, total=len(c.rows), tap=first.tap)
        return Record("taps", what, "differs", text, command, first.nmse, first.floor)
    shown = [row for row in c.rows if row.verdict == "within"]
    text = say("{n} of {total} taps are within their floor.", n=len(shown), total=len(c.rows))
    if not shown:
        return Record("taps", what, "not measured", text, command)
    worst = max(shown, key=lambda row: row.nmse / row.floor)
    text = paragraph([text, say("Nearest to it: {tap}.", tap=worst.tap)])
    return Record("taps", what, "agrees", text, command, worst.nmse, worst.floor)


EXCEED = mark("{n} of {total} taps exceed their floor, first {tap}.")


def _replay_record(e: Evidence, causes: Causes) -> Record:
    _, compared = _commands(e)
    command, what = f"{compared} --model {e.model}", say("every operation again from the engine's own inputs")
    if causes.replayed is None:
        return Record("replay", what, "not measured", say("It needs the whole tensors of an operation and of its inputs."), command)
    convicted, cleared = causes.replayed.those("convicted"), causes.replayed.those("cleared")
    if not convicted:
        return Record("replay", what, "agrees", say("All {n} operations that could be judged are right.", n=len(cleared)), command)
    worst = convicted[0]
    text = say(
        "{n} wrong by themselves, first {tap} ({operation}); {right} right.",
        n=len(convicted),
        tap=worst.tap,
        operation=worst.operation,
        right=len(cleared),
    )
    return Record("replay", what, "differs", text, command, worst.nmse, worst.floor)
