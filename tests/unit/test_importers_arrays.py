"""Arrays of an engine: names, layouts, and what cannot be told without an option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from quantscope.arch.config import ModelConfig
from quantscope.arch.read import read_config
from quantscope.errors import ImportFormatError, UsageError
from quantscope.importers.arrays import read_arrays
from quantscope.importers.axes import check_widths
from quantscope.importers.base import AT_LAST
from quantscope.importers.layouts import Known, align
from quantscope.importers.name_map import parse_rule, taps_of
from quantscope.importers.read import read
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Trace
from tests.models import make_gguf

T, E, H, D, F = 5, 64, 4, 16, 96


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """n_embd 64, 4 heads of 16, 2 key/value heads, n_ff 96."""
    source = open_source(make_gguf(tmp_path_factory.mktemp("m") / "m.gguf"))
    try:
        return read_config(source)
    finally:
        source.close()


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def saved(folder: Path, **arrays: Any) -> Path:
    path = folder / "a.npz"
    np.savez(path, **{name.replace("__", "-"): a for name, a in arrays.items()})
    return path


def imported(path: Path, *rules: str, known: Known = Known(), kind: str = "npz") -> Trace:  # noqa: B008
    (run,) = read_arrays(path, [parse_rule(r) for r in rules], known, kind).runs
    return run.trace


def full(trace: Trace, tap: str) -> Full:
    (found,) = trace.taps[tap]
    assert isinstance(found, Full)
    return found


# ---- Layouts ------------------------------------------------------------------------------------------------------------

STREAM, HEADS = values(T, E), values(T, H, D)


@pytest.mark.parametrize(
    ("tap", "array", "wanted"),
    [
        ("l_out-0", STREAM, STREAM),
        ("l_out-0", STREAM.T, STREAM),
        ("l_out-0", STREAM[None], STREAM),
        ("l_out-0", STREAM.T[None], STREAM),
        ("Qcur-0", HEADS[None], HEADS.reshape(T, -1)),
        ("Qcur-0", HEADS.transpose(1, 0, 2)[None], HEADS.reshape(T, -1)),
        ("Qcur-0", HEADS, HEADS.reshape(T, -1)),
        ("Qcur-0", HEADS.transpose(1, 0, 2), HEADS.reshape(T, -1)),
        ("Qcur-0", HEADS.reshape(T, -1), HEADS.reshape(T, -1)),
    ],
    ids=["TE", "ET", "1TE", "1ET", "1THD", "1HTD", "THD", "HTD", "TQ"],
)
def test_every_layout_gives_the_same(tap: str, array: np.ndarray, wanted: np.ndarray, tmp_path: Path, config: ModelConfig) -> None:
    trace = imported(saved(tmp_path, **{tap: array}), known=Known(T, config))
    found = full(trace, tap)
    assert torch.equal(found.values, torch.from_numpy(wanted.copy()))
    assert found.positions is None
    assert any(note.startswith("Layouts found: [") for note in trace.origin.notes)


@pytest.mark.parametrize("shape", [(E,), (1, E), (1, 1, E)])
def test_last_token_only(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = saved(tmp_path, l_out__0=values(*shape))
    assert full(imported(path, known=Known(T)), "l_out-0").positions == (T - 1,)
    assert full(imported(path, known=Known(1)), "l_out-0").positions is None
    assert full(imported(path), "l_out-0").positions == AT_LAST
    assert full(imported(path), "l_out-0").values.shape == (1, E)


def test_the_last_token_of_some_taps_beside_all_of_others(tmp_path: Path) -> None:
    trace = imported(saved(tmp_path, l_out__0=values(T, E), ffn_up__0=values(T, F), result_norm=values(E)))
    assert full(trace, "result_norm").positions == (T - 1,)


def test_attention_map(tmp_path: Path, config: ModelConfig) -> None:
    x = values(1, H, T, T)
    trace = imported(saved(tmp_path, kq_soft_max__0=x), known=Known(T, config))
    assert torch.equal(full(trace, "kq_soft_max-0").values, torch.from_numpy(x[0]))


def test_arrays_settle_each_other(tmp_path: Path) -> None:
    """One array [5,64] may be either way; a second one with 96 channels leaves one."""
    with pytest.raises(ImportFormatError, match=r"l_out-0 of shape \[5, 64\] can be read as .*\[T,E\].*\[E,T\].*`--tokens` and `--model`"):
        imported(saved(tmp_path, l_out__0=STREAM))
    trace = imported(saved(tmp_path, l_out__0=STREAM, ffn_up__0=values(T, F)))
    assert torch.equal(full(trace, "l_out-0").values, torch.from_numpy(STREAM))


def test_as_many_tokens_as_channels(tmp_path: Path, config: ModelConfig) -> None:
    """Square arrays: nothing tells the axes apart but arrays of the same file that are not square."""
    square, up = values(E, E), values(E, F)
    with pytest.raises(ImportFormatError, match="prompt of another number of tokens"):
        imported(saved(tmp_path, l_out__0=square), known=Known(E, config))
    trace = imported(saved(tmp_path, l_out__0=square, ffn_up__0=up), known=Known(E, config))
    assert torch.equal(full(trace, "l_out-0").values, torch.from_numpy(square))
    trace = imported(saved(tmp_path, l_out__0=square, ffn_up__0=up.T), known=Known(E, config))
    assert torch.equal(full(trace, "l_out-0").values, torch.from_numpy(square.T.copy()))


def test_as_many_tokens_as_heads(tmp_path: Path, config: ModelConfig) -> None:
    with pytest.raises(ImportFormatError, match=r"\[T,H,D\].*\[H,T,D\]"):
        imported(saved(tmp_path, Qcur__0=values(H, H, D)), known=Known(H, config))


@given(st.permutations(range(4)), st.integers(2, 9), st.integers(2, 6), st.sampled_from([2, 4, 8]))
def test_never_two_answers(order: list[int], n: int, heads: int, dim: int) -> None:
    """Whatever the axes, a fit has the tap's values in the right order, or it is refused."""
    assume(len({n, heads, dim, 1}) == 4)
    x = torch.arange(n * heads * dim).reshape(1, n, heads, dim)
    moved = x.permute(*order)
    try:
        found, positions = align({"Qcur-0": tuple(moved.shape), "l_out-0": (n, 7919)}, Known(n), "x")
    except ImportFormatError:
        return
    assert positions == n
    form = found["Qcur-0"].form
    by_axis = {"1": 0, "T": 1, "H": 2, "D": 3}
    if [by_axis[c] for c in form] == order:
        assert torch.equal(found["Qcur-0"].apply(moved), x.reshape(n, heads * dim))


