"""Two files with the same tensors: what types explain, planted faults and their names, what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantscope.cli.weights import weights as command
from quantscope.errors import MissingTensorError
from quantscope.report.weights import answer, said, weights_table
from quantscope.sources.resolve import open_source
from quantscope.weight_causes import found_order, named_order
from quantscope.weight_compare import FACTOR, TensorDiff, WeightComparison, compare_weights
from quantscope.weights import Weights, interleave_rows
from tests.models import QKV_BIASES, STORIES, make_gguf, random_tensors
from tests.unit.test_weights import hf_folder

Array = NDArray[np.float32]
TENSORS = random_tensors("llama", 2, 64, 64, 32, 16, 96, 288, False, (), (), 0)  # those of make_gguf
Q, K, UP, NORM = "blk.1.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_up.weight", "blk.1.ffn_norm.weight"


def opened(path: Path) -> Weights:
    return Weights(open_source(path))


def compared(tmp_path: Path, edit: dict[str, Any] | None = None, types: tuple[str, str] = ("F32", "F16"), **model: Any) -> WeightComparison:
    a = make_gguf(tmp_path / "a.gguf", dtype=types[0], **model)
    b = make_gguf(tmp_path / "b.gguf", dtype=types[1], edit=edit, **model)
    return compare_weights(opened(a), opened(b))


def row_of(c: WeightComparison, name: str) -> TensorDiff:
    return next(row for row in c.rows if row.name == name)


def only(c: WeightComparison) -> TensorDiff:
    assert len(c.unexplained) == 1, answer(c)
    return c.unexplained[0]


@pytest.mark.parametrize("types", [("F32", "F32"), ("F32", "BF16"), ("Q8_0", "F16"), ("Q4_0", "Q5_1"), ("Q4_1", "Q4_0")])
def test_types_explain_their_errors_and_the_prediction_is_close(tmp_path: Path, types: tuple[str, str]) -> None:
    c = compared(tmp_path, types=types)
    assert not c.unexplained
    assert len(c.rows) == len(TENSORS)
    for row in c.rows:
        assert row.verdict == ("equal" if row.name.endswith("norm.weight") or types[0] == types[1] else "explained")
        if row.verdict == "explained":  # FACTOR times the error; the dither adds a quarter to the energy
            assert 0.6 < FACTOR * row.nmse / row.expected < 1.1, row


def interleaved(w: Array) -> Array:
    return interleave_rows(torch.from_numpy(w), len(w) // 16).numpy()


def half_split(w: Array) -> Array:
    return w.reshape(-1, 8, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def neighbours(parts: int, group: int) -> Callable[[Array], Array]:
    return lambda w: w.reshape(-1, parts, group // parts).swapaxes(1, 2).reshape(w.shape)


FAULTS: tuple[tuple[str, str, Callable[[Array], Array]], ...] = (
    (Q, "transposed", lambda w: w.T),
    (UP, "in this matrix's shape", lambda w: w.T.reshape(w.shape)),
    (UP, "read in the shape of the transposed", lambda w: w.reshape(w.shape[::-1]).T),
    (K, "half-split, interleaved in A", half_split),
    (Q, "interleaved, half-split in A", interleaved),
    (NORM, "A's values plus 1 ", lambda w: w + 1),
    (NORM, "A's values minus 1 ", lambda w: w - 1),
    (UP, "A's values times 0.12", lambda w: w / 8),
    (Q, "A's values times −", lambda w: -w),
    (NORM, "A's values plus 0.25", lambda w: w + 0.25),
    (UP, "only zeros", lambda w: w * 0),
    (NORM, "the same values in another order", lambda w: w[::-1]),
    (UP, "the order of Q4_0", neighbours(2, 32)),
    (UP, "each block of 32 in another order", lambda w: w.reshape(-1, 32)[:, ::-1].reshape(w.shape)),
    (UP, "A's rows in another order", lambda w: w[np.random.default_rng(1).permutation(len(w))]),
    (UP, "A's columns in another order", lambda w: w[:, np.random.default_rng(1).permutation(w.shape[1])]),
    (UP, "what A has as blk.0.ffn_gate.weight", lambda w: TENSORS["blk.0.ffn_gate.weight"]),
    (Q, "what A has as blk.0.attn_q.weight", lambda w: TENSORS["blk.0.attn_q.weight"]),
)


@pytest.mark.parametrize("types", [("F32", "F16"), ("Q8_0", "Q4_0")])
@pytest.mark.parametrize(("name", "text", "fault"), FAULTS, ids=[f[1] for f in FAULTS])
def test_planted_faults_are_named(tmp_path: Path, name: str, text: str, fault: Callable[[Array], Array], types: tuple[str, str]) -> None:
    row = only(compared(tmp_path, {name: np.ascontiguousarray(fault(TENSORS[name]))}, types))
    assert row.name == name
    assert [text in cause.text and cause.verified for cause in row.causes] == [True], row.causes
    assert row.causes[0].left <= max(row.expected, 1e-9)


def test_causes_that_cannot_be_told_apart_are_named_together(tmp_path: Path) -> None:
    ones = {NORM: np.ones(64, np.float32)}
    a, b = (make_gguf(tmp_path / f"{i}.gguf", edit={NORM: ones[NORM] * i}) for i in (1, 2))
    row = only(compare_weights(opened(a), opened(b)))
    assert [cause.text[:14] for cause in row.causes] == ["A's values plu", "A's values tim"]


@pytest.mark.parametrize("types", [("F32", "F32"), ("F32", "F16"), ("F16", "Q8_0"), ("Q5_1", "Q4_0")])
@pytest.mark.parametrize("damage", [lambda block: block * 0, lambda block: -block, lambda block: block[::-1], lambda block: block * 64])
def test_a_corrupt_block_is_found_and_located(tmp_path: Path, types: tuple[str, str], damage: Callable[[Array], Array]) -> None:
    table = TENSORS["token_embd.weight"].copy()
    table[200, 32:64] = damage(table[200, 32:64])
    row = only(compared(tmp_path, {"token_embd.weight": table}, types))
    assert (row.verdict, row.bad_blocks, row.causes) == ("blocks", 1, ())
    assert row.worst is not None
    assert (row.worst.row, row.worst.column, row.worst.size) == (200, 32, 32)
    zero = not table[200, 32:64].any()
    assert f"1 of 576 blocks corrupt; the worst, 32 elements from [200, 32], {'is zero' if zero else 'has'}" in said(row)


@pytest.mark.parametrize("types", [("F16", "Q4_0"), ("F32", "F16")])
def test_faint_rows_and_spikes_are_no_fault(tmp_path: Path, types: tuple[str, str]) -> None:
    """Row 5 is among F16's subnormals, where its error is thousands of times that of the other rows."""
    table = TENSORS["token_embd.weight"].copy()
    table[5] *= 1e-6
    table[7, ::2] = 0
    table[9, 40] = 900
    a, b = (make_gguf(tmp_path / f"{t}.gguf", dtype=t, edit={"token_embd.weight": table}) for t in types)
    assert not compare_weights(opened(a), opened(b)).unexplained


