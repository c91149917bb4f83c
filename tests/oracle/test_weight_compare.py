"""Files that llama.cpp itself quantized, against each other: no false alarm, and planted faults by their names."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quantscope.qtypes import QTYPES
from quantscope.quants import CODECS, can_encode
from quantscope.report.weights import answer
from quantscope.sources.resolve import open_source
from quantscope.weight_compare import MEASURED, TensorDiff, WeightComparison, compare_weights
from quantscope.weights import Weights
from tests.oracle import ggml
from tests.oracle.quantized_files import demo_file
from tests.oracle.test_arithmetic import quantized

PRESETS = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q5_1", "Q4_K_M", "Q4_0", "Q4_1", "Q3_K_M", "Q2_K")
SOME = ("output_norm.weight", "blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.4.attn_v.weight", "blk.9.ffn_down.weight")
Bytes = NDArray[np.uint8]
Q, V, DOWN = "blk.3.attn_q.weight", "blk.5.attn_v.weight", "blk.0.ffn_down.weight"
HALF_SPLIT = np.arange(256).reshape(8, 16, 2).swapaxes(1, 2).ravel()  # of 8 heads of 32 rows


def opened(path: Path) -> Weights:
    return Weights(open_source(path))


@pytest.fixture(scope="module")
def files() -> dict[str, Weights]:
    return {preset: opened(demo_file(preset)) for preset in PRESETS}


def test_no_false_alarm_between_any_two_types(files: dict[str, Weights]) -> None:
    n = 0
    for a, b in combinations(PRESETS, 2):
        c = compare_weights(files[a], files[b], SOME)
        assert not c.unexplained, f"{a} and {b}: {answer(c)}"
        assert len(c.rows) == len(SOME)
        n += sum(row.nmse > 0 for row in c.rows)
    assert n > 200  # comparisons that were not simply equal


def test_no_false_alarm_in_whole_files(files: dict[str, Weights]) -> None:
    for a, b in pairwise(("F16", "Q4_K_M", "Q2_K")):
        c = compare_weights(files[a], files[b])
        assert not c.unexplained, f"{a} and {b}: {answer(c)}"
        assert len(c.rows) == 93


def damaged(tmp_path: Path, weights: Weights, name: str, change: Callable[[Bytes], Any]) -> Weights:
    """The file with the bytes of one tensor changed: change([rows, bytes of a row]) returns as many bytes."""
    raw = weights.source.raw(name)
    whole = weights.source.path.read_bytes()
    at = whole.index(raw.tobytes())
    new = np.ascontiguousarray(change(raw.reshape(weights.shape(name)[0], -1).copy())).tobytes()
    assert len(new) == raw.size
    path = tmp_path / "damaged.gguf"
    path.write_bytes(whole[:at] + new + whole[at + raw.size :])
    return opened(path)


def found(files: dict[str, Weights], a: str, b: Weights, name: str) -> TensorDiff:
    """The only tensor of this and others that is not explained."""
    c = compare_weights(files[a], b, (*SOME, name))
    assert [row.name for row in c.unexplained] == [name], answer(c)
    return c.unexplained[0]


@pytest.mark.parametrize("pair", [("F16", "F32"), ("F16", "Q8_0"), ("Q4_K_M", "Q5_0"), ("Q6_K", "Q4_0"), ("Q2_K", "Q3_K_M")])
def test_rows_of_q_not_permuted(files: dict[str, Weights], tmp_path: Path, pair: tuple[str, str]) -> None:
    row = found(files, pair[0], damaged(tmp_path, files[pair[1]], Q, lambda rows: rows[HALF_SPLIT]), Q)
    assert [cause.verified for cause in row.causes] == [True]
    assert "rows of each head half-split, interleaved in A" in row.causes[0].text


@pytest.mark.parametrize("a", ["F16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_a_transposed_matrix(files: dict[str, Weights], tmp_path: Path, a: str) -> None:
    b = damaged(tmp_path, files["F16"], Q, lambda rows: rows.view(np.float16).T)
    assert [(c.text, c.verified) for c in found(files, a, b, Q).causes] == [("A's matrix transposed", True)]


@pytest.mark.parametrize("a", ["F32", "Q4_0"])
def test_a_norm_plus_one(files: dict[str, Weights], tmp_path: Path, a: str) -> None:
    name = "blk.7.ffn_norm.weight"
    b = damaged(tmp_path, files["Q4_K_M"], name, lambda rows: rows.view(np.float32) + np.float32(1))
    assert found(files, a, b, name).causes[0].text.startswith("A's values plus 1 ")


@pytest.mark.parametrize(("a", "all_of_it"), [("F32", False), ("Q6_K", True), ("Q4_K_M", True), ("Q3_K_M", True)])
def test_values_of_a_decoder_with_the_wrong_order_of_q6_k(files: dict[str, Weights], tmp_path: Path, a: str, all_of_it: bool) -> None:
    """Written as F32, which does not explain that the values went through Q6_K: beside the F32 original that is left, and said."""
    right = files["Q6_K"].get(DOWN).numpy()
    wrong = right.reshape(-1, 4, 32).swapaxes(1, 2).reshape(right.shape)  # l, l+32, l+64, l+96 taken in sequence
    row = found(files, a, damaged(tmp_path, files["F32"], DOWN, lambda _: wrong), DOWN)
    assert [cause.verified for cause in row.causes] == [all_of_it]
    assert "each block of 256 in another order" in row.causes[0].text
    assert "the order of Q6_K" in row.causes[0].text
    assert ("leaves more than the types explain" in answer(WeightComparison("", "", (row,)))) is not all_of_it
    assert row.causes[0].left < 0.03


def one_block(rows: Bytes, size: int, quants: slice) -> Bytes:
    """Random bytes for the quants of the last block of row 10; its scales stay finite."""
    block = rows[10].reshape(-1, size)[-1]
    block[quants] = np.random.default_rng(0).integers(0, 256, len(block[quants]))
    return rows


@pytest.mark.parametrize("a", ["F16", "Q8_0", "Q6_K", "Q4_0", "Q4_K_M"])
@pytest.mark.parametrize(("b", "quants"), [("Q8_0", slice(2, 34)), ("Q4_0", slice(2, 18)), ("Q5_K_M", None), ("Q6_K", slice(0, 192))])
def test_one_corrupt_block(files: dict[str, Weights], tmp_path: Path, a: str, b: str, quants: slice | None) -> None:
    qtype = files[b].stored(V).qtype
    part = quants or {"Q6_K": slice(0, 192), "Q5_K": slice(16, 176)}[qtype.name]
    row = found(files, a, damaged(tmp_path, files[b], V, lambda rows: one_block(rows, qtype.type_size, part)), V)
    assert (row.verdict, row.bad_blocks) == ("blocks", 1)
    assert row.worst is not None
    assert row.worst.row == 10


def test_a_block_with_scales_64_times_too_large_does_not_excuse_itself(files: dict[str, Weights], tmp_path: Path) -> None:
    """Q2_K makes 9 % error on these values: of the damaged ones it would be as much as the difference over BLOCK_FACTOR."""
    name = next(n for n in files["Q2_K"].stored_names() if files["Q2_K"].stored(n).qtype.name == "Q2_K")

    def scaled(rows: Bytes) -> Bytes:
        scales = rows[10].reshape(-1, 84)[0, 80:84].view(np.float16)  # d and dmin
        scales *= np.float16(64)
        return rows

    for a in ("F16", "Q4_0", "Q3_K_M"):
        row = found(files, a, damaged(tmp_path, files["Q2_K"], name, scaled), name)
        assert (row.verdict, row.bad_blocks) == ("blocks", 1)


def test_unrelated_values(files: dict[str, Weights], tmp_path: Path) -> None:
    """A matrix whose values were shuffled: the same statistics, no value in its place."""
    name = "output.weight"
    b = damaged(tmp_path, files["F16"], name, lambda rows: np.random.default_rng(1).permutation(rows.view(np.float16).ravel()))
    row = found(files, "Q4_0", b, name)
    assert (row.verdict, row.causes) == ("differs", ())
    assert abs(row.cosine) < 0.1


FAST = (
    "IQ2_XXS",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
    "NVFP4",
    "Q1_0",
    "Q2_0",
)  # ggml prepares others for 10 s


@pytest.mark.parametrize("name", FAST)
def test_the_table_of_measured_errors(name: str) -> None:
    """As ggml's own error on normal values, the worst of trained matrices included: at most a quarter more."""
    x = np.random.default_rng(1).standard_normal((8, 1024)).astype(np.float32).ravel()  # what quantized() encodes
    error = x - ggml.to_float(quantized(8, 1024, QTYPES[name]).ravel(), QTYPES[name])
    assert MEASURED[name] / 1.25 <= float((error**2).sum() / (x**2).sum()) <= MEASURED[name]


def test_the_table_has_every_type_without_an_encoder() -> None:
    assert sorted(MEASURED) == sorted(name for name in CODECS if not can_encode(QTYPES[name]))
