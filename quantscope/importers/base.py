"""What the importers share: a file's text, evidence as it is gathered, and the runs that a file holds."""

from __future__ import annotations

import gzip
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from quantscope.errors import ImportFormatError, MissingFileError
from quantscope.language import english, mark
from quantscope.model.taps import EMBD, graph_order
from quantscope.sources.base import show
from quantscope.trace import LAST, Evidence, Full, Origin, Positions, Sample, Stats, Trace
from quantscope.wording import count, some

UNKNOWN_ENGINE = "unknown engine"
AT_LAST: Positions = (LAST,)  # the last position of a run whose token ids are not known
NUMBER = r"[-+−]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|nan|inf(?:inity)?)"
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Run:
    """One forward call, or one variant of a table; ``continues``: it goes on where the run before it stopped."""

    name: str
    trace: Trace
    continues: bool = False
    n_tokens: int | None = None


@dataclass(frozen=True)
class Imported:
    """What one file holds.  ``variants``: the runs belong side by side; otherwise they are calls of one log, of which one is meant."""

    kind: str  # "rustorch", "table" ...
    runs: tuple[Run, ...]
    variants: bool = False
    warnings: tuple[str, ...] = ()


@dataclass
class Draft:
    """The evidence of one run while its file is read."""

    tokens: tuple[int, ...] | None = None
    start: int | None = None  # position of the first token
    n: int | None = None  # tokens in this call
    taps: dict[str, list[Evidence]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, tap: str, new: Evidence) -> None:
        """Keep a piece; statistics that agree with those already there are put together with them."""
        if isinstance(new, Stats):
            self._add_stats(tap, _without_nan(new, tap, self.notes))
        else:
            self.taps.setdefault(tap, []).append(new)

    def _add_stats(self, tap: str, new: Stats) -> None:
        if not new.values:
            return
        pieces = self.taps.setdefault(tap, [])
        for i, old in enumerate(pieces):
            if isinstance(old, Stats) and old.positions == new.positions and _agree(old, new):
                pieces[i] = replace(old, values={**new.values, **old.values}, digits={**new.digits, **old.digits})
                return
        pieces.append(new)

    @property
    def last(self) -> Positions:
        """The last position of this call."""
        n = len(self.tokens) if self.n is None and self.tokens is not None else self.n
        return AT_LAST if n is None else ((self.start or 0) + n - 1,)

    def trace(self, origin: Origin) -> Trace:
        """Taps in graph order, those without any evidence left out."""
        return Trace(
            replace(origin, notes=(*origin.notes, *self.notes)),
            {tap: tuple(self.taps[tap]) for tap in sorted(self.taps, key=graph_order) if self.taps[tap]},
        )


def _agree(old: Stats, new: Stats) -> bool:
    return all(old.values[k] == new.values[k] for k in old.values.keys() & new.values.keys())


def _without_nan(stats: Stats, tap: str, notes: list[str]) -> Stats:
    """A trace has no place for a statistic that is NaN, and a note says more."""
    broken = [name for name, x in stats.values.items() if math.isnan(x)]
    if not broken:
        return stats
    notes.append(english("{tap}: {names} is NaN.", tap=tap, names=", ".join(broken)))
    kept = {name: x for name, x in stats.values.items() if name not in broken}
    return replace(stats, values=kept, digits={name: d for name, d in stats.digits.items() if name in kept})


# ---- Tap names ----------------------------------------------------------------------------------------------------------


def input_tap(layer: int) -> str:
    """The tap that is the input of a layer: the output of the one before it, or the embeddings."""
    return f"l_out-{layer - 1}" if layer else EMBD


# ---- Text ---------------------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """The file's content, unpacked where it is gzip.  Raises MissingFileError and ImportFormatError."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, gzip.BadGzipFile) as e:
        raise ImportFormatError(f"{show(path)}: a damaged gzip file ({e}). Copy it again, or unpack it with `gzip -d` first.") from e
    except OSError as e:
        raise MissingFileError(f"{show(path)}: expected a log, dump or table: {e.strerror or e}. Check the path.") from e


def decoded(raw: bytes) -> str:
    """Text without colours; UTF-16 where its mark says so (PowerShell redirects so), else UTF-8 with damaged bytes replaced."""
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return _COLOUR.sub("", raw.decode(encoding, "replace"))


def read_text(path: Path) -> str:
    return decoded(read_bytes(path))


def number(text: str) -> float:
    """A number as logs and tables print it; a minus may be U+2212."""
    return float(text.replace("−", "-"))


def decimals(text: str) -> int | None:
    """Digits behind the point; None with an exponent, where they do not tell how exact a number is."""
    return None if "e" in text.lower() or "n" in text.lower() else len(text.partition(".")[2])


