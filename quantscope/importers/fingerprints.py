"""Fingerprint lines (docs/fingerprints.md) in the log of any engine → traces."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantscope.errors import ImportFormatError
from quantscope.fingerprint import Run, parse_line
from quantscope.language import mark
from quantscope.trace import Fingerprint, Origin, Trace

UNKNOWN = Run()


@dataclass
class _Building:
    """A run as far as it has been read."""

    run: Run = UNKNOWN
    taps: dict[str, list[Fingerprint]] = field(default_factory=dict)

    def has(self, tap: str, new: Fingerprint) -> bool:
        """Whether this run has seen the tap at one of these positions already, so that the line is another run's."""
        return any(
            old.positions is None or new.positions is None or set(old.positions) & set(new.positions) for old in self.taps.get(tap, ())
        )


def read_fingerprints(text: str, name: str) -> list[Trace]:
    """The runs in a log, one trace each; other lines are passed over.

    A run begins with a ``qsfp1-run`` line, and where a tap comes again at positions it has been seen at.  name: of the file, for errors.
    Raises ImportFormatError for a damaged line, with its number, and where there is no fingerprint at all.
    """
    runs = [_Building()]
    for number, line in enumerate(text.splitlines(), 1):
        try:
            found = parse_line(line)
        except ImportFormatError as e:
            raise ImportFormatError(f"{name}, line {number}: {e}") from None
        if isinstance(found, Run):
            runs.append(_Building(found))
        elif found is not None:
            tap, print_ = found
            if runs[-1].has(tap, print_):
                runs.append(_Building())
            runs[-1].taps.setdefault(tap, []).append(print_)
    traces = [_trace(r) for r in runs if r.taps]
    if not traces:
        raise ImportFormatError(
            f"{name}: expected fingerprint lines, `qsfp1 TAP n=N rms=R peak=P at=I s=` and sixteen numbers, found none. The log is of "
            f"another kind, or the engine wrote to another stream: see docs/fingerprints.md."
        )
    return traces


def _trace(built: _Building) -> Trace:
    run = built.run
    notes = () if run.tokens else (mark("The log does not say which token ids were run: print `qsfp1-run tokens=1,2,3` first."),)
    origin = Origin(run.engine or "fingerprint log", model=run.model, model_sha256=run.sha256, tokens=run.tokens, notes=notes)
    return Trace(origin, {tap: tuple(prints) for tap, prints in built.taps.items()})
