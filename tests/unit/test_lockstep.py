"""Lockstep gives what each variant gives alone, shares what it can, and holds one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantscope.images import Images, Requantized
from quantscope.lockstep import Member, Slices, walk
from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import make_gguf

ALL = Slices(100, 10_000, 10_000)
IDS = torch.tensor([[1, 40, 50, 60, 70], [1, 270, 280, 3, 9]])


class Everything:
    """An observer that keeps all it is shown."""

    def __init__(self, taps: Sequence[str]) -> None:
        self.taps = set(taps)
        self.seen: dict[tuple[int, str, int], tuple[Tensor | None, Tensor]] = {}
        self.rows: dict[tuple[int, int, int], Tensor] = {}

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor, chunk: int) -> None:
        self.seen[member, name, chunk] = ref, x

    def logits(self, start: int, first_id: int, members: Sequence[Tensor]) -> None:
        for m, x in enumerate(members):
            self.rows[m, start, first_id] = x

    def whole(self, member: int, name: str) -> Tensor:
        return torch.cat([x for (m, n, _), (_, x) in sorted(self.seen.items()) if (m, n) == (member, name)])

    def logits_of(self, member: int) -> Tensor:
        """[n,V] of all positions asked for."""
        starts = sorted({start for m, start, _ in self.rows if m == member})
        return torch.cat([torch.cat([x for (m, s, _), x in sorted(self.rows.items()) if (m, s) == (member, start)], 1) for start in starts])


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights(open_source(make_gguf(tmp_path / "m.gguf", n_layer=3, seed=5)))


def requantized(images: Images, qtype: str) -> Requantized:
    names = [n for n in images.weights.names() if len(images.weights.shape(n)) == 2]
    return Requantized(images, dict.fromkeys(names, QTYPES[qtype]))


@pytest.mark.parametrize("slices", [Slices(1, 1, 7), Slices(2, 3, 100), Slices(9, 1000, 1000)])
@pytest.mark.parametrize("first", [0, 2, 4])
def test_every_member_gets_what_it_gets_alone(weights: Weights, slices: Slices, first: int) -> None:
    images = Images(weights)
    providers = [weights, requantized(images, "Q8_0"), requantized(images, "Q4_0")]
    seen = Everything(["l_out-0", "l_out-2", "ffn_swiglu-1", "result_norm"])
    walk(IDS, [Member(str(i), p) for i, p in enumerate(providers)], seen, has_reference=True, slices=slices, first=first)
    for m, provider in enumerate(providers):
        alone = Recorder()
        logits = forward(IDS, provider, alone)
        for name in seen.taps:
            torch.testing.assert_close(seen.whole(m, name), alone.taps[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen.logits_of(m), logits[:, first:].flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_members_have_their_own_dtype(weights: Weights) -> None:
    seen = Everything(["l_out-2"])
    pair = [Member("a", weights, torch.float64), Member("b", weights)]
    walk(IDS, pair, seen, has_reference=True, slices=ALL)
    ref, x = seen.seen[1, "l_out-2", 0]
    assert ref is not None
    assert (ref.dtype, x.dtype) == (torch.float64, torch.float32)
    assert 0 < (ref - x).abs().max() < 1e-5


def test_done_layers_are_let_go_and_the_next_ones_prepared(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, set[str]]] = []
    for what in ("will_need", "let_go"):
        monkeypatch.setattr(weights, what, lambda names, what=what: done.append((what, {n.split(".")[1] for n in names})))
    walk(IDS, [Member("a", weights)], Everything([]), has_reference=False, slices=ALL)
    assert [where for what, where in done if what == "let_go"][1:4] == [{"0"}, {"1"}, {"2"}]
    assert done.index(("will_need", {"1"})) < done.index(("let_go", {"0"}))


def test_the_reference_is_beside_the_others_and_beside_none_without_one(weights: Weights) -> None:
    members = [Member("a", weights), Member("b", weights)]
    seen = Everything(["embd", "l_out-1"])
    walk(IDS, members, seen, has_reference=True, slices=ALL)
    assert seen.seen[0, "l_out-1", 0][0] is None
    for name in ("embd", "l_out-1"):
        assert seen.seen[1, name, 0][0] is seen.seen[0, name, 0][1]
    walk(IDS, members, seen, has_reference=False, slices=ALL)
    assert seen.seen[1, "l_out-1", 0][0] is None