def test_shapes_that_fit_in_no_way(tmp_path: Path, config: ModelConfig) -> None:
    with pytest.raises(ImportFormatError, match=r"l_out-0 has the shape \[2, 5, 64\], expected 5 positions or the last, 64 channels"):
        imported(saved(tmp_path, l_out__0=values(2, T, E)), known=Known(T, config))
    with pytest.raises(ImportFormatError, match="expected 5 positions"):
        imported(saved(tmp_path, l_out__0=values(7, E)), known=Known(T, config))
    for shapes in ([(5, 64), (7, 64), (9, 11)], [(5, 64), (5, 32)]):
        arrays = {f"l_out__{i}": values(*s) for i, s in enumerate(shapes)}
        with pytest.raises(ImportFormatError, match="no number of positions, or taps of one kind no width, in common"):
            imported(saved(tmp_path, **arrays), known=Known(T) if len(shapes) == 2 else Known())


def test_widths_are_held_against_the_model(tmp_path: Path, config: ModelConfig) -> None:
    trace = imported(saved(tmp_path, l_out__0=values(T, 32), ffn_up__0=values(T, F)))
    with pytest.raises(ImportFormatError, match="l_out-0: 32 channels, but the model of `--model` has 64"):
        check_widths(trace, config)
    deep = imported(saved(tmp_path, l_out__7=values(T, E), ffn_up__0=values(T, F)))
    with pytest.raises(ImportFormatError, match="l_out-7: the model of `--model` has 2 layers"):
        check_widths(deep, config)


# ---- Names --------------------------------------------------------------------------------------------------------------


def test_map(tmp_path: Path) -> None:
    path = saved(
        tmp_path, **{"layers.0.out": values(T, E), "layers.11.out": values(T, E), "h0": values(T, E), "w": values(3), "up.0": values(T, F)}
    )
    trace = imported(path, "layers.{i}.out=l_out-{i}", "h0=embd", "up.{i}=ffn_up-{i}")
    assert list(trace.taps) == ["embd", "ffn_up-0", "l_out-0", "l_out-11"]
    assert "Arrays that are no taps, left out: w." in trace.origin.notes


