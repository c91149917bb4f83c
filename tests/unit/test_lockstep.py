"""Lockstep gives what each variant gives alone, shares what it can, and holds one layer at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quantscope import lockstep
from quantscope.errors import BlockError, NonFiniteError
from quantscope.lockstep import Images, Member, Requantized, stored_as, walk
from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES
from quantscope.quants import decode, encode
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import make_gguf

IDS = torch.tensor([[1, 40, 50, 60, 70], [1, 270, 280, 3, 9]])


class Everything:
    """An observer that keeps all it is shown."""

    def __init__(self, taps: Sequence[str]) -> None:
        self.taps = set(taps)
        self.seen: dict[tuple[int, str], tuple[Tensor | None, Tensor]] = {}
        self.rows: dict[tuple[int, int, int], Tensor] = {}

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor) -> None:
        self.seen[member, name] = ref, x

    def logits(self, chunk: int, start: int, members: Sequence[Tensor]) -> None:
        for m, x in enumerate(members):
            self.rows[m, chunk, start] = x


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights(open_source(make_gguf(tmp_path / "m.gguf", n_layer=3, seed=5)))


def requantized(images: Images, qtype: str) -> Requantized:
    names = [n for n in images.weights.names() if len(images.weights.shape(n)) == 2]
    return Requantized(images, dict.fromkeys(names, QTYPES[qtype]))


@pytest.mark.parametrize("slice_bytes", [1, 1 << 30])
def test_every_member_gets_what_it_gets_alone(weights: Weights, monkeypatch: pytest.MonkeyPatch, slice_bytes: int) -> None:
    monkeypatch.setattr(lockstep, "SLICE_BYTES", slice_bytes)  # one position at a time, or all at once
    images = Images(weights)
    providers = [weights, requantized(images, "Q8_0"), requantized(images, "Q4_0")]
    seen = Everything(["l_out-0", "l_out-2", "ffn_swiglu-1"])
    walk(IDS, [Member(str(i), p, images.release) for i, p in enumerate(providers)], seen, has_reference=True)
    for m, provider in enumerate(providers):
        alone = Recorder()
        logits = forward(IDS, provider, alone)
        for name in seen.taps:
            torch.testing.assert_close(seen.seen[m, name][1], alone.taps[name], rtol=0, atol=0)
        for b in range(2):
            got = torch.cat([x for (i, chunk, _), x in sorted(seen.rows.items(), key=lambda kv: kv[0]) if (i, chunk) == (m, b)])
            torch.testing.assert_close(got, logits[b], rtol=1e-5, atol=1e-5)


def test_the_reference_is_beside_the_others_and_beside_none_without_one(weights: Weights) -> None:
    members = [Member("a", weights), Member("b", weights)]
    seen = Everything(["embd", "l_out-1"])
    walk(IDS, members, seen, has_reference=True)
    assert seen.seen[0, "l_out-1"][0] is None
    for name in ("embd", "l_out-1"):
        assert seen.seen[1, name][0] is seen.seen[0, name][1]
    walk(IDS, members, seen, has_reference=False)
    assert seen.seen[1, "l_out-1"][0] is None


def test_images_are_made_once_and_forgotten(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(lockstep, "stored_as", lambda x, qtype, name: made.append(f"{name} {qtype}") or x)
    images = Images(weights)
    pair = [requantized(images, "Q4_0"), requantized(images, "Q4_0")]
    for provider in pair:
        provider.layer(0)
    assert len(made) == len(set(made)) == 7
    images.release()
    pair[0].layer(0)
    assert len(made) == 14


def test_rows_are_the_rows_of_the_whole_image(weights: Weights) -> None:
    images = Images(weights)
    whole = images.get("token_embd.weight", QTYPES["Q4_0"])
    torch.testing.assert_close(images.rows("token_embd.weight", IDS, QTYPES["Q4_0"]), whole[IDS], rtol=0, atol=0)


def test_stored_as_is_decode_of_encode_and_names_the_tensor() -> None:
    x = torch.randn(4, 64)
    expected = decode(encode(x.numpy(), QTYPES["Q5_1"], 64), QTYPES["Q5_1"]).reshape(4, 64)
    np.testing.assert_array_equal(stored_as(x, QTYPES["Q5_1"], "w").numpy(), expected)
    with pytest.raises(NonFiniteError, match=r"blk\.0\.attn_q"):
        stored_as(torch.full((1, 32), torch.inf), QTYPES["Q4_0"], "blk.0.attn_q.weight")
    with pytest.raises(BlockError, match=r"blk\.0\.attn_q"):
        stored_as(torch.ones(1, 40), QTYPES["Q4_0"], "blk.0.attn_q.weight")
