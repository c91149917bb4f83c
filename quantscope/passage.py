"""What a reader sees of the distributions themselves: the tokens after the prompt, and a passage of the text token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantscope.meters import N_TOP, Record
from quantscope.metrics import rank
from quantscope.results import Passage, TopTokens
from quantscope.stages import Stage
from quantscope.tokenizers import Tokenizer

OF_THE_FIRST, OF_ALL = 20, 40  # tokens of ``TopTokens``: of its first variant, and at most in all


def piece(tokenizer: Tokenizer | None, i: int) -> str:
    """The text of a token, its number where there is no vocabulary."""
    return tokenizer.piece(i) if tokenizer else f"#{i}"


def top_tokens(names: Sequence[str], logits: Tensor, tokenizer: Tokenizer | None) -> TopTokens:
    """The most probable tokens of all variants beside each other, from their logits at one position, [M,V] float64.

    Where there would be too many, every variant's first token goes before any variant's second.
    """
    falling = [np.argsort(-own, kind="stable")[:OF_THE_FIRST].tolist() for own in logits.numpy()]  # NaN last
    nth = [order[k] for k in range(min(N_TOP, len(falling[0]))) for order in falling]
    chosen = set(list(dict.fromkeys([*falling[0], *nth]))[:OF_ALL])
    ids = torch.tensor([i for i in np.argsort(-logits[0].numpy(), kind="stable").tolist() if i in chosen])
    by_name = dict(zip(names, logits, strict=True))
    return TopTokens(
        ids=tuple(ids.tolist()),
        pieces=tuple(piece(tokenizer, i) for i in ids.tolist()),
        logits={name: tuple(own[ids].tolist()) for name, own in by_name.items()},
        probs={name: tuple(own.softmax(-1)[ids].tolist()) for name, own in by_name.items()},
        ranks={name: tuple(rank(own.expand(len(ids), -1), ids).tolist()) for name, own in by_name.items()},
    )


def passage(stage: Stage, record: Record, names: Sequence[str], n_positions: int, tokenizer: Tokenizer | None) -> Passage:
    """The positions whose most probable tokens a stage has kept.

    names: of the rows of its record.  n_positions: how many were scored in all.
    """
    n_shown = record["top_ids"].shape[1]
    chunk, position = np.divmod(np.arange(n_shown), stage.last - stage.first)
    position += stage.first
    ids = stage.ids[chunk, position].tolist()
    n_ctx = stage.ids.shape[1]
    following = [int(stage.ids[c, t + 1]) if t + 1 < n_ctx else None for c, t in zip(chunk, position, strict=True)]
    kl = record["kl"].reshape(len(names), -1)[:, :n_shown] if stage.compares else None
    return Passage(
        n_positions=n_positions,
        ids=tuple(ids),
        pieces=tuple(piece(tokenizer, i) for i in ids),
        chunk=tuple(chunk.tolist()),
        position=tuple(position.tolist()),
        next=tuple(None if i is None else piece(tokenizer, i) for i in following),
        kl_nats={} if kl is None else {name: tuple(own.tolist()) for name, own in zip(names[1:], kl[1:], strict=True)},
        top={name: _tops(i, p, tokenizer) for name, i, p in zip(names, record["top_ids"], record["top_log_p"], strict=True)},
    )


def _tops(ids: NDArray[np.int32], log_p: NDArray[np.float32], tokenizer: Tokenizer | None) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Pieces and probabilities (six digits: they are rounded to float32 when they are stored) from ids and ln p, [S,k] each."""
    rows = zip(ids.tolist(), log_p.tolist(), strict=True)
    return tuple(tuple((piece(tokenizer, i), float(f"{math.exp(x):.6g}")) for i, x in zip(*row, strict=True) if i >= 0) for row in rows)
