"""What each variant expects to follow: the choices after the prompt side by side, and a passage of the text token by token.

From the records' "choices" and "likely" (meters.py); nothing is run here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from quantscope.meters import Record
from quantscope.results import Passage, TopTokens
from quantscope.stages import Job, Stage

OWN = 5  # of a variant's own most probable tokens that are shown beside the original's


def pieces_of(job: Job) -> Callable[[int], str]:
    """The text of an id; empty where the file has no vocabulary."""
    tokenizer = job.inputs.tokenizer
    return (lambda i: "") if tokenizer is None else tokenizer.piece


def top_tokens(job: Job, stage: Stage, record: Record) -> TopTokens | None:
    """The original's most probable tokens after the first chunk and the variants' own, with what everyone gives them."""
    if "choices" not in record:
        return None
    choices = record["choices"]
    originals = [int(i) for i in choices[0, :, 0] if not math.isnan(i)] if stage.has_reference else []
    rows = {m.name: _known(choices[stage.row(k)], originals) for k, m in enumerate(stage.members)}
    leading = next(iter(rows.values()))
    ids = list(leading)
    for known in rows.values():
        own = sorted((i for i, (_, _, rank) in known.items() if rank <= OWN), key=lambda i: known[i][2])
        ids += [i for i in own if i not in ids]
    columns = {name: [known.get(i, (None, None, None)) for i in ids] for name, known in rows.items()}
    piece = pieces_of(job)
    return TopTokens(
        tuple(ids),
        tuple(piece(i) for i in ids),
        {name: [logit for logit, _, _ in column] for name, column in columns.items()},
        {name: [prob for _, prob, _ in column] for name, column in columns.items()},
        {name: [rank for _, _, rank in column] for name, column in columns.items()},
    )


def _known(choices: NDArray[np.float64], originals: Sequence[int]) -> dict[int, tuple[float, float, int]]:
    """Id → (logit, probability, rank) of a member's own choices and of the original's, from CHOICE_FIELDS [K,6]."""
    rows = choices.tolist()
    own = {int(row[0]): (row[1], row[2], k + 1) for k, row in enumerate(rows) if not math.isnan(row[0])}
    there = {i: (row[3], row[4], int(row[5])) for i, row in zip(originals, rows, strict=False)}
    return own | there


def passage(job: Job, stage: Stage, record: Record) -> Passage | None:
    """The first scored positions; None in a record without them."""
    if "likely" not in record:
        return None
    likely, n_scored = record["likely"], stage.last - stage.first  # [M,S,L,2]
    at = np.arange(likely.shape[1])
    chunk, position = at // n_scored, stage.first + at % n_scored
    ids = stage.ids[chunk, position].tolist()
    following = stage.ids[chunk, np.minimum(position + 1, stage.ids.shape[1] - 1)].tolist() if stage.labelled else []
    piece = pieces_of(job)
    names = {m.name: stage.row(k) for k, m in enumerate(stage.members)}
    compared = {m.name for m in stage.compared} if stage.compares else set()
    n_all = len(stage.ids) if "log_p" not in record else record["log_p"].shape[1]
    return Passage(
        n_positions=n_all * n_scored,
        ids=tuple(ids),
        pieces=tuple(map(piece, ids)),
        next=tuple(map(piece, following)),
        chunk=tuple(chunk.tolist()),
        position=tuple(position.tolist()),
        kl_nats={name: record["kl"][row].reshape(-1)[: len(at)].tolist() for name, row in names.items() if name in compared},
        top={name: [[[piece(int(i)), float(p)] for i, p in row] for row in likely[row_]] for name, row_ in names.items()},
    )
