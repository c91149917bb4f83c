"""What an engine answered, where a note or a log says so: the token, its rank, and to which prompt.

    | Engine | Quantization | Prompt | Token | Token ID | Rank |        a row an answer; columns in English or Japanese
    Selected token 13487: logit 7.3169, rank 6.                         the note of a call in RusTorch's log

Such an answer is one token.  It says what came out, never why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from quantscope.importers.table import Grid, csv_table, is_table, markdown_tables
from quantscope.trace import Trace

# the first whose words are in a heading; "token id" stands before "token", which is in it
COLUMNS = (
    ("engine", r"engine|implementation|実装|エンジン"),
    ("variant", r"quanti[sz]|量子化|variant|model|モデル"),
    ("prompt", r"prompt|プロンプト|入力"),
    ("rank", r"rank|順位"),
    ("id", r"\bids?$|ID$"),
    ("token", r"token|トークン|output|出力"),
)
SELECTED = re.compile(r"Selected token (?P<id>\d+)(?:: logit [^,]+?(?:, rank (?P<rank>\d+))?\.$|,)")


@dataclass(frozen=True)
class Answer:
    """One generated token; None for what is not said.  rank: of its logit, 1 the largest."""

    engine: str
    variant: str
    prompt: str | None = None
    token: str | None = None
    id: int | None = None
    rank: int | None = None


def answers(text: str) -> tuple[Answer, ...]:
    """The answers in the tables of a Markdown or CSV text; tables of layers have none."""
    grids = list(markdown_tables(text)) or [csv_table(text)]
    return tuple(a for grid in grids if not is_table(grid) for a in _rows(grid))


def _rows(grid: Grid) -> Sequence[Answer]:
    found: dict[str, int] = {}
    for i, heading in enumerate(grid.columns):
        kind = next((kind for kind, words in COLUMNS if re.search(words, heading, re.IGNORECASE)), None)
        if kind is not None:
            found.setdefault(kind, i)
    if not {"engine", "variant"} <= set(found) or not {"token", "id"} & set(found):
        return ()
    return [_answer({kind: row[i].strip() for kind, i in found.items() if i < len(row)}) for row in grid.rows]


def _answer(cells: dict[str, str]) -> Answer:
    said = {kind: None if re.fullmatch(r"[-–—?]*", text) else text for kind, text in cells.items()}
    prompt = said.get("prompt")
    return Answer(
        said.get("engine") or "unknown engine",
        said.get("variant") or "unknown",
        None if prompt is None else prompt.strip("\"'"),
        cells.get("token") or None,
        _number(said.get("id")),
        _number(said.get("rank")),
    )


def _number(text: str | None) -> int | None:
    found = re.search(r"\d+", text or "")
    return int(found[0]) if found else None


def answer_of(name: str, trace: Trace) -> Answer | None:
    """What a trace's notes say was generated after it; name: of the variant."""
    found = next((m for note in trace.origin.notes if (m := SELECTED.match(note))), None)
    if found is None:
        return None
    return Answer(trace.origin.engine, name, id=int(found["id"]), rank=int(found["rank"]) if found["rank"] else None)