def common_digits(texts: Iterable[str]) -> int | None:
    """The decimals all numbers were printed with; None where they differ: then they were printed in full."""
    found = {decimals(t) for t in texts if math.isfinite(number(t))}
    return found.pop() if len(found) == 1 else None


# ---- Broken numbers -----------------------------------------------------------------------------------------------------


FLAT, PRINTED, CHANNEL = mark("flat index"), mark("printed value"), mark("channel")  # how a value is counted


def non_finite_note(tap: str, values: Tensor, place: str = FLAT) -> str | None:
    """How many values are NaN or infinite and where the first is; None where all are finite."""
    broken = ~values.flatten().isfinite()
    n = int(broken.sum())
    if not n:
        return None
    at = int(broken.int().argmax())
    return english(
        "{tap}: {n} of {total} values are NaN or infinite, the first at {place} {at} ({value}).",
        tap=tap,
        n=f"{n:,}",
        total=f"{values.numel():,}",
        place=place,
        at=at,
        value=values.flatten()[at].item(),
    )


# ---- Which run ----------------------------------------------------------------------------------------------------------


def choose(imported: Imported, call: int | None, name: str) -> tuple[Run, str | None]:
    """The run that is meant and, where that is not plain, a sentence that says so.

    call: counted from 1.  name: of the file.  Raises ImportFormatError for a call that is not there, and where a file holds several runs
    that each begin anew and none was chosen.
    """
    runs = imported.runs
    if call is not None:
        if not 1 <= call <= len(runs):
            raise ImportFormatError(
                f"{name}: there is no call {call}, expected 1 to {len(runs)}: {listing(runs)}. Give one with `--call N`."
            )
        return runs[call - 1], None
    begun = [i for i, r in enumerate(runs) if not r.continues]
    if len(begun) > 1:
        raise ImportFormatError(
            f"{name}: {len(begun)} runs in one file, expected one: {listing(runs)}. They were probably written one after the other into "
            f"the same log: choose one with `--call N`."
        )
    if len(runs) == 1:
        return runs[0], None
    return runs[0], f"{name}: {len(runs)} forward calls of one generation; call 1, the prompt, is taken. Choose another with `--call N`."


MOST_LISTED = 8


def listing(runs: tuple[Run, ...]) -> str:
    """``call 1 (tokens 1, 15043), call 2 (...)``, shortened."""
    return some((f"call {i} ({_about(r)})" for i, r in enumerate(runs, 1)), MOST_LISTED)


def _about(run: Run) -> str:
    o = run.trace.origin
    where = "" if not o.positions or o.positions == AT_LAST else f", position {o.positions[0]}"
    where += f" to {o.positions[-1]}" if o.positions and len(o.positions) > 1 else ""
    if o.tokens is None:
        return f"{'ids' if run.n_tokens is None else count(run.n_tokens, 'token') + ', ids'} not known{where}"
    ids = o.tokens[-4:] if where else o.tokens[:6]
    return f"tokens {', '.join(map(str, ids))}{'' if len(ids) == len(o.tokens) else ' ...'}{where}"


def with_known(trace: Trace, known: Mapping[str, object]) -> Trace:
    """The trace with what the command line says about its origin; a last position gets its number once the ids are known.

    Raises ImportFormatError where the file says other ids.
    """
    given = known.get("tokens")
    origin = trace.origin
    if given is not None and origin.tokens is not None and given != origin.tokens:
        raise ImportFormatError(
            f"--tokens: the file was written from other ids, {list(origin.tokens[:8])}. Leave `--tokens` out, or choose another call with "
            f"`--call N`."
        )
    origin = replace(origin, **{k: v for k, v in known.items() if v is not None})  # type: ignore[arg-type]
    if given is None or origin.tokens is None:
        return replace(trace, origin=origin)
    at = (len(origin.tokens) - 1,)
    taps = {tap: tuple(replace(e, positions=at) if e.positions == AT_LAST else e for e in pieces) for tap, pieces in trace.taps.items()}
    if origin.positions == AT_LAST:
        origin = replace(origin, positions=at)
    _check_rows(taps, origin)
    return Trace(origin, taps)


def _check_rows(taps: Mapping[str, tuple[Evidence, ...]], origin: Origin) -> None:
    assert origin.tokens is not None
    n = len(origin.tokens) if origin.positions is None else len(origin.positions)
    for tap, pieces in taps.items():
        for e in pieces:
            rows = e.values.shape[-2] if isinstance(e, Full) else e.shape[-2] if isinstance(e, Sample) else None
            if rows is not None and e.positions is None and rows != n:
                raise ImportFormatError(f"--tokens: {len(origin.tokens)} ids, but {tap} has {rows} positions. Give the ids of that run.")
