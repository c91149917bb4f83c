"""What an engine showed at its taps, and where it comes from: the one thing that engines and importers make and everything else reads.

    trace = Trace(origin, {"l_out-0": (Full(x),), "l_out-1": (Stats({"rms": 1.2}),)})
    save(trace, path);  load(path)

An engine that can be programmed gives whole tensors; a log gives a few values, sums or an RMS.  Both are a Trace: each tap holds one or
more pieces of *evidence*, and each piece says for which positions it stands.  The file is described in docs/trace-format.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from quantscope.errors import TraceContentError, TraceMismatchError

Positions: TypeAlias = tuple[int, ...] | None  # of the trace's tokens, counted from 0; None: all of them; −1: the last one, wherever it is
LAST = -1  # the position of a log that does not say how many tokens there were
STATS = ("rms", "mean", "min", "max", "sum")  # in the order in which they are stored


@dataclass(frozen=True)
class Full:
    """Every value of a tap: float32 [P,channels], P the positions; an attention map is [H,P,S], S keys."""

    values: Tensor
    positions: Positions = None


@dataclass(frozen=True)
class Sample:
    """Some values of a tap: values float32 [n], index int64 [n] flat and row-major into ``shape``, which is [P,channels] or [H,P,S].

    digits: decimals that the source printed, so that a value is known to half a unit of the last; None for full float32.
    """

    values: Tensor
    index: Tensor
    shape: tuple[int, ...]
    positions: Positions = None
    digits: int | None = None


@dataclass(frozen=True)
class Stats:
    """Statistics of a tap over all its positions and channels: any of rms, mean, min, max and sum, as numbers.

    digits: decimals that the source printed, by statistic; a statistic that is missing there is exact to float32.
    """

    values: Mapping[str, float]
    positions: Positions = None
    digits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fingerprint:
    """Sixteen random-sign sums Σ±xᵢ/√n over the n values of a tap, with its RMS, its largest magnitude and where that is.

    sums: float32 [16]; at: flat index into [P,channels].  ``quantscope.fingerprint`` computes and compares them.
    """

    sums: Tensor
    n: int
    rms: float
    peak: float
    at: int
    positions: Positions = None


Evidence: TypeAlias = Full | Sample | Stats | Fingerprint
_E = TypeVar("_E", Full, Sample, Stats, Fingerprint)


@dataclass(frozen=True)
class Origin:
    """Who made a trace, of which file, from which tokens.  What is unknown is None: a log rarely names its file."""

    engine: str  # "reference", "llama.cpp", "transformers", "RusTorch" ...
    engine_version: str | None = None
    arithmetic: str = "unknown"  # "exact float32", "ggml", "F16 KV cache" ...
    model: str | None = None  # name of the file
    model_sha256: str | None = None
    arch: str | None = None
    tokens: tuple[int, ...] | None = None
    positions: Positions = None  # of the tokens; what every piece of evidence stands for unless it says otherwise
    dtype: str = "float32"
    config: Mapping[str, Any] | None = None  # sizes and RoPE of the model, ``arch.config.ModelConfig`` as plain data
    notes: tuple[str, ...] = ()  # what a reader of a comparison should know
    predicted: Mapping[str, float] | None = None  # tap → NMSE that ggml's arithmetic makes on this file and these tokens


@dataclass(frozen=True)
class Trace:
    """Tap name → evidence, in the order in which the engine came by."""

    origin: Origin
    taps: Mapping[str, tuple[Evidence, ...]]

    def find(self, name: str, kind: type[_E]) -> _E | None:
        """The tap's evidence of this kind that covers most positions; None where there is none."""
        found = [e for e in self.taps.get(name, ()) if isinstance(e, kind)]
        return max(found, key=lambda e: math.inf if e.positions is None else len(e.positions), default=None)

    def all_of(self, name: str, kind: type[_E]) -> list[_E]:
        """All evidence of this kind at a tap."""
        return [e for e in self.taps.get(name, ()) if isinstance(e, kind)]

    @property
    def title(self) -> str:
        """``llama.cpp (model.gguf)``: how a report names the trace."""
        return self.origin.engine if self.origin.model is None else f"{self.origin.engine} ({self.origin.model})"


def full_trace(origin: Origin, taps: Mapping[str, Tensor]) -> Trace:
    """A trace of whole tensors."""
    return Trace(origin, {name: (Full(x),) for name, x in taps.items()})


def check_same_run(ref: Origin, test: Origin, *, same_file: bool = True) -> None:
    """TraceMismatchError unless both saw the same token ids and, with ``same_file``, the same file, as far as both are known."""
    if ref.tokens is not None and test.tokens is not None and ref.tokens != test.tokens:
        raise TraceMismatchError(
            f"two traces to compare: expected the same token ids, found {_ids(ref.tokens)} in {ref.engine} and {_ids(test.tokens)} in "
            f"{test.engine}. {_first_difference(ref.tokens, test.tokens)} Nothing after that can be compared: a template, BOS or another "
            f"tokenizer is the usual cause. Run both on the same ids with `--tokens {','.join(map(str, test.tokens[:8]))}"
            f"{',...' if len(test.tokens) > 8 else ''}`."
        )
    if same_file and ref.model_sha256 and test.model_sha256 and ref.model_sha256 != test.model_sha256:
        raise TraceMismatchError(
            f"two traces to compare: expected the same model file, found {ref.model} ({ref.model_sha256[:12]}…) in {ref.engine} and "
            f"{test.model} ({test.model_sha256[:12]}…) in {test.engine}. What differs between two files is not the engine's doing: trace "
            f"both engines on one file, or give `--different-files` to see the effect of the files."
        )


def _ids(tokens: Sequence[int]) -> str:
    return f"{len(tokens)} ids [{', '.join(map(str, tokens[:6]))}{', ...' if len(tokens) > 6 else ''}]"


def _first_difference(a: Sequence[int], b: Sequence[int]) -> str:
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:
        return f"They agree up to position {min(len(a), len(b)) - 1}, then one is longer."
    return f"They differ first at position {at}: {a[at]} against {b[at]}."


def covered(evidence: Evidence, origin: Origin) -> Positions:
    """The positions a piece of evidence stands for: its own, else the trace's, else those of all tokens where they are known."""
    own = evidence.positions if evidence.positions is not None else origin.positions
    if origin.tokens is None:
        return own
    n = len(origin.tokens)
    return tuple(range(n)) if own is None else tuple(n - 1 if p == LAST else p for p in own)


def rows_of(full: Full, origin: Origin, wanted: Iterable[int]) -> Tensor:
    """The rows of a whole tensor that belong to these positions: [P,channels] or [H,P,S].  TraceContentError when one is not there."""
    there = covered(full, origin)
    rows = list(wanted)
    if there is not None:
        missing = sorted(set(rows) - set(there))
        if missing:
            raise TraceContentError(f"positions {missing} are not in this trace, which holds {list(there)}. Trace them with that engine.")
        rows = [there.index(p) for p in rows]
    return full.values[..., rows, :]
