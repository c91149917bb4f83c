"""The most probable tokens of some positions, while their logits stream by in slices of the vocabulary.

A position keeps the K largest logits so far, in falling order; a slice's logit takes a place where it is larger than the one there.  The
ids come in rising order, so equal logits stay ordered by id, and neither the slices, the threads nor the device change a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantscope.quants.kernel import kernel


class TopTokens:
    """The ``k`` largest logits of n positions of M members: ``ids`` int64 and ``logits`` float64, [M,n,k] each.

    −∞ and NaN are no candidates: places that nothing has taken hold id −1 and logit −∞.
    """

    def __init__(self, n_members: int, n: int, k: int) -> None:
        self.ids = np.full((n_members, n, k), -1, np.int64)
        self.logits = np.full((n_members, n, k), -np.inf, np.float64)

    def add(self, positions: NDArray[np.int64], rows: NDArray[np.int64], v0: int, members: Sequence[Tensor]) -> None:
        """Rows of logits [·,dv] of each member, of the ids v0 … v0 + dv − 1, for these positions; ids come in rising order."""
        for m, x in enumerate(members):
            wanted = x if len(rows) == len(x) else x[torch.from_numpy(rows).to(x.device)]
            own = (wanted if wanted.dtype.itemsize == 8 else wanted.float()).detach().cpu().contiguous().numpy()
            _keep_largest(own, positions, v0, self.logits[m], self.ids[m])


@kernel
def _keep_largest(x: Any, positions: Any, v0: int, logits: Any, ids: Any) -> None:
    """Include x [n,dv] in the largest logits so far [·,k]: insertion into a sorted list, which few elements ever reach."""
    last = logits.shape[1] - 1
    for t in range(x.shape[0]):
        at, row = positions[t], x[t]
        kept, names = logits[at], ids[at]
        for v in range(row.size):
            if row[v] > kept[last]:
                place = last
                while place > 0 and row[v] > kept[place - 1]:
                    kept[place], names[place] = kept[place - 1], names[place - 1]
                    place -= 1
                kept[place], names[place] = row[v], v0 + v