def test_another_model(tmp_path: Path) -> None:
    a, b = (make_gguf(tmp_path / f"{seed}.gguf", dtype="Q4_0", seed=seed) for seed in (0, 1))
    c = compare_weights(opened(a), opened(b))
    assert len(c.unexplained) == len(TENSORS)
    assert all(row.causes == () for row in c.rows)
    assert answer(c) == "Another model altogether: the values of all 16 matrices are unrelated."


def test_trained_on(tmp_path: Path) -> None:
    noise = np.random.default_rng(3).standard_normal(TENSORS[UP].shape, np.float32)
    row = only(compared(tmp_path, {UP: TENSORS[UP] * (1 + 0.05 * noise)}))
    assert (row.verdict, row.causes) == ("differs", ())
    assert "like rounding or further training" in said(row)


def test_two_faults_at_once_leave_a_rest_that_is_said(tmp_path: Path) -> None:
    turned = TENSORS[Q].T.copy()
    turned[3] *= 1.5
    row = only(compared(tmp_path, {Q: turned}))
    assert [(cause.text, cause.verified) for cause in row.causes] == [("A's matrix transposed", False)]
    assert "leaves more than the types explain" in said(row)


def test_tensors_of_one_file_and_other_shapes(tmp_path: Path) -> None:
    a = make_gguf(tmp_path / "a.gguf", biases=QKV_BIASES)
    b = make_gguf(tmp_path / "b.gguf", n_ff=64)
    c = compare_weights(opened(a), opened(b))
    verdicts = {row.name: row.verdict for row in c.unexplained}
    assert verdicts["blk.0.attn_q.bias"] == "only in A"
    assert verdicts["blk.0.ffn_up.weight"] == "shape"
    assert ": only in A." in answer(c)
    assert "[96, 64] in A and [64, 64] in B" in answer(c)
    back = compare_weights(opened(b), opened(a))
    assert row_of(back, "blk.0.attn_q.bias").verdict == "only in B"
    wide = make_gguf(tmp_path / "wide.gguf", n_embd=128)
    assert answer(compare_weights(opened(wide), opened(STORIES))) == "Another model altogether: no tensor has the same shape in both files."


