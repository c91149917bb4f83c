"""Files written here against those of llama.cpp's own quantizer, and in llama.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import torch

from quantscope.cli.demo import MODEL, bundled
from quantscope.engines.llama_session import LlamaSession
from quantscope.model.forward import forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.qtypes import QTYPES
from quantscope.recipes import Options, Override
from quantscope.remedy.export import export
from quantscope.remedy.original import original
from quantscope.remedy.recipe_file import Recipe
from quantscope.remedy.types import choose_types
from quantscope.sources.gguf import open_gguf
from quantscope.sources.resolve import open_source
from quantscope.weight_compare import compare_weights
from quantscope.weights import Weights
from tests.models import make_gguf
from tests.oracle.llama_quant import DEFAULTS, _params, quantized_types
from tests.oracle.test_arithmetic import SAME_ORDER, nmse, traces
from tests.oracle.test_recipes import FILES, write_model

PRESETS = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
    "Q4_0", "Q4_1", "Q5_0", "Q5_1",
)  # fmt: skip
FIRST_PAIR = 24  # [bytes] behind the magic, the version and the counts
MODELS = {
    "float32, no block of 256": {"n_layer": 3, "n_embd": 96, "n_ff": 160},
    "bfloat16, tied": {"n_layer": 5, "n_embd": 256, "n_ff": 512, "tied": True, "dtype": "BF16"},
    "biases": {"arch": "qwen2", "n_embd": 128, "n_ff": 256, "dtype": "F16"},
    "8-bit blocks": {"n_embd": 256, "n_ff": 256, "dtype": "Q8_0"},
}


def quantized(source: Path, out: Path, preset: str, options: Options = DEFAULTS) -> Path:
    opened = open_source(source)
    model = original(opened)
    choice = choose_types(model, Recipe(preset), options.overrides, pure=options.pure)
    export(model, out, choice.types, choice.file_type, metadata={"quantscope.recipe": preset})
    opened.close()
    return out


def assert_same_file(source: Path, folder: Path, preset: str, options: Options = DEFAULTS) -> None:
    """Byte for byte, but for the counts in front and the provenance, which is written as the last metadata."""
    assert quantized_types(source, folder / "theirs.gguf", preset, options) is not None
    theirs = (folder / "theirs.gguf").read_bytes()
    ours = quantized(source, folder / "ours.gguf", preset, options).read_bytes()
    pairs_end = ours.index(b"quantscope.version") - 8
    assert ours[FIRST_PAIR:pairs_end] == theirs[FIRST_PAIR:pairs_end]
    data = open_gguf(folder / "theirs.gguf").data_offset
    descriptions = theirs[pairs_end:data].rstrip(b"\0")
    assert len(descriptions) > 1000
    assert ours.count(descriptions) == 1
    n = len(theirs) - data
    assert n > 10_000
    assert ours[-n:] == theirs[-n:], preset


@pytest.mark.parametrize("preset", PRESETS)
def test_the_demo_model_is_the_same_file(preset: str, tmp_path: Path) -> None:
    assert_same_file(bundled(MODEL), tmp_path, preset)


@pytest.mark.parametrize("preset", ["F16", "Q8_0", "Q4_K_M", "Q3_K_L", "Q2_K", "Q5_1"])
@pytest.mark.parametrize("case", MODELS)
def test_other_models_are_the_same_file(case: str, preset: str, tmp_path: Path) -> None:
    assert_same_file(make_gguf(tmp_path / "m.gguf", seed=3, **MODELS[case]), tmp_path, preset)


def test_stacks_of_experts_are_the_same_file(tmp_path: Path) -> None:
    assert_same_file(write_model(tmp_path / "m.gguf", **FILES["mixtral"]), tmp_path, "Q3_K_M")


def test_options_give_the_same_file(tmp_path: Path) -> None:
    overrides = (Override(r"blk\.(0|9)\.attn_v", QTYPES["Q8_0"]), Override("output.weight", QTYPES["Q5_0"]))
    for options in (Options(overrides=overrides), Options(pure=True), Options(pure=True, overrides=overrides)):
        assert_same_file(bundled(MODEL), tmp_path, "Q4_0", options)


@pytest.mark.parametrize(
    ("name", "preset"), [("demo", "Q4_K_M"), ("demo", "Q4_0"), *(("mixtral", p) for p in ("Q3_K_M", "Q2_K", "Q5_K_S", "Q6_K", "Q5_1"))]
)
def test_an_importance_matrix_gives_the_same_bytes(name: str, preset: str, tmp_path: Path) -> None:
    """Weights that differ from column to column and from expert to expert, and none for the embedding, as llama-imatrix has it."""
    source = bundled(MODEL) if name == "demo" else write_model(tmp_path / "m.gguf", **FILES["mixtral"])
    rng, tensors = np.random.default_rng(1), open_gguf(source).tensors.values()
    weights = {
        t.name: (rng.standard_normal((*t.shape[:-2], t.n_per_row)) ** 2).astype(np.float32)
        for t in tensors
        if len(t.shape) > 1 and t.name != "token_embd.weight"
    }
    llama_quantize(source, tmp_path / "theirs.gguf", preset, weights)
    model = original(open_source(source))
    choice = choose_types(model, Recipe(preset), imatrix=True)
    export(model, tmp_path / "ours.gguf", choice.types, choice.file_type, importance=weights.get)
    theirs, ours = open_gguf(tmp_path / "theirs.gguf"), open_gguf(tmp_path / "ours.gguf")
    assert ours.tensors == theirs.tensors
    assert [n for n in theirs.tensors if theirs.raw(n).tobytes() != ours.raw(n).tobytes()] == []


def llama_quantize(source: Path, out: Path, preset: str, weights: Mapping[str, np.ndarray]) -> None:
    params, memory = _params(preset, DEFAULTS)
    floats = ctypes.POINTER(ctypes.c_float)
    rows = [(name.encode(), w.ctypes.data_as(floats), w.size) for name, w in weights.items()]
    params.imatrix = table = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))(*rows)
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
    del memory, table


def test_every_value_of_the_header_in_the_gguf_package(tmp_path: Path) -> None:
    ours = gguf.GGUFReader(quantized(bundled(MODEL), tmp_path / "m.gguf", "Q6_K"))
    before = gguf.GGUFReader(bundled(MODEL))
    kept = [key for key in before.fields if not key.startswith(("GGUF.", "general.file_type"))]
    assert len(kept) > 20
    for key in kept:
        assert ours.fields[key].contents() == before.fields[key].contents(), key
        assert ours.fields[key].types == before.fields[key].types, key
    assert ours.fields["general.file_type"].contents() == 18
    assert ours.fields["general.quantization_version"].contents() == 2
    assert [t.name for t in ours.tensors if not t.n_bytes] == []


@pytest.mark.parametrize("preset", ["Q8_0", "Q6_K", "Q4_K_M", "Q4_0"])
def test_llama_cpp_gives_the_predicted_logits(preset: str, tmp_path: Path) -> None:
    """To NMSE 1e-6 where the emulated order of sums is llama.cpp's; elsewhere as far as flipped roundings allow (decision 0008)."""
    path = quantized(bundled(MODEL), tmp_path / "m.gguf", preset)
    theirs, predicted, exact = traces(path, np.random.default_rng(7).integers(0, 4096, 40).tolist(), "F16")
    missed = nmse(theirs["result_output"], exact["result_output"])
    bound = 1e-6 if SAME_ORDER else missed
    assert nmse(theirs["result_output"], predicted["result_output"]) <= bound
    assert nmse(theirs["Qcur_pre-0"], predicted["Qcur_pre-0"]) <= 1e-9 < nmse(theirs["Qcur_pre-0"], exact["Qcur_pre-0"])


