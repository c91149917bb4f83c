"""``--device cuda`` against the CPU: the same bits from the codecs, the same numbers within float32's rounding from the forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from quantscope.images import Images
from quantscope.metrics import nmse
from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES
from quantscope.quants import encode
from quantscope.quants.torch_codecs import TORCH_TYPES
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import LINEARS, STORIES, make_gguf
from tests.oracle import test_k_encode, test_legacy_encode
from tests.unit import test_torch_codecs

DEVICE = "cuda"
MAX_NMSE = {torch.float32: 1e-10, torch.float64: 1e-24}  # other orders of summation; TF32, ten bits of mantissa, would give some 1e-7

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device: not checked that the torch codecs give ggml's bits on CUDA and that the forward there is the CPU's",
)


@pytest.fixture(scope="module")
def blocks() -> np.ndarray:
    """Every case of the other encoding tests, float32 [n, 256]."""
    legacy = [x.reshape(-1, 256) for x in test_legacy_encode.CASES.values()]
    return np.concatenate([*map(test_k_encode.case, test_k_encode.CASES), *legacy, test_torch_codecs.every_case()])


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    """What a program around us may have set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_encodes_the_same_bytes(name: str, blocks: np.ndarray) -> None:
    test_torch_codecs.assert_same_bytes(name, blocks, DEVICE)


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_decodes_the_same_bits(name: str, blocks: np.ndarray) -> None:
    test_torch_codecs.assert_same_bits(name, encode(blocks, QTYPES[name], 256), DEVICE)
    test_torch_codecs.assert_same_bits(name, test_torch_codecs.random_bytes(name, 20_000), DEVICE)


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_requantized_weights_are_the_same_bits(name: str, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", n_layer=1, n_embd=256, n_ff=512)
    ours, theirs = (Images(Weights(open_source(path), device=device)) for device in (DEVICE, "cpu"))
    for tensor in ("token_embd.weight", *(f"blk.0.{local}.weight" for local in LINEARS)):
        x, y = ours.get(tensor, QTYPES[name]), theirs.get(tensor, QTYPES[name])
        assert x.device.type == DEVICE
        np.testing.assert_array_equal(x.cpu().numpy().view(np.uint32), y.numpy().view(np.uint32))


@pytest.mark.usefixtures("tf32_allowed")
@pytest.mark.parametrize("dtype", MAX_NMSE)
def test_every_tap_is_the_cpus(dtype: torch.dtype) -> None:
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 512, (2, 64)))
    ours, theirs = Recorder(), Recorder()
    for device, recorder in ((DEVICE, ours), ("cpu", theirs)):
        weights = Weights(open_source(STORIES), device=device)
        forward(ids, weights, recorder, dtype=dtype)
        assert {x.device.type for x in recorder.taps.values()} == {device}
    assert set(ours.taps) == set(theirs.taps)
    assert {"embd", "kq_soft_max-0", "l_out-4", "result_output"} <= set(theirs.taps)
    errors = {name: float(nmse(x.flatten(), ours.taps[name].cpu().flatten())) for name, x in theirs.taps.items()}
    assert {name: e for name, e in errors.items() if not e <= MAX_NMSE[dtype]} == {}