def test_a_tied_head_is_compared_with_the_embedding(tmp_path: Path) -> None:
    without_head = {name: values for name, values in TENSORS.items() if name != "output.weight"}
    tied = opened(make_gguf(tmp_path / "tied.gguf", tied=True, edit=without_head))
    copied = make_gguf(tmp_path / "b.gguf", edit={"output.weight": TENSORS["token_embd.weight"]})
    assert not compare_weights(tied, opened(copied)).unexplained
    assert only(compare_weights(tied, opened(make_gguf(tmp_path / "c.gguf")))).name == "output.weight"


def test_a_folder_whose_rows_were_never_permuted(tmp_path: Path) -> None:
    gguf = opened(make_gguf(tmp_path / "m.gguf"))
    c = compare_weights(opened(hf_folder(tmp_path / "hf", gguf)), gguf)  # the folder holds the rows of the GGUF file as they are
    assert {row.name for row in c.unexplained} == {f"blk.{i}.attn_{x}.weight" for i in range(2) for x in "qk"}
    assert "blk.*.attn_q.weight (2) and blk.*.attn_k.weight (2): B holds the rows of each head" in answer(c)


def test_orders_are_found() -> None:
    x = torch.randn(500, 256, generator=torch.Generator().manual_seed(0))
    here = torch.arange(256)
    for parts, group, text in ((2, 64, "Q4_K"), (4, 128, "Q6_K")):
        order = here.reshape(-1, parts, group // parts).transpose(1, 2).flatten()
        for wrong in (order, order.argsort()):
            found = found_order(x, x[:, wrong])
            assert found is not None
            assert torch.equal(found, wrong)
            assert text in named_order(found)
    assert named_order(here.flip(0)) == ""
    assert found_order(torch.ones(4, 8), torch.ones(4, 8)) is None


def test_bands_do_not_change_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compared(tmp_path, types=("Q8_0", "Q4_0"))
    monkeypatch.setattr("quantscope.weight_compare.BAND", 640)
    assert [(r.verdict, r.n_blocks, pytest.approx(r.nmse)) for r in compared(tmp_path, types=("Q8_0", "Q4_0")).rows] == [
        (r.verdict, r.n_blocks, r.nmse) for r in whole.rows
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_gguf(tmp_path / "a.gguf"), make_gguf(tmp_path / "b.gguf", dtype="Q4_0")
    assert command(str(a), str(b)) == 0
    assert "All 21 tensors agree: 5 are equal, 16 differ by no more" in " ".join(capsys.readouterr().out.split())
    c = make_gguf(tmp_path / "c.gguf", dtype="Q4_0", edit={NORM: TENSORS[NORM] + 1})
    assert command(str(a), str(c), all=True, json=True) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [t["name"] for t in found["tensors"] if t["verdict"] == "differs"] == [NORM]
    assert "plus 1 (one side" in found["answer"]
    assert "≠ blk.1.ffn_" in err


def test_a_needed_tensor_that_is_missing(tmp_path: Path) -> None:
    a, b = make_gguf(tmp_path / "a.gguf"), make_gguf(tmp_path / "b.gguf", edit={UP: None})
    with pytest.raises(MissingTensorError, match=UP):
        command(str(a), str(b))


def test_the_table_shows_what_differs_or_all(tmp_path: Path) -> None:
    c = compared(tmp_path, {NORM: TENSORS[NORM] + 1})
    assert len(weights_table(c).rows) == 1
    assert weights_table(c).caption == "20 tensors within what the types explain not shown; `--all` shows them."
    assert len(weights_table(c, every=True).rows) == 21


# ---------------------------------------------------------------- channel scales that cancel


def equalized(seed: int = 0) -> dict[str, Array]:
    """All tensors of make_gguf's model with random channel scales between maker and readers; 2 heads share one of v."""
    rng, new = np.random.default_rng(seed), dict(TENSORS)
    for i in range(2):
        s = {n: np.exp(rng.normal(0, 0.8, n)).astype(np.float32) for n in (64, 32, 96)}

        def scale(name: str, rows: Array | float = 1.0, columns: Array | float = 1.0, layer: str = f"blk.{i}.") -> None:
            new[f"{layer}{name}.weight"] = (np.asarray(rows) * (new[f"{layer}{name}.weight"] * columns).T).T.astype(np.float32)

        for norm, readers in (("attn_norm", ("attn_q", "attn_k", "attn_v")), ("ffn_norm", ("ffn_gate", "ffn_up"))):
            scale(norm, 1 / s[64])
            for reader in readers:
                scale(reader, columns=s[64])
        scale("attn_v", 1 / s[32])
        scale("attn_output", columns=np.repeat(s[32].reshape(2, 1, 16), 2, axis=1).reshape(-1))
        scale("ffn_up", 1 / s[96])
        scale("ffn_down", columns=s[96])
    return new


@pytest.mark.parametrize("types", [("F32", "F32"), ("F32", "Q8_0"), ("Q4_0", "F16")])
def test_channel_scales_that_cancel_are_no_difference(tmp_path: Path, types: tuple[str, str]) -> None:
    c = compared(tmp_path, equalized(), types)
    assert not c.unexplained, answer(c)
    assert sum(row.verdict == "rescaled" for row in c.rows) == 2 * 9
    assert "18 by channel scales that cancel" in answer(c)


def test_channel_scales_that_do_not_cancel_are_a_difference(tmp_path: Path) -> None:
    edit = equalized()
    edit["blk.0.ffn_norm.weight"] = TENSORS["blk.0.ffn_norm.weight"]
    bad = {row.name for row in compared(tmp_path, edit).unexplained}
    assert bad == {"blk.0.ffn_gate.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"}  # up's rows are known with its columns only


def test_what_a_file_says_was_retuned(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    edit = {NORM: (TENSORS[NORM] * (1 + 0.05 * rng.standard_normal(64))).astype(np.float32), "blk.0.attn_q.bias": np.ones(64, np.float32)}
    account = {"correct": "norms,bias", "norms": [NORM], "bias": ["blk.0.attn_q.bias"]}
    said_so = {"metadata": {"quantscope.recipe": json.dumps(account)}}
    assert {row.name for row in compared(tmp_path, edit).unexplained} == {NORM, "blk.0.attn_q.bias"}
    c = compared(tmp_path, edit, **said_so)
    assert not c.unexplained
    assert "2 are norm weights and biases that the file says were re-tuned" in answer(c)
    unlike = compared(tmp_path, edit | {NORM: rng.standard_normal(64).astype(np.float32)}, **said_so)
    assert [row.name for row in unlike.unexplained] == [NORM]  # saying so does not excuse everything
