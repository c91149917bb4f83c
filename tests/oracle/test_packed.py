"""Quantized Hugging Face checkpoints against the programs that write or read them: llama.cpp's converter (GPTQ, FP8, compressed-tensors),
AutoAWQ's own functions, bitsandbytes through Transformers, Transformers (MXFP4, FP8) and torch's 8-bit floats."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantscope.model.forward import forward
from quantscope.sources.packed.parts import small_floats
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.hf_arch_models import make_hf_arch
from tests.hf_models import make_hf
from tests.oracle.converter import convert, sentencepiece_model

AUTOAWQ = "0.2.9"
N_VOCAB = 320
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": N_VOCAB}
Pack = Callable[[str, Tensor, torch.Generator], dict[str, Tensor]]  # name without .weight, the matrix → what is stored instead


def packed_folder(folder: Path, settings: dict[str, Any], pack: Pack, **shape: int) -> Path:
    """A small model whose matrices inside the layers are stored as ``pack`` makes them."""
    make_hf(folder, **(SHAPE | shape))
    generator, stored = torch.Generator().manual_seed(5), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        inside = name.endswith("proj.weight")
        stored |= pack(name.removesuffix(".weight"), tensor, generator) if inside else {name: tensor}
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def to_int32(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy().astype(np.uint32).view(np.int32))


def in_words(codes: Tensor, bits: int) -> Tensor:
    """Codes of 2, 4 or 8 bits in 32-bit words along dim 0, the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits)[None, :, None]
    return to_int32((codes.long().reshape(-1, 32 // bits, codes.shape[1]) << shifts).sum(1))


def gptq(bits: int, group: int) -> Pack:
    """Random codes, zeros (one less is stored) and scales; inputs in groups at random, as desc_act makes them."""

    def pack(base: str, w: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        n_out, n_in = w.shape
        groups, top = n_in // group, 2**bits - 1
        return {
            f"{base}.qweight": in_words(torch.randint(0, top + 1, (n_in, n_out), generator=g), bits),
            f"{base}.qzeros": in_words(torch.randint(0, top, (groups, n_out), generator=g).T, bits).T,
            f"{base}.scales": (torch.rand(groups, n_out, generator=g) * 0.02).half(),
            f"{base}.g_idx": torch.arange(n_in, dtype=torch.int32)[torch.randperm(n_in, generator=g)] // group,
        }

    return pack


def fp8(block: tuple[int, int] | None, suffix: str) -> Pack:
    """A matrix divided by a scale a block (or a row) and rounded to E4M3."""

    def pack(base: str, w: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        n_out, n_in = w.shape
        a, b = block or (1, n_in)
        scale = torch.rand(-(-n_out // a), -(-n_in // b), generator=g) * 0.01 + 0.001
        spread = scale.repeat_interleave(a, 0).repeat_interleave(b, 1)[:n_out, :n_in]
        return {f"{base}.weight": (w / spread).clamp(-448, 448).to(torch.float8_e4m3fn), f"{base}.weight{suffix}": scale}

    return pack


def int4(zeros: bool) -> Pack:
    """compressed-tensors' pack-quantized: groups of 32 inputs, with zeros packed along the outputs or without."""

    def pack(base: str, w: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        n_out, n_in = w.shape
        more = {f"{base}.weight_zero_point": in_words(torch.randint(0, 16, (n_out, n_in // 32), generator=g), 4)} if zeros else {}
        return more | {
            f"{base}.weight_packed": in_words(torch.randint(0, 16, (n_in, n_out), generator=g), 4).T,
            f"{base}.weight_scale": (torch.rand(n_out, n_in // 32, generator=g) * 0.02).bfloat16(),
            f"{base}.weight_shape": torch.tensor([n_out, n_in]),
        }

    return pack


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


CASES: dict[str, tuple[dict[str, Any], Pack]] = {
    "GPTQ 4 bits": ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, gptq(4, 32)),
    "GPTQ 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 64, "checkpoint_format": "gptq"}, gptq(8, 64)),
    "GPTQ 2 bits, version 2": ({"quant_method": "gptq", "bits": 2, "group_size": 32, "checkpoint_format": "gptq_v2"}, gptq(2, 32)),
    "FP8 blocks": ({"quant_method": "fp8", "weight_block_size": [64, 48]}, fp8((64, 48), "_scale_inv")),
    "FP8 rows": (compressed("float-quantized", num_bits=8, type="float", strategy="channel"), fp8(None, "_scale")),
    "INT4": (compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32), int4(zeros=False)),
    "INT4 with zeros": (compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32), int4(zeros=True)),
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sentencepiece_model(tmp_path_factory.mktemp("vocabulary"), N_VOCAB)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_the_values_are_those_of_llama_cpps_converter(case: str, vocabulary: bytes, tmp_path: Path) -> None:
    folder, gguf = packed_folder(tmp_path / "hf", *CASES[case]), tmp_path / "m.gguf"
    (folder / "tokenizer.model").write_bytes(vocabulary)
    convert(folder, gguf)
    ours, converted = Weights(open_source(folder)), Weights(open_source(gguf))
    assert ours.source.packing is not None
    assert ours.unused == ()
    assert set(ours.names()) == set(converted.names())
    assert len(ours.names()) > 20
    assert [name for name in ours.names() if not torch.equal(ours.get(name), converted.get(name))] == []


@pytest.fixture(scope="module")
def autoawq(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """awq/utils/packing_utils.py of AutoAWQ's source archive: plain torch, no kernels."""
    folder = tmp_path_factory.mktemp("awq")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--no-build-isolation",
        "--dest",
        str(folder),
    ]
    done = subprocess.run([*pip, f"autoawq=={AUTOAWQ}"], capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    assert archives, done.stderr
    with tarfile.open(archives[0]) as tar:
        source = tar.extractfile(f"autoawq-{AUTOAWQ}/awq/utils/packing_utils.py")
        assert source is not None
        (folder / "packing_utils.py").write_bytes(source.read())
    spec = importlib.util.spec_from_file_location("packing_utils", folder / "packing_utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_values_are_those_of_autoawq(autoawq: ModuleType, tmp_path: Path) -> None:
    expected: dict[str, Tensor] = {}

    def pack(base: str, w: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        n_out, n_in = w.shape
        qweight, qzeros = (torch.randint(-(2**31), 2**31, (n, n_out // 8), generator=g).to(torch.int32) for n in (n_in, n_in // 32))
        scales = (torch.rand(n_in // 32, n_out, generator=g) * 0.02).half()
        expected[base] = autoawq.dequantize_gemm(qweight, qzeros, scales.float(), 4, 32).T
        return {f"{base}.qweight": qweight, f"{base}.qzeros": qzeros, f"{base}.scales": scales}

    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    source = open_source(packed_folder(tmp_path / "hf", settings, pack))
    assert len(expected) == 14
    for base, values in expected.items():
        assert torch.equal(torch.from_numpy(source.raw(f"{base}.weight").view(np.float32)).reshape(values.shape), values), base


@pytest.fixture(scope="module", params=[("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)], ids=str)
def bitsandbytes_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder, the model in Transformers) as `save_pretrained` writes what bitsandbytes quantized."""
    kind, nested = request.param
    folder = tmp_path_factory.mktemp("bnb")
    make_hf(folder / "plain", **SHAPE)
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.float32
        )
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config, dtype=torch.float32, device_map="cpu")
    model.save_pretrained(folder / "packed")
    return folder / "packed", model


def test_the_values_are_those_of_bitsandbytes(bitsandbytes_folder: tuple[Path, Any]) -> None:
    import bitsandbytes as bnb

    folder, model = bitsandbytes_folder
    source = open_source(folder)
    assert source.packing == "bitsandbytes"
    n = 0
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            values = layer.weight.CB.float() * (layer.weight.SCB / 127)[:, None] if layer.weight.CB is not None else None
            values = values if values is not None else layer.weight.data.float() * (layer.weight.SCB / 127)[:, None]
        else:
            continue
        ours = torch.from_numpy(source.raw(f"{name}.weight").view(np.float32)).reshape(values.shape)
        assert torch.equal(ours, values), name
        n += 1
    assert n == 14


def test_the_logits_are_those_of_bitsandbytes_in_transformers(bitsandbytes_folder: tuple[Path, Any]) -> None:
    folder, model = bitsandbytes_folder
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, N_VOCAB, (1, 24)))
    with torch.no_grad():
        theirs = model(ids).logits.double()
    ours = forward(ids, Weights(open_source(folder))).double()
    nmse = float((ours - theirs).square().sum() / theirs.square().sum())
    int8 = "SCB" in "".join(load_file(folder / "model.safetensors"))
    assert nmse < (1e-3 if int8 else 1e-4)  # on a CPU it computes in bfloat16; LLM.int8 rounds activations to 8 bits


def test_fp8_values_are_those_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    for block in ((128, 128), (64, 48)):
        made = fp8(block, "_scale_inv")("w", torch.randn(200, 144, generator=generator), generator)
        weight, scale = made["w.weight"], made["w.weight_scale_inv"]
        theirs = _dequantize_fp8_weight(weight, scale, list(block), torch.float32)
        spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:200, :144]
        ours = torch.from_numpy(small_floats("F8_E4M3"))[weight.view(torch.uint8).long()] * spread
        assert torch.equal(ours, theirs)


def test_mxfp4_values_are_those_of_transformers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 48, 4, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(110, 135, (3, 48, 4), generator=generator).to(torch.uint8)
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales, "e.bias": torch.ones(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    source = open_source(tmp_path)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert {name: t.shape for name, t in source.tensors.items()} == {"e.gate_up_proj": (3, 128, 48), "e.bias": (3,)}
    assert torch.equal(torch.from_numpy(source.raw("e.gate_up_proj").view(np.float32)).reshape(theirs.shape), theirs)


def test_gpt_oss_with_mxfp4_experts_computes_what_transformers_does(tmp_path: Path) -> None:
    """The folder as it is published: packed experts, whose gate and up take turns.  On a CPU Transformers unpacks them, too."""
    make_hf_arch(tmp_path, "gpt_oss")
    tensors, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        n_expert, n_in, n_out = tensors.pop(name).shape
        shape = n_expert, n_out, n_in // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 125, shape, generator=generator).to(torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").float().eval()
    weights, ids = Weights(open_source(tmp_path)), torch.from_numpy(np.random.default_rng(1).integers(0, 288, (1, 24)))
    assert weights.unused == ()
    with torch.no_grad():
        theirs = model(ids).logits.double()
    ours = forward(ids, weights).double()
    assert float((ours - theirs).square().sum() / theirs.square().sum()) < 1e-11
    assert weights.source._last is None, "experts were unpacked all together"
    part, whole = weights.band("blk.0.ffn_gate_up_exps.weight", slice(2, 3)), weights.layer(0)["ffn_gate_up_exps.weight"]
    assert torch.equal(whole[2:3], part)


@pytest.mark.parametrize(("kind", "dtype"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2"), ("F8_E8M0", "float8_e8m0fnu")])
def test_every_code_of_an_8_bit_float(kind: str, dtype: str) -> None:
    theirs = torch.arange(256).to(torch.uint8).view(getattr(torch, dtype)).float()
    np.testing.assert_array_equal(small_floats(kind), theirs.numpy())
