"""The two engines that plant faults are right without them, and with one they are wrong where the fault says, in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from benchmarks import numpy_engine, transformers_faults
from benchmarks.numpy_blocks import RIGHT, WRONG, decode_rows
from benchmarks.numpy_faults import FAULTS
from benchmarks.planted import Planted
from quantscope import engines
from quantscope.diagnose.replay import replay
from quantscope.engines import Request
from quantscope.metrics import nmse
from quantscope.model.taps import graph_order
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Trace
from quantscope.weights import Weights
from tests.hf_models import make_hf
from tests.models import STORIES, make_gguf
from tests.oracle.quantized_files import demo_file

pytestmark = pytest.mark.long

CLEAN = 1e-9  # NMSE at every tap
CHANGED = 1e-6
SAME = 1e-8  # between two engines with one fault, which may amplify; the two GELUs are 4e-8 apart
IDS = (1, 200, 71, 10, 186, 35, 122, 14, 3, 240)
N_PROMPT = 4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
UP_OF_30000 = {"blk.1.ffn_up.weight": np.random.default_rng(1).standard_normal((96, 64)).astype(np.float32) * 3e4}

Maker = Callable[[Path], Path]
# Transformers takes a qwen3 GGUF with heads of 128 only, and no rope_freqs.weight (see below)
QUICK: dict[str, Maker] = {
    "llama Q8_0": lambda to: make_gguf(to / "m.gguf", tied=True, dtype="Q8_0", seed=2),
    "qwen2 Q5_1": lambda to: make_gguf(to / "m.gguf", arch="qwen2", dtype="Q5_1", seed=4),
    "qwen3 Q4_0": lambda to: make_gguf(to / "m.gguf", arch="qwen3", head_dim=128, dtype="Q4_0", seed=5),
}
SLOW: dict[str, Maker] = {
    "stories": lambda to: STORIES,
    "llama F16": lambda to: make_gguf(to / "m.gguf", dtype="F16", seed=1),
    "llama Q4_1": lambda to: make_gguf(to / "m.gguf", n_head_kv=4, dtype="Q4_1", seed=6),
    "llama Q5_0": lambda to: make_gguf(to / "m.gguf", n_head_kv=1, dtype="Q5_0", seed=7),
    "demo Q4_K_M": lambda to: demo_file("Q4_K_M"),
}
NUMPY_ONLY: dict[str, Maker] = {
    "rope_freqs": lambda to: make_gguf(to / "m.gguf", rope_freqs=range(1, 9), seed=3),
    "demo Q5_K_M": lambda to: demo_file("Q5_K_M"),
}
FOLDERS: dict[str, Maker] = {
    "hf llama": lambda to: _folder(to, "llama", rope_parameters=LLAMA3),
    "hf qwen2": lambda to: _folder(to, "qwen2"),
    "hf qwen3": lambda to: _folder(to, "qwen3"),
}


def _folder(to: Path, arch: str, **config: object) -> Path:
    make_hf(to, arch, seed=3, **config)
    return to


def cases(quick: dict[str, Maker], slow: dict[str, Maker]) -> list[object]:
    """All of them, those that are not quick marked."""
    return [pytest.param(make, id=name, marks=[] if name in quick else [pytest.mark.slow]) for name, make in (quick | slow).items()]


def reference(model: Path) -> Trace:
    return engines.run(Request("reference", str(model), IDS))


def errors(ref: Trace, test: Trace) -> dict[str, float]:
    """NMSE of each tap that both have, in the order of the graph; infinite where it is not finite or has another shape."""
    return {tap: error(ref, test, tap) for tap in sorted(set(ref.taps) & set(test.taps), key=graph_order)}


def error(ref: Trace, test: Trace, tap: str) -> float:
    a, b = ref.find(tap, Full), test.find(tap, Full)
    assert a is not None
    assert b is not None
    if a.values.shape != b.values.shape or not b.values.isfinite().all():
        return math.inf
    return float(nmse(a.values.flatten(), b.values.flatten()))


def assert_clean(ref: Trace, test: Trace) -> None:
    found = errors(ref, test)
    assert set(found) == set(ref.taps) == set(test.taps)
    assert max(found.values()) < CLEAN, max(found.items(), key=lambda item: item[1])
    assert ref.origin.model_sha256 == test.origin.model_sha256
    assert ref.origin.tokens == test.origin.tokens


def assert_planted(fault: Planted, ref: Trace, test: Trace, model: Path) -> None:
    """The first tap that changes is one that the fault names, and local replay convicts those that it names and no others."""
    changed = [tap for tap, e in errors(ref, test).items() if e > CHANGED]
    assert changed, fault
    assert changed[0].partition("-")[0] in fault.taps, (fault, changed[:3])
    if fault.cause == "bos-missing" or fault.detail == "not-run":  # right for its own ids; no taps to recompute it from
        return
    found = {row.tap for row in replay(test, Weights(open_source(str(model))), predicted=None).those("convicted")}
    assert fault.layers is None or all(int(tap.partition("-")[2]) in fault.layers for tap in found), (fault, found)
    if fault.cause == "block-scale-bf16" or not finite(test):  # what comes after weights of 1e-16, or after an overflow, is lost
        assert changed[0] in found, fault
    else:
        assert {tap.partition("-")[0] for tap in found} == set(fault.taps), (fault, found)


def finite(trace: Trace) -> bool:
    fulls = [full for tap in trace.taps for full in trace.all_of(tap, Full)]
    assert fulls
    return all(bool(full.values.isfinite().all()) for full in fulls)


@pytest.mark.parametrize("make", cases(QUICK, SLOW | NUMPY_ONLY))
@pytest.mark.parametrize("n_prompt", [None, N_PROMPT], ids=["batch", "decode"])
def test_the_numpy_engine(make: Maker, n_prompt: int | None, tmp_path: Path) -> None:
    model = make(tmp_path)
    ref = reference(model)
    assert_clean(ref, numpy_engine.run(model, IDS, n_prompt=n_prompt))
    faults = numpy_engine.plantable(model)
    assert len(faults) > 60
    for fault in faults:
        if n_prompt or not fault.cause.startswith("cache-"):
            assert_planted(fault, ref, numpy_engine.run(model, IDS, [fault], n_prompt=n_prompt), model)


@pytest.mark.parametrize("make", cases({name: (QUICK | FOLDERS)[name] for name in ("hf llama", "qwen3 Q4_0")}, QUICK | SLOW | FOLDERS))
def test_transformers(make: Maker, tmp_path: Path) -> None:
    """Alone, and beside the numpy engine with the same fault: two ways of planting it, one result."""
    model = make(tmp_path)
    ref = reference(model)
    assert_clean(ref, transformers_faults.run(model, IDS))
    faults = transformers_faults.plantable(model)
    assert len({fault.cause for fault in faults}) >= 40
    for fault in faults:
        test = transformers_faults.run(model, IDS, [fault])
        assert_planted(fault, ref, test, model)
        if model.is_file():
            other = errors(numpy_engine.run(model, IDS, [fault]), test)
            assert set(other) == set(test.taps)
            alike = [e for tap, e in other.items() if finite(test) or tap.endswith("-0")]  # the two overflow in different places
            assert max(alike) < SAME, (fault, max(other.items(), key=lambda item: item[1]))
    assert_clean(ref, transformers_faults.run(model, IDS))  # all is as it was before


def test_every_fault_of_the_table_is_planted_somewhere(tmp_path: Path) -> None:
    files = [make_gguf(tmp_path / f"{name}.gguf", dtype=name, arch="qwen3") for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]
    files += [make_gguf(tmp_path / "factors.gguf", rope_freqs=range(1, 9)), make_gguf(tmp_path / "biases.gguf", arch="qwen2")]
    files += [make_gguf(tmp_path / "large.gguf", edit=UP_OF_30000), demo_file("Q4_K_M")]
    planted = {fault.cause for file in files for fault in numpy_engine.plantable(file)}
    assert planted == set(FAULTS)
    assert set(transformers_faults.FAULTS) == set(FAULTS) - {"cache-stale", "cache-off-by-one"}


def test_overflow_where_it_is_reached(tmp_path: Path) -> None:
    large = make_gguf(tmp_path / "large.gguf", edit=UP_OF_30000)
    for engine in (numpy_engine, transformers_faults):
        (fault,) = [fault for fault in engine.plantable(large) if fault.cause == "f16-overflow"]
        test = engine.run(large, IDS, [fault])
        assert_planted(fault, reference(large), test, large)
        assert not any(f.cause == "f16-overflow" for f in engine.plantable(STORIES))


def test_what_a_model_cannot_show_is_not_planted(tmp_path: Path) -> None:
    """Heads that share nothing, or all of it, are tiled as they are repeated."""
    for n_head_kv in (4, 1):
        model = make_gguf(tmp_path / f"{n_head_kv}.gguf", n_head_kv=n_head_kv)
        assert "gqa-tile" not in {fault.cause for fault in numpy_engine.plantable(model)}
        tiled = numpy_engine.run(model, IDS, [Planted("gqa-tile", ("kq_soft_max", "kqv_out"))])
        assert_clean(reference(model), tiled)


def test_two_faults_at_once_are_both_there(tmp_path: Path) -> None:
    model = QUICK["qwen2 Q5_1"](tmp_path)
    faults = [Planted("rope-reversed", ("Qcur", "Kcur")), Planted("act-relu", ("ffn_swiglu",), (1,))]
    for engine in (numpy_engine, transformers_faults):
        found = replay(engine.run(model, IDS, faults), Weights(open_source(str(model))), predicted=None).those("convicted")
        assert {row.tap for row in found} == {"Qcur-0", "Kcur-0", "Qcur-1", "Kcur-1", "ffn_swiglu-1"}


def test_transformers_itself_ignores_the_rope_factors_of_a_gguf_file(tmp_path: Path) -> None:
    """Not planted: its loader does not read rope_freqs.weight.  This engine is right for no such file."""
    model = NUMPY_ONLY["rope_freqs"](tmp_path)
    (fault,) = [fault for fault in numpy_engine.plantable(model) if fault.cause == "rope-factors-ignored"]
    found = errors(numpy_engine.run(model, IDS, [fault]), transformers_faults.run(model, IDS))
    assert max(found.values()) < CLEAN


def blocks(name: str) -> np.ndarray:
    """Random rows of three blocks whose float16 numbers are finite."""
    n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    raw = np.random.default_rng(0).integers(0, 256, (20, 3, n_bytes), dtype=np.uint8)
    for at in {"Q2_K": (81, 83), "Q3_K": (109,), "Q6_K": (209,)}.get(name, (1, 3)):
        raw[..., at] &= 0xBF  # ?eeeeeee: not all bits of the exponent
    return raw.reshape(20, -1)


@pytest.mark.parametrize("name", RIGHT)
def test_decoding_without_a_mistake_is_right(name: str) -> None:
    rows = blocks(name)
    np.testing.assert_array_equal(decode_rows(rows, name, RIGHT[name]), dequantize(rows, gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize(("cause", "name"), WRONG)
def test_a_mistake_changes_most_blocks(cause: str, name: str) -> None:
    """A wrong order keeps the values of each block; anything else does not."""
    rows = blocks(name)
    right, wrong = (decode_rows(rows, name, decoder).reshape(60, -1) for decoder in (RIGHT[name], WRONG[cause, name]))
    assert (right != wrong).any(axis=1).mean() > 0.9
    kept = np.array_equal(np.sort(right, axis=1), np.sort(wrong, axis=1))
    assert kept == ("order" in cause)
