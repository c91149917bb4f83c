"""The importance of experts: what llama.cpp itself multiplies their matrices with, its quantizer on ours, and llama-imatrix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantscope.cli.main import main
from quantscope.engines.ggml_tensor import GgmlTensor, name_and_op, read
from quantscope.engines.llama_session import LlamaSession
from quantscope.imatrix import Entry, Imatrix, read_imatrix, write_imatrix
from quantscope.importance import compute_imatrix, compute_importance, prepare_importance
from quantscope.lockstep import Member
from quantscope.recipes import Options
from quantscope.results import PlanInfo, StudyOptions
from quantscope.sources.gguf import open_gguf
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.arch_models import make_arch
from tests.models import make_gguf
from tests.oracle import ggml
from tests.oracle.llama_quant import quantized_types
from tests.oracle.test_imatrix import run

N_CHUNK, N_CTX = 3, 32  # llama-imatrix leaves batches of fewer than 16 tokens alone
PLAN = PlanInfo(2, 2, 1, 1, 1, 0, 0)
CASES = ("llama-moe", "qwen2moe", "gpt-oss", "bailingmoe2", "deepseek2", "deepseek2-one-matrix", "minicpm3")


def token_ids() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(3, 288, (N_CHUNK, N_CTX)))


class Watched(LlamaSession):
    """llama.cpp with a look at the inputs of its products, added up as ``IMatrixCollector::collect_imatrix`` does."""

    def __init__(self, path: Path) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, list[int]] = {}
        super().__init__(path, n_ctx=N_CTX)

    def _on_node(self, address: int, ask: bool, user_data: int) -> bool:
        t, (_, op) = GgmlTensor.from_address(address), name_and_op(address)
        if not op.startswith("MUL_MAT"):
            return not ask
        weight = GgmlTensor.from_address(t.src[0])
        name, n_in, n_mat = weight.name.decode(), weight.ne[0], weight.ne[2]
        if ask:
            return op == "MUL_MAT_ID" or name.startswith("blk.")
        x = read(t.src[1])
        assert x is not None
        if op == "MUL_MAT_ID":
            chosen = read(t.src[2])  # [T,n_used]
            assert chosen is not None
            inputs = np.broadcast_to(x.reshape(len(chosen), -1, n_in), (*chosen.shape, n_in))
            for e in range(n_mat):
                self._add(name, n_mat, e, inputs[chosen == e])
        elif n_mat > 1:  # a matrix of each head: x [H,T,in]
            self._add(name, 1, 0, x.reshape(n_mat, -1, n_in).transpose(1, 0, 2).reshape(-1, n_mat * n_in))
        else:
            self._add(name, 1, 0, x.reshape(-1, n_in))
        return True

    def _add(self, name: str, n_mat: int, e: int, x: Any) -> None:
        sums = self.sums.setdefault(name, np.zeros((n_mat, x.shape[-1])))
        counts = self.counts.setdefault(name, [0] * n_mat)
        sums[e] += np.square(x, dtype=np.float64).sum(0)
        counts[e] += len(x)


def imatrix_of(path: Path) -> Imatrix:
    return compute_imatrix(Member("", Weights(open_source(path))), token_ids(), PLAN)


def assert_same(theirs: dict[str, Entry], ours: Imatrix) -> None:
    """Counts alike, sums to the rounding of float32."""
    kept = {name for name in theirs if name.split(".")[2] != "ffn_gate_inp_shexp"}  # a vector, which no one quantizes
    assert kept == set(ours.entries)
    for name in kept:
        assert ours.entries[name].counts == theirs[name].counts, name
        assert ours.entries[name].sums.shape == theirs[name].sums.shape, name
        np.testing.assert_allclose(ours.entries[name].sums, theirs[name].sums, rtol=2e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_inputs_of_llama_cpps_products(tmp_path: Path, case: str) -> None:
    path = make_arch(tmp_path / "m.gguf", case)
    with Watched(path) as llama:
        for row in token_ids():
            llama.decode(row.tolist())
    theirs = {name: Entry(sums.astype(np.float32), tuple(llama.counts[name])) for name, sums in llama.sums.items()}
    assert_same(theirs, imatrix_of(path))
    if case == "llama-moe":
        assert sum(theirs["blk.1.ffn_down_exps.weight"].counts) == 2 * N_CHUNK * N_CTX


def expert_model(path: Path, *, n_expert: int = 16, wide: int = 256) -> Path:
    """Experts wide enough for K types."""
    rng = np.random.default_rng(3)

    def noise(*shape: int) -> Any:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    edit: dict[str, Any] = {}
    for i in range(2):
        edit |= {f"blk.{i}.ffn_{part}.weight": None for part in ("gate", "up", "down")}
        edit |= {f"blk.{i}.ffn_{part}_exps.weight": noise(n_expert, wide, wide) for part in ("gate", "up", "down")}
        edit[f"blk.{i}.ffn_gate_inp.weight"] = noise(n_expert, wide)
    header = {"llama.expert_count": n_expert, "llama.expert_used_count": 2}
    return make_gguf(path, n_embd=wide, n_ff=wide, edit=edit, metadata=header)


@pytest.mark.parametrize("preset", ["Q4_0", "Q4_K_M", "Q2_K"])
def test_bytes_of_llama_quantize(tmp_path: Path, preset: str) -> None:
    """Every expert with the importance of its own inputs, and those that no token reaches with equal weights."""
    model, importance = expert_model(tmp_path / "m.gguf"), tmp_path / "i.gguf"
    found = compute_imatrix(Member("", Weights(open_source(model))), token_ids()[:1, :6], PlanInfo(1, 1, 1, 1, 1, 0, 0))
    assert {name for name, _, _ in found.idle()} == {f"blk.{i}.ffn_{p}_exps.weight" for i in range(2) for p in ("gate", "up", "down")}
    write_imatrix(importance, found)
    assert read_imatrix(importance).entries["blk.0.ffn_up_exps.weight"].counts == found.entries["blk.0.ffn_up_exps.weight"].counts
    theirs = quantized_types(
        model, tmp_path / "theirs.gguf", preset, Options(imatrix=True), {name: entry.mean for name, entry in found.entries.items()}
    )
    assert theirs is not None
    assert {theirs[f"blk.0.ffn_{part}_exps.weight"].block_size for part in ("gate", "up")} <= {32, 256}
    command = ["quantize", str(model), str(tmp_path / "ours.gguf"), "--type", preset, "--imatrix", str(importance)]
    assert main(command) == 0
    ours, written = open_gguf(tmp_path / "ours.gguf"), open_gguf(tmp_path / "theirs.gguf")
    assert {name: t.qtype for name, t in ours.tensors.items()} == theirs
    for name in theirs:
        ggml.assert_same_bytes(ours.raw(name), written.raw(name), f"{preset}, {name}")


def test_notes_of_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The experts that a short text does not reach are named, by the command that counts and by the one that quantizes."""
    model, text, importance = expert_model(tmp_path / "m.gguf", n_expert=64, wide=64), tmp_path / "t.txt", tmp_path / "i.gguf"
    text.write_text("abcdefghijklmnopq", "utf-8")
    assert main(["imatrix", str(model), "--text", str(text), "--ctx", "8", "-o", str(importance)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"No token reaches some of the experts \(blk\.0\.ffn_down_exps\.weight: \d+/64, ", said)
    command = ["quantize", str(model), str(tmp_path / "q.gguf"), "--type", "Q4_0", "--imatrix", str(importance)]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"knows nothing of some experts \(blk\.0\.ffn_down_exps\.weight: \d+/64, ", said)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_figures_of_llama_imatrix(tmp_path: Path, case: str) -> None:
    model, text, out = make_arch(tmp_path / "m.gguf", case), tmp_path / "text.txt", tmp_path / "i.gguf"
    text.write_text("a quick brown fox jumps over the lazy dog. " * 8, "utf-8")
    options = StudyOptions((str(model),), text=text, n_ctx=N_CTX, n_chunks=N_CHUNK)
    exact = ("-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t", "1", "--no-ppl", "--chunks", str(N_CHUNK))
    run("llama-imatrix", "-m", model, "-f", text, "-c", str(N_CTX), *exact, "-o", out)
    theirs = read_imatrix(out)
    ours = compute_importance(prepare_importance(options))
    assert (theirs.n_chunk, theirs.n_ctx) == (ours.n_chunk, ours.n_ctx)
    assert_same(dict(theirs.entries), ours)