@pytest.mark.parametrize("preset", ["F16", "Q8_0", "Q5_K_M", "Q4_0", "Q3_K_M", "Q2_K"])
def test_the_types_explain_every_difference(preset: str, tmp_path: Path) -> None:
    source = make_gguf(tmp_path / "m.gguf", n_layer=1, n_embd=256, n_ff=256, seed=4)
    c = compare_weights(Weights(open_source(source)), Weights(open_source(quantized(source, tmp_path / "q.gguf", preset))))
    assert not c.unexplained


def test_corrections_arrive_in_llama_cpp(tmp_path: Path) -> None:
    """New biases, other norms and replaced bytes change llama.cpp's logits as they change the reference's."""
    source = make_gguf(tmp_path / "m.gguf", n_embd=64, n_ff=128, seed=5)
    model, rng = original(open_source(source)), np.random.default_rng(0)
    types = choose_types(model, Recipe("Q8_0")).types
    zeros = np.zeros(model.tensors["blk.1.ffn_down.weight"].n_elements // 32 * 34, np.uint8)
    more = {
        "extra": {"blk.0.attn_q.bias": rng.standard_normal(64).astype(np.float32), "blk.1.attn_v.bias": np.ones(32, np.float32)},
        "floats": {"blk.0.attn_norm.weight": np.full(64, 0.5, np.float32)},
        "replacements": {"blk.1.ffn_down.weight": zeros},
    }
    paths = [export(model, tmp_path / f"{n}.gguf", types, 7, **c).path for n, c in (("plain", {}), ("corrected", more))]
    ids, logits = [1, 40, 50, 60, 270], []
    for path in paths:
        with LlamaSession(path, kv="F32") as llama:
            logits.append(llama.decode(ids))
        predicted = forward(torch.tensor([ids]), Weights(open_source(path)), arithmetic=ggml_arithmetic("F32"))[0].numpy()
        assert nmse(logits[-1][-1], predicted[-1]) < 1e-6
    assert nmse(logits[0][-1], logits[1][-1]) > 0.01
