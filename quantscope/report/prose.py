"""Sentences for the terminal that also wrap where a script has no blanks between its words."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from rich.cells import cell_len
from rich.containers import Lines
from rich.text import Text

# a line does not begin with these, and does not end with those (JIS X 4051 calls the rule kinsoku)
NOT_FIRST = "、。，．・：；！？）」』】〉》〜ー々…ぁぃぅぇぉっゃゅょァィゥェォッャュョ,.;:!?)]%"
NOT_LAST = "（「『【〈《(["


class Prose(Text):
    """A rich Text whose lines may end between two wide characters, as in Japanese; text without any wraps as rich does it."""

    def wrap(self, console: Any, width: int, **options: Any) -> Lines:
        if options.get("no_wrap") or not any(map(_wide, self.plain)):
            return super().wrap(console, width, **options)
        lines = Lines()
        for line in self.split(allow_blank=True):
            parts = line.divide(breaks(line.plain, width))
            for part in parts:
                part.rstrip()
            lines.extend(parts)
        if justify := options.get("justify"):
            lines.justify(console, width, justify=justify, overflow="fold")
        return lines


def breaks(text: str, width: int) -> list[int]:
    """Offsets at which new lines of at most ``width`` columns begin; a piece without a place to break is cut where it is full."""
    out: list[int] = []
    at = used = 0
    for piece in pieces(text):
        columns = cell_len(piece)
        if used and used + cell_len(piece.rstrip()) > width:
            out.append(at)
            used = 0
        for i, char in enumerate(piece if columns > width else ""):
            if used + cell_len(char) > width:
                out.append(at + i)
                used = 0
            used += cell_len(char)
        used += columns if columns <= width else 0
        at += len(piece)
    return out


def pieces(text: str) -> list[str]:
    """What stays on one line: a word with the blanks after it, or a wide character with the punctuation that belongs to it."""
    out: list[str] = []
    for part in re.findall(r"\s+|\S", text):
        glued = out and (
            part.isspace()
            or part in NOT_FIRST
            or out[-1][-1] in NOT_LAST
            or not (_wide(part) or _wide(out[-1][-1]) or out[-1][-1].isspace())
        )
        if glued:
            out[-1] += part
        else:
            out.append(part)
    return out


def _wide(char: str) -> bool:
    return unicodedata.east_asian_width(char) in "WF"
