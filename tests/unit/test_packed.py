"""Quantized Hugging Face checkpoints: the bits of each packing, and what is wrong with one that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantscope.errors import CorruptFileError, MissingTensorError, QuantscopeError, TruncatedFileError, UnsupportedTypeError
from quantscope.results import StudyOptions
from quantscope.sources.base import Source
from quantscope.sources.packed.parts import unpacked
from quantscope.sources.resolve import open_source
from quantscope.study import run_study
from tests.hf_models import make_hf

Tensors = Mapping[str, np.ndarray]


def written(folder: Path, tensors: Tensors, settings: Mapping[str, Any] | None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    given = config if settings is None else config | {"quantization_config": dict(settings)}
    (folder / "config.json").write_text(json.dumps(given))
    return folder


def values(source: Source, name: str) -> np.ndarray:
    return source.raw(name).view(np.float32).reshape(source.tensors[name].shape)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along axis 0 as one long row of bits, the lowest first, cut into words."""
    columns = []
    for column in codes.T:
        number = sum(int(code) << bits * j for j, code in enumerate(column))
        columns.append(np.frombuffer(number.to_bytes(len(column) * bits // 8, "little"), "<i4"))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_follow_one_another_through_the_words(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (96, 5))
    np.testing.assert_array_equal(unpacked(packed(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", [None, "gptq", "gptq_v2"])
def test_gptq(bits: int, form: str | None, tmp_path: Path) -> None:
    rng, n_in, n_out, groups = np.random.default_rng(bits), 64, 32, 2
    codes, zeros = rng.integers(0, 2**bits, (n_in, n_out)), rng.integers(1, 2**bits, (groups, n_out))
    scales, group = rng.random((groups, n_out)).astype(np.float16), rng.permutation(np.arange(n_in) // 32).astype(np.int32)
    stored = zeros if form == "gptq_v2" else zeros - 1
    parts = {"m.qweight": packed(codes, bits), "m.qzeros": packed(stored.T, bits).T.copy(), "m.scales": scales, "m.g_idx": group}
    settings = {"quant_method": "gptq", "bits": bits} | ({} if form is None else {"checkpoint_format": form})
    expected = (scales[group].astype(np.float32) * (codes - zeros[group])).T
    source = open_source(written(tmp_path / "a", parts | {"norm.weight": np.ones(3, np.float32)}, settings))
    assert (source.packing, set(source.tensors)) == ("GPTQ", {"m.weight", "norm.weight"})
    np.testing.assert_array_equal(values(source, "m.weight"), expected.astype(np.float32))
    np.testing.assert_array_equal(values(source, "norm.weight"), np.ones(3))
    del parts["m.g_idx"]
    in_order = open_source(written(tmp_path / "b", parts, settings))
    even = np.arange(n_in) // 32
    np.testing.assert_array_equal(values(in_order, "m.weight"), (scales[even].astype(np.float32) * (codes - zeros[even])).T)


def gptq_parts(bits: int = 4) -> dict[str, np.ndarray]:
    words = 32 * bits // 32
    return {
        "m.qweight": np.zeros((64 * bits // 32, 32), np.int32),
        "m.qzeros": np.zeros((2, words), np.int32),
        "m.scales": np.ones((2, 32), np.float16),
        "m.g_idx": np.zeros(64, np.int32),
    }


def test_the_file_that_older_gptq_checkpoints_have(tmp_path: Path) -> None:
    folder = written(tmp_path, gptq_parts(), None)
    assert open_source(folder).packing is None
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    assert open_source(folder).packing == "GPTQ"


def test_matrices_of_other_bits_than_the_rest(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "dynamic": {"m": {"bits": 8}}}
    source = open_source(written(tmp_path, gptq_parts(8), settings))
    assert source.tensors["m.weight"].shape == (32, 64)


@pytest.mark.parametrize(
    ("settings", "change", "error", "message"),
    [
        ({"quant_method": "hqq"}, {}, UnsupportedTypeError, r"quant_method is 'hqq', expected one of gptq, awq, bitsandbytes, fp8"),
        ({"quant_method": "gptq", "bits": 5}, {}, UnsupportedTypeError, r"quantization_config\.bits is 5, expected 2 or 3 or 4 or 8"),
        (
            {"bits": 4, "checkpoint_format": "marlin"},
            {},
            UnsupportedTypeError,
            r"checkpoint_format is 'marlin', expected 'gptq' or 'gptq_v2'",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, {}, UnsupportedTypeError, r"version is 'gemv', expected 'gemm'"),
        ({"bits": 4}, {"m.scales": None}, MissingTensorError, r"no tensor 'm\.scales', which belongs to a packed matrix"),
        ({"bits": 8}, {}, CorruptFileError, r"'m\.qzeros' has the shape \[2, 4\], expected \[2, 8\]"),
        ({"bits": 4}, {"m.g_idx": np.zeros(3, np.int32)}, CorruptFileError, r"'m\.g_idx' has the shape \[3\], expected \[64\]"),
    ],
)
def test_checkpoints_that_cannot_be_read(
    settings: dict[str, Any], change: dict[str, np.ndarray | None], error: type[QuantscopeError], message: str, tmp_path: Path
) -> None:
    parts = {name: array for name, array in (gptq_parts() | change).items() if array is not None}
    folder = written(tmp_path, parts, settings)
    with pytest.raises(error, match=message):
        open_source(folder)
    assert set(open_source(folder, as_stored=True).tensors) == set(parts)  # what `inspect` shows


@pytest.mark.parametrize("state", [b"{}", b"no JSON", b'{"blocksize": 0, "shape": [2, 2]}'])
def test_damaged_state_of_bitsandbytes(state: bytes, tmp_path: Path) -> None:
    parts = {"m.weight": np.zeros((2, 1), np.uint8), "m.weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8)}
    with pytest.raises(CorruptFileError, match="holds no description of packed weights"):
        open_source(written(tmp_path, parts, {"quant_method": "bitsandbytes"}))


def test_scales_that_do_not_cover_the_weight(tmp_path: Path) -> None:
    parts = {"m.weight": np.zeros((8, 8), np.int8), "m.weight_scale": np.ones((3, 3), np.float32)}
    with pytest.raises(CorruptFileError, match=r"'m\.weight_scale' has the shape \[3, 3\], expected one scale, one a row, or one a block"):
        values(open_source(written(tmp_path, parts, {"quant_method": "compressed-tensors"})), "m.weight")


def test_a_shard_that_was_half_downloaded(tmp_path: Path) -> None:
    folder = written(tmp_path, gptq_parts(), {"quant_method": "gptq", "bits": 4})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(TruncatedFileError):
        open_source(folder)
    assert open_source(folder, allow_truncated=True).truncated == ("m.weight",)


def test_a_study_says_that_its_original_is_quantized(tmp_path: Path) -> None:
    make_hf(tmp_path)
    from safetensors.numpy import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    scale = np.abs(tensors[name]).max(1, keepdims=True) / np.float32(127)
    tensors |= {name: np.round(tensors[name] / scale).astype(np.int8), f"{name}_scale": scale}
    config = json.loads((tmp_path / "config.json").read_text())
    plain = run_study(StudyOptions((str(written(tmp_path, tensors, {"quant_method": "compressed-tensors"}, **config)),), tokens=(1, 2, 3)))
    assert any("is a checkpoint quantized with compressed-tensors" in note for note in plain.notes)
    only = plain.variants[0]
    assert only.file_bytes is not None
    assert only.bpw is not None
    assert only.bpw < 32
    quantized = run_study(StudyOptions((str(tmp_path),), types=("Q8_0",), tokens=(1, 2, 3)))
    assert 0 < (quantized.variant("Q8_0").file_bytes or 0) < only.file_bytes
    assert any("already quantized" in note for note in quantized.notes)


PARTS = {
    "gptq": ("m.qweight", "m.qzeros", "m.scales", "m.g_idx"),
    "awq": ("m.qweight", "m.qzeros", "m.scales"),
    "bitsandbytes": (
        "m.weight",
        "m.weight.absmax",
        "m.weight.quant_map",
        "m.weight.nested_absmax",
        "m.weight.nested_quant_map",
        "m.weight.quant_state.bitsandbytes__nf4",
        "m.SCB",
    ),
    "fp8": ("m.weight", "m.weight_scale_inv"),
    "compressed-tensors": ("m.weight_packed", "m.weight_scale", "m.weight_shape", "m.weight_zero_point", "m.weight_g_idx"),
    "mxfp4": ("m_blocks", "m_scales"),
}
STATES = (
    b'{"blocksize": 4, "shape": [4, 4]}',
    b'{"blocksize": 3, "shape": [2], "nested_blocksize": 2, "nested_offset": 0.5}',
    b'{"blocksize": "x"}',
)


@pytest.mark.parametrize("method", PARTS)
def test_any_parts_are_read_or_refused(method: str, tmp_path: Path) -> None:
    """Random types and sizes: values of the promised shape, or one of our errors."""
    rng, said = np.random.default_rng(0), []
    for i in range(100):
        parts = {}
        for name in PARTS[method]:
            kind, shape = rng.choice(["int8", "uint8", "int32", "float16", "float32"]), rng.choice([1, 2, 4, 8, 32], rng.integers(1, 5))
            parts[name] = rng.integers(0, 9, shape).astype(kind)
            if "quant_state" in name:
                parts[name] = np.frombuffer(STATES[i % 3], np.uint8)
        settings = {"quant_method": method, "bits": 4, "weight_block_size": [[2, 2], None, 3][i % 3], "config_groups": {"a": {}}}
        try:
            source = open_source(written(tmp_path / str(i), parts, settings))
            assert all(source.raw(name).nbytes == tensor.n_bytes for name, tensor in source.tensors.items())
        except QuantscopeError as error:
            said.append(str(error))
    assert said
    assert all("expected" in text or "no tensor" in text for text in said)
