"""Files of log-probabilities beside the real llama-perplexity's: one that it wrote, and the logits that it wrote it from.

tests/data/README.md has the command.  The model has F32 weights, so that nothing is rounded; another machine's registers sum in another
order, which may move a code by one where it lies in the middle between two.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantscope.engines.llama_session import LlamaSession
from quantscope.kld_base import KldBase, encode_rows, prepare_base, read_base, write_base
from quantscope.results import StudyOptions
from quantscope.study import run_study
from tests.models import STORIES
from tests.oracle.ggml_cpu import SAME_ORDER

ROOT = Path(__file__).resolve().parents[2]
THEIRS, TEXT = ROOT / "tests" / "data" / "stories260K-c64.kld", ROOT / "quantscope" / "data" / "demo.txt"
N_CTX, N_CHUNKS, N_VOCAB, BOS = 64, 4, 512, 1
MOVED = 1e-3 if SAME_ORDER else 1e-2  # share of the codes that another order of summation may move; the file is an AVX2 machine's
OPTIONS = StudyOptions((str(STORIES),), text=TEXT, n_ctx=N_CTX, n_chunks=N_CHUNKS)


def test_their_file_is_read() -> None:
    base = read_base(THEIRS)
    assert (base.n_ctx, base.n_chunk, base.n_vocab) == (N_CTX, N_CHUNKS, N_VOCAB)
    log_p = torch.from_numpy(llamas_logits(base)).log_softmax(-1)
    labels = torch.from_numpy(base.tokens[:, N_CTX // 2 + 1 :].astype(np.int64))
    exact = log_p.gather(-1, labels[..., None])[..., 0]
    reached = exact > log_p.amax(-1) - 16
    assert 0.9 < reached.float().mean() < 1
    found = torch.from_numpy(base.log_p_of_labels(slice(0, N_CHUNKS))).float()
    assert (found - exact)[reached].abs().max() <= 16 / 65535 / 2 + 1e-5
    assert (found > exact)[~reached].all()  # the lowest there is


def llamas_logits(base: KldBase) -> NDArray[np.float32]:
    """Of the scored positions, [C,S,V]."""
    with LlamaSession(STORIES, n_ctx=N_CTX) as llama:
        return np.stack([llama.decode([BOS, *chunk[1:].tolist()])[N_CTX // 2 : N_CTX - 1] for chunk in base.tokens])


def test_their_rows_from_llama_cpps_logits() -> None:
    """Byte for byte on a machine like the one that wrote the file."""
    base = read_base(THEIRS)
    rows = encode_rows(llamas_logits(base).reshape(-1, N_VOCAB)).reshape(base.rows.shape)
    moved = np.abs(rows["codes"].astype(int) - base.rows["codes"])
    assert moved.max() <= 1
    assert (moved > 0).mean() <= MOVED
    for field in ("scale", "lowest"):
        np.testing.assert_allclose(rows[field], base.rows[field], rtol=1e-6)


def test_our_file_from_our_forward_is_theirs(tmp_path: Path) -> None:
    write_base(tmp_path / "ours.kld", prepare_base(OPTIONS))
    ours, theirs = read_base(tmp_path / "ours.kld"), read_base(THEIRS)
    assert ours.mapped.size == theirs.mapped.size
    assert (ours.tokens == theirs.tokens).all()
    moved = np.abs(ours.rows["codes"].astype(int) - theirs.rows["codes"])
    assert moved.max() <= 1
    assert (moved > 0).mean() <= 0.05  # float32 in another order of summation
    for field in ("scale", "lowest"):
        np.testing.assert_allclose(ours.rows[field], theirs.rows[field], rtol=2e-6)


def test_a_study_with_their_file_finds_the_same_model() -> None:
    study = run_study(dataclasses.replace(OPTIONS, base=THEIRS, types=("Q4_0",)))
    same, quantized = study.variant(STORIES.stem).logits, study.variant("Q4_0").logits
    assert same is not None
    assert quantized is not None
    assert same.kl_nats == pytest.approx(0, abs=1e-6)
    assert same.kl_nats_max == pytest.approx(0, abs=1.3e-4)
    assert same.top1_agree == 1
    exact = run_study(dataclasses.replace(OPTIONS, types=("Q4_0",))).variant("Q4_0").logits
    assert exact is not None
    assert quantized.kl_nats == pytest.approx(exact.kl_nats, rel=1e-3)
    assert quantized.top1_agree == exact.top1_agree
