"""Local replay of a trace beside its file, in sentences."""

from __future__ import annotations

from quantscope.diagnose.replay import GGML, Replay, ReplayRow, replay
from quantscope.language import say
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.bf16_arithmetic import Bf16Arithmetic
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.phrases import count, listed_some, paragraph
from quantscope.sources.resolve import open_source
from quantscope.trace import Origin, Trace
from quantscope.weights import Weights
from quantscope.wording import sci

MOST_NAMED = 6  # convicted operations that a sentence lists


def replayed(trace: Trace, model: str) -> Replay:
    """Every operation of a trace, recomputed from the trace's own inputs with the weights of a file.

    Raises what opening the file raises, and TraceContentError when the trace has no whole tensors to recompute anything from.
    """
    return replay(trace, Weights(open_source(model)), predicted=expected_rounding(trace.origin))


def expected_rounding(origin: Origin) -> Arithmetic | None:
    """The rounding an engine may have by its own account: none for an exact one, bfloat16's, ggml's otherwise, with the cache it names."""
    if origin.arithmetic.startswith("exact"):
        return None
    if origin.dtype == "bfloat16":
        return Bf16Arithmetic()
    return ggml_arithmetic("F32") if origin.arithmetic == "ggml, F32 cache" else GGML


def sentence(found: Replay) -> str:
    """Which operations are wrong by themselves, whatever came before them."""
    convicted, cleared, silent = (found.those(v) for v in ("convicted", "cleared", "not recorded"))
    rest = ""
    if silent:
        rest = say(
            "{operations} could not be recomputed: their inputs or outputs are not in the trace.",
            operations=count(len(silent), "operation"),
        )
    if not convicted:
        right = say("Local replay: all {n} operations are right, recomputed from the trace's own inputs.", n=len(cleared))
        return paragraph([right, rest])
    wrong = say(
        "Local replay, from the trace's own inputs: {operations} wrong by themselves, {named}; {n} right.",
        operations=count(len(convicted), "operation"),
        named=listed_some([_named(row) for row in convicted], MOST_NAMED),
        n=len(cleared),
    )
    return paragraph([wrong, rest])


def _named(row: ReplayRow) -> str:
    return say(
        "{tap} ({operation}; NMSE {error}, floor {floor})", tap=row.tap, operation=row.operation, error=sci(row.nmse), floor=sci(row.floor)
    )