def test_a_map_that_matches_nothing_names_both_sets() -> None:
    names = [f"model.layers.{i}.mlp" for i in range(30)] + ["lm_head"]
    with pytest.raises(ImportFormatError) as e:
        taps_of(names, [parse_rule("layers.{i}.out=l_out-{i}")], "x.npz")
    text = str(e.value)
    assert "layers.{i}.out=l_out-{i} matches no array" in text
    assert "model.layers.0.mlp, lm_head ... (31 in all)" in text
    assert "l_out-{i}" in text.split("the taps are")[1]
    with pytest.raises(ImportFormatError, match="no array is a tap"):
        taps_of(names, [], "x.npz")


def test_a_map_that_matches_nothing_beside_one_that_does() -> None:
    with pytest.raises(ImportFormatError, match=r"--map up\.\{i\}=ffn_up-\{i\} matches no array"):
        taps_of(["out.0"], [parse_rule("out.{i}=l_out-{i}"), parse_rule("up.{i}=ffn_up-{i}")], "x")


def test_two_names_for_one_tap() -> None:
    with pytest.raises(ImportFormatError, match=r"'a\.0' and 'b\.0' both are l_out-0"):
        taps_of(["a.0", "b.0"], [parse_rule("a.{i}=l_out-{i}"), parse_rule("b.{i}=l_out-{i}")], "x")


@pytest.mark.parametrize(
    ("rule", "why"),
    [("abc", "expected NAME=TAP"), ("=l_out-0", "expected NAME=TAP"), ("a=l_out-{i}", "the name has none"), ("a.{i}=out-{i}", "is no tap")],
)
def test_bad_rules(rule: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        parse_rule(rule)


def test_names_may_hold_regular_expressions_and_the_layer_twice() -> None:
    rule = parse_rule("blk[{i}]+out.{i}=l_out-{i}")
    assert rule("blk[3]+out.3") == "l_out-3"
    assert rule("blk[3]+out.4") is None
    assert rule("blk[07]+out.07") == "l_out-7"


# ---- Files --------------------------------------------------------------------------------------------------------------


def test_safetensors_and_npy_give_the_same(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    x, up = torch.from_numpy(values(T, E)), torch.from_numpy(values(T, F))
    save_file({"l_out-0": x.to(torch.bfloat16), "ffn_up-0": up}, tmp_path / "a.safetensors")
    (tmp_path / "dump").mkdir()
    np.save(tmp_path / "dump" / "l_out-0.npy", x.numpy().astype(np.float16))
    np.save(tmp_path / "dump" / "ffn_up-0.npy", up.numpy())
    for path, kind, dtype in ((tmp_path / "a.safetensors", "safetensors", torch.bfloat16), (tmp_path / "dump", "npy", torch.float16)):
        found = read(path)
        assert found.kind == kind
        assert torch.equal(full(found.runs[0].trace, "l_out-0").values, x.to(dtype).float())


def test_broken_numbers_are_counted_and_kept(tmp_path: Path) -> None:
    x = values(T, E)
    x[1, 2], x[3, 0] = np.nan, np.inf
    trace = imported(saved(tmp_path, l_out__0=x, ffn_up__0=values(T, F)))
    assert f"l_out-0: 2 of 320 values are NaN or infinite, the first at flat index {E + 2} (nan)." in trace.origin.notes
    assert int((~full(trace, "l_out-0").values.isfinite()).sum()) == 2


def test_order_of_q_and_k_is_noted(tmp_path: Path, config: ModelConfig) -> None:
    trace = imported(saved(tmp_path, Qcur__0=values(T, E)), known=Known(T, config))
    assert any("two halves" in note for note in trace.origin.notes)


@pytest.mark.parametrize("n", [0, 10, 200])
def test_damaged_files(tmp_path: Path, n: int) -> None:
    path = saved(tmp_path, l_out__0=values(T, E))
    path.write_bytes(path.read_bytes()[:n])
    with pytest.raises(ImportFormatError, match=r"cannot be read as that|none of the formats"):
        read(path) if n else read_arrays(path, [], Known(), "npz")


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "o.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(ImportFormatError, match="object arrays are not read"):
        read(tmp_path / "o.npz")
    np.savez(tmp_path / "c.npz", **{"l_out-0": np.zeros((T, E), np.complex64), "ffn_up-0": values(T, F)})
    with pytest.raises(ImportFormatError, match="array of complex64"):
        read(tmp_path / "c.npz")
