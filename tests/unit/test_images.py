"""Images: what a file of another type would hold, encoded once, decoded at each use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quantscope import images as module
from quantscope.errors import BlockError, NonFiniteError
from quantscope.images import Images, Requantized, decoded, encoded
from quantscope.qtypes import QTYPES
from quantscope.quants import decode, encode
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import make_gguf

Q4_0 = QTYPES["Q4_0"]


@pytest.fixture
def weights(tmp_path: Path) -> Weights:
    return Weights(open_source(make_gguf(tmp_path / "m.gguf", n_layer=2, seed=5)))


def requantized(images: Images) -> Requantized:
    return Requantized(images, {n: Q4_0 for n in images.weights.names() if len(images.weights.shape(n)) == 2})


def test_an_image_is_decode_of_encode() -> None:
    x = torch.randn(4, 64)
    expected = decode(encode(x.numpy(), QTYPES["Q5_1"], 64), QTYPES["Q5_1"]).reshape(4, 64)
    np.testing.assert_array_equal(decoded(encoded(x, QTYPES["Q5_1"], "w"), QTYPES["Q5_1"]).reshape(4, 64).numpy(), expected)


def test_errors_name_the_tensor() -> None:
    with pytest.raises(NonFiniteError, match=r"blk\.0\.attn_q"):
        encoded(torch.full((1, 32), torch.inf), Q4_0, "blk.0.attn_q.weight")
    with pytest.raises(BlockError, match=r"blk\.0\.attn_q"):
        encoded(torch.ones(1, 40), Q4_0, "blk.0.attn_q.weight")


def test_encoded_once_until_let_go(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(module, "encoded", lambda x, qtype, name, *more: made.append(name) or encoded(x, qtype, name, *more))
    images = Images(weights)
    pair = [requantized(images), requantized(images)]
    for provider in pair * 2:
        dict(provider.layer(0))
    assert len(made) == len(set(made)) == 7
    pair[0].let_go(pair[0].layer_names(0).values())
    dict(pair[1].layer(0))
    assert len(made) == 14


@pytest.mark.parametrize("band_bytes", [1, 5000, 1 << 26])
def test_bands_make_the_bytes_of_the_whole(weights: Weights, monkeypatch: pytest.MonkeyPatch, band_bytes: int) -> None:
    monkeypatch.setattr(module, "BAND_BYTES", band_bytes)
    whole = weights.get("output.weight")
    expected = encode(whole.numpy(), Q4_0, 64)
    np.testing.assert_array_equal(Images(weights).encoded("output.weight", Q4_0).numpy(), expected)


def test_rows_and_slices_are_those_of_the_whole_image(weights: Weights) -> None:
    images, ids = Images(weights), torch.tensor([[1, 40, 50], [1, 270, 3]])
    whole = images.get("token_embd.weight", Q4_0)
    assert torch.equal(images.rows("token_embd.weight", ids, Q4_0), whole[ids])
    provider = requantized(images)
    assert torch.equal(provider.top(slice(17, 40))["output.weight"], provider.top()["output.weight"][17:40])
    assert torch.equal(provider.top(slice(17, 40))["output_norm.weight"], weights.get("output_norm.weight"))


def test_tensors_of_no_type_are_the_files_own(weights: Weights) -> None:
    plain = Requantized(Images(weights), {})
    for local, tensor in weights.layer(1).items():
        assert torch.equal(plain.layer(1)[local], tensor)
