"""What the comparison and the replay have shown, as pieces of evidence with the commands that measure them again."""

from __future__ import annotations

from quantscope.compare import Comparison
from quantscope.diagnose.causes import Causes
from quantscope.diagnose.evidence import Evidence, Record


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
        return Record("weights", "rows of token_embd.weight, element by element", "not measured", "The trace has no embedding.", made)
    text = f"{row.n} of {row.n_all} values compared" if row.kind in ("values", "sample") else f"compared by its {row.kind}"
    conclusion = "differs" if row.verdict == "differs" else "agrees" if row.verdict == "within" else "not measured"
    return Record("weights", "rows of token_embd.weight", conclusion, f"{text}.", f"{made} && {compared}", row.nmse, row.floor)  # type: ignore[arg-type]


def _taps_record(e: Evidence, c: Comparison) -> Record:
    made, compared = _commands(e)
    first = c.first_divergence
    n = sum(row.verdict == "differs" for row in c.rows)
    if first is None:
        shown = [row for row in c.rows if row.verdict == "within"]
        worst = max(shown, key=lambda row: row.nmse / row.floor, default=None)
        text = f"{len(shown)} of {len(c.rows)} taps are within their floor." + (f" Nearest to it: {worst.tap}." if worst else "")
        value, floor = (worst.nmse, worst.floor) if worst else (None, None)
        return Record(
            "taps", "every tap against the exact run", "agrees" if shown else "not measured", text, f"{made} && {compared}", value, floor
        )
    text = f"{n} of {len(c.rows)} taps exceed their floor, first {first.tap}."
    return Record("taps", "every tap against the exact run", "differs", text, f"{made} && {compared}", first.nmse, first.floor)


def _replay_record(e: Evidence, causes: Causes) -> Record:
    _, compared = _commands(e)
    command, what = f"{compared} --model {e.model}", "every operation again from the engine's own inputs"
    if causes.replayed is None:
        return Record("replay", what, "not measured", "It needs the whole tensors of an operation and of its inputs.", command)
    convicted, cleared = causes.replayed.those("convicted"), causes.replayed.those("cleared")
    if not convicted:
        return Record("replay", what, "agrees", f"All {len(cleared)} operations that could be judged are right.", command)
    worst = convicted[0]
    text = f"{len(convicted)} wrong by themselves, first {worst.tap} ({worst.operation}); {len(cleared)} right."
    return Record("replay", what, "differs", text, command, worst.nmse, worst.floor)
