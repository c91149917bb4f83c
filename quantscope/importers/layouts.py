"""How an engine lays its arrays out → [P,channels] or [H,P,S].

    E  channels (over heads, then over a head's)   T  positions   H D  heads and their channels   S  keys   1  an axis of length 1

Which axis is which follows from the lengths: of the tokens and the model where they are known, else from all arrays together, as they share
their number of positions and taps of one kind their width.  What fits in more than one way is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.errors import ImportFormatError
from quantscope.importers.axes import ATTENTION_MAP, AXIS, BY_HEAD
from quantscope.model.taps import stem_of
from quantscope.wording import listed

CHANNEL_FORMS = ("E", "TE", "ET", "1TE", "1ET", "11E")
HEAD_FORMS = ("HD", "THD", "HTD", "1THD", "1HTD")
MAP_FORMS = ("TS", "HTS", "1HTS")
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Fit:
    """One way to read a shape: P positions of C channels, or of S keys for each head."""

    form: str
    shape: Shape
    n_positions: int
    width: int

    @property
    def same_as(self) -> tuple[object, ...]:
        """Equal for two fits that give the same result: axes of length 1 may stand anywhere."""
        return tuple(a for a in self._order() if self.shape[a] > 1), self.n_positions, self.width

    @property
    def family(self) -> str:
        """What arrays of one engine have in common: whether channels, or heads, stand before the positions."""
        return "".join(c for c in self.form if c in "TEH")

    def _order(self) -> list[int]:
        wanted = "1HTS" if "S" in self.form else "1THDE"
        return sorted(range(len(self.form)), key=lambda a: wanted.index(self.form[a]))

    def apply(self, x: Tensor) -> Tensor:
        """x of this shape → [P,channels] or [H,P,S]."""
        x = x.permute(self._order())
        if "S" in self.form:
            return x.reshape(-1, self.n_positions, self.width)
        return x.reshape(self.n_positions, self.width)


@dataclass(frozen=True)
class Known:
    """What is known of the run."""

    n_tokens: int | None = None
    config: ModelConfig | None = None

    def width(self, stem: str) -> int | None:
        return None if self.config is None or stem not in AXIS else self.config.axis(AXIS[stem])


def fits(stem: str, shape: Shape, n_positions: int | None, known: Known) -> list[Fit]:
    """Every way in which the shape can be that tap's with so many positions, or with the last one only; one of those that are alike."""
    forms = MAP_FORMS if stem == ATTENTION_MAP else (*CHANNEL_FORMS, *(HEAD_FORMS if stem in BY_HEAD else ()))
    found: dict[tuple[object, ...], Fit] = {}
    for form in forms:
        fit = _fit(form, shape)
        if fit is not None and fit.n_positions in (n_positions, 1) and _sizes_fit(fit, stem, known):
            found.setdefault(fit.same_as, fit)
    return list(found.values())


def _fit(form: str, shape: Shape) -> Fit | None:
    if len(form) != len(shape) or any(c == "1" and n != 1 for c, n in zip(form, shape, strict=True)):
        return None
    size = dict(zip(form, shape, strict=True))
    width = size.get("S") or size.get("E") or size.get("H", 0) * size.get("D", 0)
    return Fit(form, shape, size.get("T", 1), width) if width > 1 or "S" in form else None


def _sizes_fit(fit: Fit, stem: str, known: Known) -> bool:
    size = dict(zip(fit.form, fit.shape, strict=True))
    if "S" in size:
        return size["S"] >= size["T"] and (known.config is None or size.get("H", 1) == known.config.n_head)
    wanted = known.width(stem)
    if wanted is None or known.config is None:
        return True
    return fit.width == wanted and ("D" not in size or size["D"] == known.config.head_dim)


