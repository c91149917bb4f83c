"""A variant quantized in memory is, number for number, the file that llama.cpp's own quantizer writes."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import llama_cpp
import pytest

from quantscope.results import StudyOptions, Variant
from quantscope.sources.resolve import open_source
from quantscope.study import run_study
from tests.models import make_gguf

# llama_ftype of llama.h
FTYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q5_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_1,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "Q3_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
}


@llama_cpp.llama_log_callback
def silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp reports every tensor it quantizes."""


def llama_quantize(source: Path, out: Path, preset: str) -> Path:
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FTYPES[preset]
    params.nthread = 2
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return out


def numbers(v: Variant) -> Variant:
    """What must agree: everything but the name, the path and the size of the header."""
    rows = tuple(replace(row, flags=()) for row in v.layers)  # flags compare with the other variants of the study
    return replace(v, name="", path=None, file_bytes=None, layers=rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_embd", [256, 96])  # 96: no K-quant fits, the fallbacks apply
def test_in_memory_variants_equal_llama_quantize(tmp_path: Path, tied: bool, n_embd: int) -> None:
    original = make_gguf(tmp_path / "f16.gguf", n_layer=8, n_embd=n_embd, n_head=4, n_ff=2 * n_embd, tied=tied, dtype="F16", seed=7)
    files = [llama_quantize(original, tmp_path / f"{p}.gguf", p) for p in FTYPES]
    prompt = {"tokens": (1, 40, 50, 60, 270)}
    in_memory = run_study(StudyOptions(models=(str(original),), types=tuple(FTYPES), **prompt))
    as_files = run_study(StudyOptions(models=tuple(map(str, files)), ref=str(original), **prompt))
    assert [v.name for v in in_memory.quantized] == [v.name for v in as_files.quantized] == list(FTYPES)
    for a, b, path in zip(in_memory.quantized, as_files.quantized, files, strict=True):
        assert numbers(a) == numbers(b), a.name
        assert a.bpw == b.bpw
        # the header gains general.quantization_version and the file type; tensors have the same bytes
        assert abs(a.file_bytes - path.stat().st_size) <= 128, (a.name, open_source(path).file_bytes)
