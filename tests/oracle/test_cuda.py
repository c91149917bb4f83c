"""``--device cuda`` against the CPU: the same bits from the codecs, the same numbers within float32's rounding from all that computes.

What it imports needs neither llama-cpp-python nor Transformers, as a machine with a GPU often has a small environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantscope.images import Images
from quantscope.kld_base import prepare_base, read_base, write_base
from quantscope.logit_sums import LogitSums
from quantscope.metrics import nmse
from quantscope.model.forward import forward
from quantscope.model.taps import Recorder
from quantscope.qtypes import QTYPES
from quantscope.quants import encode
from quantscope.quants.torch_codecs import TORCH_TYPES
from quantscope.results import Study, StudyOptions
from quantscope.sources.resolve import open_source
from quantscope.study import run_study
from quantscope.tap_stats import measure
from quantscope.weights import Weights
from tests.models import LINEARS, STORIES, make_gguf
from tests.oracle import test_k_encode
from tests.unit import test_torch_codecs

DEVICE = "cuda"
DATA = Path(__file__).resolve().parents[2] / "quantscope" / "data"
DEMO = StudyOptions((str(DATA / "demo-f16.gguf"),), ("Q4_0", "Q2_K", "Q6_K"), prompt="Once", text=DATA / "demo.txt", n_ctx=64, n_chunks=3)
MAX_NMSE = {torch.float32: 1e-10, torch.float64: 1e-24}  # other orders of summation; TF32, ten bits of mantissa, would give some 1e-7

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no CUDA device: not checked that the torch codecs give ggml's bits on CUDA and that the forward there is the CPU's",
)


@pytest.fixture(scope="module")
def blocks() -> np.ndarray:
    """The cases of other encoding tests, of which none needs ggml itself, float32 [n, 256]."""
    return np.concatenate([*map(test_k_encode.case, test_k_encode.CASES), test_torch_codecs.every_case()])


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


# --- what a study reads off -------------------------------------------------------------------------------------------------------------


def test_summaries_of_taps_are_the_cpus() -> None:
    """Ties over the whole tap, so that which of the largest is the first decides; massive activations; what is not finite."""
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.integers(-9, 10, (6, 100, 2048)).astype(np.float32))
    x[1] *= 1000
    x[2, 50:, 7] = 1e6
    x[3, 31, 900] = torch.nan
    x[4, 99, 2047] = torch.inf
    x[5] = 0
    ref = x + torch.from_numpy(rng.standard_normal(x.shape).astype(np.float32))
    for r in (None, ref):
        ours = measure(None if r is None else r.to(DEVICE), x.to(DEVICE), chunk0=0)
        np.testing.assert_allclose(ours, measure(r, x, chunk0=0), rtol=1e-12, equal_nan=True)


@pytest.mark.parametrize("stored", [False, True])
def test_sums_of_logits_are_the_cpus(stored: bool) -> None:
    """Ties within and between the slices of the vocabulary; tokens of probability 0; a NaN."""
    rng = np.random.default_rng(3)
    members = [torch.from_numpy(rng.integers(-400, 401, (700, 3000)).astype(np.float32) / 80) for _ in range(3)]
    members[0] = members[0].log_softmax(-1) if stored else members[0]
    members[0][3, 5:900] = members[1][9, 2000:] = -torch.inf
    members[2][11, 2999] = torch.nan
    labels = torch.from_numpy(rng.integers(0, 3000, 700))
    both = []
    for device in (DEVICE, "cpu"):
        sums = LogitSums(700, 3, labels=labels.to(device), has_reference=True, stored=stored, device=device)
        for v0 in range(0, 3000, 1024):
            sums.add(v0, [x[:, v0 : v0 + 1024].to(device) for x in members])
        both.append({what: getattr(sums, what).cpu().numpy() for what in ("kl", "mass", "log_p", "top_id", "same_top")})
    for what, theirs in both[1].items():
        np.testing.assert_allclose(both[0][what], theirs, rtol=1e-10, atol=1e-12, equal_nan=True, err_msg=what)


def assert_same_study(ours: Study, theirs: Study) -> None:
    """The same tokens and places, and numbers that differ by what the other order of float32 sums makes of them."""
    for x, y in zip(ours.variants, theirs.variants, strict=True):
        assert (x.name, x.types, x.file_bytes, [g.id for g in x.generated]) == (y.name, y.types, y.file_bytes, [g.id for g in y.generated])
        assert x.logits is not None
        assert y.logits is not None
        assert x.logits.ppl == pytest.approx(y.logits.ppl, rel=1e-6)
        assert x.logits.kl_nats == (y.logits.kl_nats and pytest.approx(y.logits.kl_nats, rel=1e-4))  # None: the original
        assert x.logits.top1_agree == pytest.approx(y.logits.top1_agree, abs=0.02)  # two logits may be as good as equal
        assert [(a.tap, a.layer, a.n, a.n_massive) for a in x.ops] == [(b.tap, b.layer, b.n, b.n_massive) for b in y.ops]
        for what in ("rms", "abs_max", "nmse", "outlier_share"):
            values, expected = ([getattr(row, what) or 0.0 for row in v.ops] for v in (x, y))
            np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-12, err_msg=f"{x.name}, {what}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_study_gives_the_cpus_numbers(dtype: Any) -> None:
    assert_same_study(*(run_study(replace(DEMO, device=device, dtype=dtype)) for device in (DEVICE, "cpu")))


def test_a_base_file_gives_the_cpus_numbers(tmp_path: Path) -> None:
    """Written on the GPU, and compared with there."""
    for device in (DEVICE, "cpu"):
        write_base(tmp_path / device, prepare_base(replace(DEMO, types=(), prompt=None, device=device)))
    ours, theirs = (read_base(tmp_path / device) for device in (DEVICE, "cpu"))
    for what in ("scale", "lowest"):
        np.testing.assert_allclose(ours.rows[what], theirs.rows[what], rtol=1e-5)
    quantized = replace(DEMO, prompt=None, types=(), base=tmp_path / "cpu", dtype="float64")
    assert_same_study(*(run_study(replace(quantized, device=device)) for device in (DEVICE, "cpu")))