def align(shapes: Mapping[str, Shape], known: Known, file: str) -> tuple[dict[str, Fit], int | None]:
    """The fit of every tap and the number of positions (None: every array holds a single one, and which is not known).

    Raises ImportFormatError where a shape fits in no way or in several; the message says which option settles it.
    """
    lengths = {n for shape in shapes.values() for n in shape}
    candidates = [known.n_tokens] if known.n_tokens else sorted(lengths | {1})
    by_n = {n: found for n in candidates if (found := _consistent(shapes, n, known)) is not None}
    if not by_n:
        raise _no_fit(shapes, known, candidates, file)
    options = {tap: list({f.same_as: f for found in by_n.values() for f in found[tap]}.values()) for tap in shapes}
    open_ = [tap for tap, ways in options.items() if len(ways) > 1]
    families = {ways[0].family for ways in options.values() if len(ways) == 1 and ways[0].n_positions > 1}
    chosen = {tap: ways[0] if len(ways) == 1 else _like_the_others(ways, families) for tap, ways in options.items()}
    doubtful = next((tap for tap in open_ if chosen[tap] is None), None)
    if doubtful is not None:
        raise _ambiguous(doubtful, options[doubtful], known, file)
    n = known.n_tokens or (max(by_n) if len(by_n) == 1 and max(by_n) > 1 else None)  # one row alone may be the last of many
    return {tap: fit for tap, fit in chosen.items() if fit is not None}, n


def _consistent(shapes: Mapping[str, Shape], n_positions: int, known: Known) -> dict[str, list[Fit]] | None:
    """The fits for this number of positions, taps of one kind having one width; None where an array has no fit."""
    found = {tap: fits(stem_of(tap), shape, n_positions, known) for tap, shape in shapes.items()}
    if known.n_tokens is None and n_positions > 1 and not any(f.n_positions == n_positions for ways in found.values() for f in ways):
        return None
    for letter in {AXIS.get(stem_of(tap), "S") for tap in shapes} - {"S"}:
        alike = [tap for tap in shapes if AXIS.get(stem_of(tap)) == letter]
        widths = set.intersection(*({f.width for f in found[tap]} for tap in alike))
        for tap in alike:
            found[tap] = [f for f in found[tap] if f.width in widths]
    return found if all(found.values()) else None


def _like_the_others(ways: Sequence[Fit], families: set[str]) -> Fit | None:
    """The one way that is laid out as arrays are whose layout is certain."""
    alike = [f for f in ways if f.family in families]
    return alike[0] if len(alike) == 1 else None


def shown(form: str) -> str:
    """``[1,T,E]``, the last token alone as ``[E]``."""
    return f"[{','.join(form)}]"


def _ambiguous(tap: str, ways: Sequence[Fit], known: Known, file: str) -> ImportFormatError:
    missing = [option for option, value in (("--tokens", known.n_tokens), ("--model", known.config)) if value is None]
    settle = f"Say which it is with {listed(f'`{m}`' for m in missing)}" if missing else "Record a prompt of another number of tokens"
    read_as = listed(f"{shown(f.form)} ({f.n_positions} × {f.width})" for f in ways)
    return ImportFormatError(f"{file}: {tap} of shape {list(ways[0].shape)} can be read as {read_as}. {settle}.")


def _no_fit(shapes: Mapping[str, Shape], known: Known, candidates: Sequence[int], file: str) -> ImportFormatError:
    """The first array that fits in no way, or that all fit alone but not together."""
    for tap, shape in shapes.items():
        if not any(fits(stem_of(tap), shape, n, known) for n in candidates):
            forms = MAP_FORMS if stem_of(tap) == ATTENTION_MAP else (*CHANNEL_FORMS, *(HEAD_FORMS if stem_of(tap) in BY_HEAD else ()))
            width = known.width(stem_of(tap))
            expected = f"{f'{known.n_tokens} positions or the last, ' if known.n_tokens else ''}{f'{width:,} channels, ' if width else ''}"
            return ImportFormatError(
                f"{file}: {tap} has the shape {list(shape)}, expected {expected}laid out as {listed(shown(f) for f in forms)}. It is of "
                f"another model, of other tokens, or of several sequences: save one sequence, or correct `--model`, `--tokens` or `--map`."
            )
    return ImportFormatError(
        f"{file}: the arrays have no number of positions, or taps of one kind no width, in common: "
        f"{listed(f'{t} {list(s)}' for t, s in list(shapes.items())[:4])}. They are of several runs, or a `--map` is wrong: save the "
        f"arrays of one forward call."
    )
