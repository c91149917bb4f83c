"""How far several quantizations of one model really are from it: the mean KL divergence of each, on the chunks of a text.

    kl[m][c] = mean over the positions of chunk c of KL(p ‖ p_m)        exact forward; p: the original, p_m: with the types of recipe m

All of them walk through the layers together with the original, so a matrix is encoded once for each type that it has anywhere, and
only one layer of each is in memory.  Encoding is llama-quantize's with an importance matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantscope.images import Images, Importance, Requantized
from quantscope.lockstep import Member, Slices, walk
from quantscope.plan import plan_of
from quantscope.qtypes import QuantType
from quantscope.remedy.small_kl import small_kl
from quantscope.results import StudyOptions
from quantscope.weights import Weights

LOGIT_VALUES = 1 << 27  # logits of all members that are held at a time

Types = Mapping[str, QuantType]


def measured(
    weights: Weights,
    recipes: Sequence[Types],
    ids: Tensor,
    importance: Importance = lambda name: None,
    step: Callable[[int, int], None] = lambda done, of: None,
) -> list[NDArray[np.float64]]:
    """Of each recipe the mean KL divergence of every chunk of ids [C,T], in nats, float64 [C]; all positions count.

    recipes: canonical name → type; tensors that are not named stay as they are.  importance: name → weights of the columns.
    step: called after each of the n_layer + 2 stages of a batch of chunks, with how many are done and of how many.  Raises UsageError where
    the memory is too small for one chunk.
    """
    stored = weights.stored_types()
    changed = [{name: t for name, t in types.items() if name in stored and t != stored[name]} for types in recipes]
    images = Images(weights, importance)
    members = [Member(str(m), Requantized(images, types)) for m, types in enumerate([{}, *changed])]
    held = [stored, *({**stored, **types} for types in changed)]
    plan = plan_of(weights, ids, ids.shape[1], stored, held, StudyOptions.memory_bytes)
    positions = max(1, min(plan.positions_per_slice, LOGIT_VALUES // (len(members) * weights.config.n_vocab)))
    slices = Slices(plan.chunks_per_slice, positions, weights.config.n_vocab)  # the whole vocabulary: the KL is of whole distributions
    found, n_stages = [], weights.config.n_layer + 2
    for b, part in enumerate(torch.split(ids, plan.chunks_per_batch)):
        meter = _KlMeter(len(recipes))

        def stage(n: int, before: int = b * n_stages) -> None:
            step(before + n, plan.n_batches * n_stages)

        walk(part, members, meter, has_reference=True, slices=slices, step=stage)
        found.append(torch.cat(meter.kl, dim=1).reshape(len(recipes), *part.shape).mean(-1))
    return list(torch.cat(found, dim=1).numpy())


class _KlMeter:
    """An Observer of whole distributions: kl holds float64 [members, n positions] for each slice of positions."""

    taps: tuple[str, ...] = ()

    def __init__(self, n: int) -> None:
        self.n, self.kl = n, list[Tensor]()

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor, chunk: int) -> None:
        """No taps are wanted."""

    def logits(self, start: int, first_id: int, members: Sequence[Tensor]) -> None:
        ref, *others = members  # [n,V] each
        self.kl.append(torch.stack([small_kl(ref, test).double().cpu() for test in others]))
