"""Local replay of a trace beside its file, in sentences."""

from __future__ import annotations

from quantscope.diagnose.replay import GGML, Replay, ReplayRow, replay
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.bf16_arithmetic import Bf16Arithmetic
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.sources.resolve import open_source
from quantscope.trace import Origin, Trace
from quantscope.weights import Weights
from quantscope.wording import count, listed, sci

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
    rest = f" {count(len(silent), 'operation')} could not be recomputed: their inputs or outputs are not in the trace." if silent else ""
    if not convicted:
        return f"Local replay: all {len(cleared)} operations are right, recomputed from the trace's own inputs.{rest}"
    named = listed(_named(row) for row in convicted[:MOST_NAMED])
    more = f" and {len(convicted) - MOST_NAMED} more" if len(convicted) > MOST_NAMED else ""
    return (
        f"Local replay, from the trace's own inputs: {count(len(convicted), 'operation')} wrong by themselves, {named}{more}; "
        f"{len(cleared)} right.{rest}"
    )


def _named(row: ReplayRow) -> str:
    return f"{row.tap} ({row.operation}; NMSE {sci(row.nmse)}, floor {sci(row.floor)})"
