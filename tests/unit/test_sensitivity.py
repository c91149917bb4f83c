"""Predicted sensitivity: gradients against finite differences, sums against loops, exact parts against whole runs; report and command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from quantscope.cli.sensitivity import parse_types
from quantscope.cli.sensitivity import sensitivity as command
from quantscope.errors import (
    NonFiniteError,
    PromptError,
    ShapeError,
    UnsupportedArchitectureError,
    UnsupportedTypeError,
    UsageError,
)
from quantscope.imatrix import Entry, Imatrix, write_imatrix
from quantscope.metrics import kl_nats
from quantscope.model.forward import forward, layer, tables
from quantscope.qtypes import QTYPES
from quantscope.remedy import sensitivity as module
from quantscope.remedy.probe import Probe, Product, back_through, joined, probe
from quantscope.remedy.sensitivity import Sensitivity, n_stages, place, predict, quantized, role
from quantscope.remedy.small_kl import small_kl
from quantscope.report.sensitivity import answer, document, heat_table, main_type, markdown, most_table, notes
from quantscope.report.sensitivity import tables as report_tables
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import LINEARS, make_gguf

ALL = 10**6  # more rows than there are: none is drawn
Q8_0, Q4_0, F32 = QTYPES["Q8_0"], QTYPES["Q4_0"], QTYPES["F32"]


def open_weights(path: Path) -> Weights:
    return Weights(open_source(str(path)), keep=True)


def some_ids(n_chunk: int = 3, n_ctx: int = 16, n_vocab: int = 288) -> Tensor:
    return torch.randint(n_vocab, (n_chunk, n_ctx), generator=torch.Generator().manual_seed(7))


# ---------------------------------------------------------------- small divergences


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_kl_is_that_of_the_definition(scale: float) -> None:
    z = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    other = z + scale * torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(small_kl(z, other).double(), kl_nats(z, other), rtol=2e-4, atol=0)


def test_kl_of_nearly_equal_logits_in_float32() -> None:
    """10⁻⁹ nats: the shift of all logits is nothing, and nothing is lost to rounding."""
    z = (torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)) * 3).round(decimals=2)
    step = torch.randn(4, 4096, generator=torch.Generator().manual_seed(1)) * 2.0**-14
    exact = kl_nats(z.double(), (z + step).double())
    assert 1e-10 < float(exact.min()) < float(exact.max()) < 1e-8
    torch.testing.assert_close(small_kl(z, z + step + 4).double(), exact, rtol=0.05, atol=0)
    assert small_kl(z, z).tolist() == [0.0] * 4


# ---------------------------------------------------------------- gradients and sums


@pytest.mark.parametrize(("arch", "scales"), [("llama", ("attn_v", "ffn_up", "ffn_down")), ("qwen2", ()), ("qwen3", ())])
def test_gradients_are_finite_differences(tmp_path: Path, arch: str, scales: tuple[str, ...]) -> None:
    """⟨Σ g xᵀ, ΔW⟩ of every matrix of a layer is what the loss changes by; so is ⟨gradient, Δh⟩ at its input."""
    weights = open_weights(make_gguf(tmp_path / "m.gguf", arch=arch, n_layer=1, scales=scales, seed=3))
    w = {name: tensor.double() for name, tensor in weights.layer(0).items()}
    torch.manual_seed(0)
    h, at_output = torch.randn(2, 9, 64).double(), torch.randn(2, 9, 64).double()
    rope = tables(h, weights, dtype=torch.float64)

    def loss(w: Mapping[str, Tensor], h: Tensor) -> float:
        return float((layer(h, w, 0, weights.config, rope) * at_output).sum())

    with torch.no_grad():
        at_input, products = back_through(h, at_output, w, 0, weights.config, rope)
        assert set(products) == set(LINEARS)
        step = torch.randn_like(h) * 1e-5
        assert float((at_input * step).sum()) == pytest.approx((loss(w, h + step) - loss(w, h - step)) / 2, rel=1e-6)
        for name, (x, g, *_) in products.items():
            matrix = w[f"{name}.weight"]
            step = torch.randn_like(matrix) * 1e-5
            up, down = ({**w, f"{name}.weight": matrix + sign * step} for sign in (1, -1))
            predicted = float(torch.einsum("no,oi,ni->", g, step, x))
            assert predicted == pytest.approx((loss(up, h) - loss(down, h)) / 2, rel=1e-5), name


def probe_by_loops(x: Tensor, g: Tensor, change: Tensor) -> float:
    """The formula at the head of probe.py, position by position."""
    total = 0.0
    for chunk, grads in zip(x, g, strict=True):
        mu = chunk.mean(0)
        total += float(sum(gs @ change @ mu for gs in grads)) ** 2
        total += sum(float(gs @ change @ (xs - mu)) ** 2 for xs, gs in zip(chunk, grads, strict=True))
    return total / 2 / (x.shape[0] * x.shape[1])


def test_probe_of_all_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    x, g, change = 1 + torch.randn(3, 5, 4, generator=draw), torch.randn(3, 5, 6, generator=draw), torch.randn(6, 4, generator=draw)
    expected = probe_by_loops(x, g, change)
    assert probe(Product.of(x, g), ALL, draw).kl(change) == pytest.approx(expected, rel=1e-5)
    parts = [probe(Product.of(x[:1], g[:1]), ALL, draw), probe(Product.of(x[1:], g[1:]), ALL, draw)]
    assert joined(parts).kl(change) == pytest.approx(expected, rel=1e-5)


def test_probe_of_experts() -> None:
    """The same sum with ΔWₑ and the mean of each expert's own inputs: rows of one expert after the other, one of them without any."""
    draw = torch.Generator().manual_seed(0)
    x, g, change = 1 + torch.randn(3, 8, 4, generator=draw), torch.randn(3, 8, 6, generator=draw), torch.randn(3, 6, 4, generator=draw)
    goes_to = torch.tensor([[0, 0, 2, 2, 2, 0, 0, 2], [2] * 8, [0, 2] * 4])
    expected = 0.0
    for chunk, grads, to in zip(x, g, goes_to, strict=True):
        common = 0.0
        for e in (0, 2):
            rows, felt = chunk[to == e], grads[to == e]
            common += sum(float(gs @ change[e] @ rows.mean(0)) for gs in felt) if len(rows) else 0.0
            expected += sum(float(gs @ change[e] @ (xs - rows.mean(0))) ** 2 for xs, gs in zip(rows, felt, strict=True))
        expected += common**2
    order = goes_to.flatten().argsort(stable=True)
    product = Product(
        x.flatten(0, 1)[order], g.flatten(0, 1)[order], torch.arange(24)[order] // 8, goes_to.flatten()[order], 3, 8, n_expert=3
    )
    p = probe(product, ALL, draw)
    assert p.reached.tolist() == [8, 0, 16]
    felt = p.felt(change[0], 0) + p.felt(change[1], 1) + p.felt(change[2], 2)
    assert p.kl_of(felt) == pytest.approx(expected / 2 / 24, rel=1e-5)
    assert p.kl_of(p.felt(change[1], 1)) == p.kl_of(p.nothing()) == 0


@pytest.mark.parametrize("n", [10, 40])
def test_probe_of_drawn_rows_is_right_on_average(n: int) -> None:
    """The part without cross terms: the part with them, which no draw changes, is taken away by gradients that add up to nothing."""
    draw = torch.Generator().manual_seed(0)
    x, g, change = 1 + torch.randn(2, 40, 4, generator=draw), torch.randn(2, 40, 6, generator=draw), torch.randn(6, 4, generator=draw)
    g[:, 0] *= 10  # an outlier, which rows drawn evenly would miss or count too often
    g -= g.mean(1, keepdim=True)
    found = [probe(Product.of(x, g), n, draw) for _ in range(400)]
    assert {p.x.shape for p in found} == {(n, 4)}
    values, expected = torch.tensor([p.kl(change) for p in found]), probe_by_loops(x, g, change)
    assert float(values.std()) < 0.8 * expected
    assert float(values.mean()) == pytest.approx(expected, rel=0.1)


def test_probe_without_gradient_predicts_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    p = probe(Product.of(torch.randn(2, 8, 4), torch.zeros(2, 8, 6)), 3, draw)
    assert p.kl(torch.ones(6, 4)) == 0
    assert isinstance(p, Probe)


# ---------------------------------------------------------------- the prediction


def kl_with(weights: Weights, ids: Tensor, **tensors: Tensor) -> float:
    """Mean KL of a whole run with other tensors, by the plain forward and the plain definition."""
    before = forward(ids, weights)
    kept = {name: weights.get(name) for name in tensors}
    assert weights._kept is not None
    weights._kept |= tensors
    after = forward(ids, weights)
    weights._kept |= kept
    return float(kl_nats(before, after).mean())


@pytest.mark.parametrize("tied", [False, True])
def test_head_and_embedding_are_exact(tmp_path: Path, tied: bool) -> None:
    weights, ids = open_weights(make_gguf(tmp_path / "m.gguf", tied=tied)), some_ids()
    found = predict(weights, ids, [Q8_0, Q4_0], samples=ALL)
    names = ["token_embd.weight"] if tied else ["token_embd.weight", "output.weight"]
    assert [name for name in found.kl if not name.startswith("blk.")] == names
    for name in names:
        for t in (Q8_0, Q4_0):
            true = kl_with(weights, ids, **{name: quantized(weights.get(name), t)})
            assert found.kl[name][t.name] == pytest.approx(true, rel=0.01), (name, t)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_layers_are_near_what_is_measured(tmp_path: Path, arch: str) -> None:
    """Within a factor of two, for every matrix of a layer in a fine and a coarse type."""
    weights, ids = open_weights(make_gguf(tmp_path / "m.gguf", arch=arch, n_layer=2)), some_ids(24, 24)
    found = predict(weights, ids, [Q8_0, Q4_0])
    assert len(found.kl) == 16
    for name in (f"blk.{i}.{local}.weight" for i in range(2) for local in LINEARS):
        for t in (Q8_0, Q4_0):
            true = kl_with(weights, ids, **{name: quantized(weights.get(name), t)})
            assert true / 2 < found.kl[name][t.name] < true * 2, (name, t)


def test_sizes_fallbacks_and_types_that_change_nothing(tmp_path: Path) -> None:
    """Rows of 64 and of 96 hold no block of 256: Q4_K is Q5_0 there, as llama-quantize does it."""
    weights = open_weights(make_gguf(tmp_path / "m.gguf", n_layer=1))
    seen: list[int] = []
    found = predict(weights, some_ids(), [QTYPES["Q4_K"], QTYPES["Q5_0"], F32], step=lambda done, what: seen.append(done))
    assert seen == list(range(n_stages(1) + 1))
    assert (found.types, found.n_chunk, found.n_ctx) == (("Q4_K", "Q5_0", "F32"), 3, 16)
    down = "blk.0.ffn_down.weight"
    assert found.shapes[down] == (64, 96)
    assert found.stored[down] == {"Q4_K": "Q5_0", "Q5_0": "Q5_0", "F32": "F32"}
    assert found.n_bytes[down] == {"Q4_K": 64 * 3 * 22, "Q5_0": 64 * 3 * 22, "F32": 64 * 96 * 4}
    for row in found.kl.values():
        assert row["F32"] == 0 < row["Q4_K"] == row["Q5_0"]


def test_nothing_depends_on_the_parts_and_all_on_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, ids = open_weights(make_gguf(tmp_path / "m.gguf")), some_ids()
    found = predict(weights, ids, [Q4_0], samples=ALL)
    other = predict(weights, ids, [Q4_0], samples=ALL, seed=1)
    monkeypatch.setattr(module, "PART_TOKENS", 16)
    again = predict(weights, ids, [Q4_0], samples=ALL)
    for name, row in found.kl.items():
        assert again.kl[name]["Q4_0"] == pytest.approx(row["Q4_0"], rel=1e-3), name
    assert other.kl["blk.0.ffn_up.weight"] != found.kl["blk.0.ffn_up.weight"]
    monkeypatch.setattr(module, "SLICE_VALUES", 300)  # one position at a time
    again = predict(weights, ids, [Q4_0], samples=ALL)
    assert again.kl["output.weight"]["Q4_0"] == pytest.approx(found.kl["output.weight"]["Q4_0"], rel=1e-3)


def test_importance_is_used_by_the_encoder(tmp_path: Path) -> None:
    """Only the first half of the columns counts: their error falls, that of the others grows."""
    weights, ids = open_weights(make_gguf(tmp_path / "m.gguf", n_layer=1)), some_ids()
    wanted = np.r_[np.ones(32), np.full(32, 1e-6)].astype(np.float32)
    asked = []

    def importance(name: str) -> np.ndarray | None:
        asked.append(name)
        return wanted if name.endswith("attn_q.weight") else None

    plain, weighted = predict(weights, ids, [Q4_0]), predict(weights, ids, [Q4_0], importance=importance)
    changed = {name for name in plain.kl if plain.kl[name] != weighted.kl[name]}
    assert changed == {"blk.0.attn_q.weight"}
    assert set(asked) == set(plain.kl)


@pytest.mark.parametrize(("name", "where"), [("blk.0.ffn_down.weight", "hidden state"), ("output.weight", "output")])
def test_model_that_overflows(tmp_path: Path, name: str, where: str) -> None:
    huge = np.full((64, 96) if "down" in name else (288, 64), 3e38, np.float32)
    weights = open_weights(make_gguf(tmp_path / "m.gguf", n_layer=1, edit={name: huge}))
    with pytest.raises(NonFiniteError, match=f"the {where} is NaN or infinite"):
        predict(weights, some_ids(), [Q8_0])


# ---------------------------------------------------------------- the report

NAMES = ("token_embd.weight", *(f"blk.{i}.{r}.weight" for i in range(2) for r in ("attn_q", "ffn_down")))
SAMPLE = Sensitivity(
    kl={
        "token_embd.weight": {"Q4_K": 1e-4, "Q8_0": 1e-6},
        "blk.0.attn_q.weight": {"Q4_K": 2e-4, "Q8_0": 0.0},
        "blk.0.ffn_down.weight": {"Q4_K": 8e-4, "Q8_0": 8e-6},
        "blk.1.attn_q.weight": {"Q4_K": 3e-5, "Q8_0": 3e-7},
        "blk.1.ffn_down.weight": {"Q8_0": 4e-6},
    },
    stored={name: {"Q4_K": "Q5_0" if name == "blk.0.attn_q.weight" else "Q4_K", "Q8_0": "Q8_0"} for name in NAMES},
    n_bytes={name: {"Q4_K": 144, "Q8_0": 272} for name in NAMES},
    shapes=dict.fromkeys(NAMES, (1, 256)),
    types=("Q8_0", "Q4_K"),
    n_chunk=4,
    n_ctx=64,
)


def test_groups() -> None:
    assert (role("blk.31.ffn_down.weight"), place("blk.31.ffn_down.weight")) == ("ffn_down", "31")
    assert (role("output.weight"), place("output.weight")) == ("output", "output")
    assert SAMPLE.group(role, "Q4_K") == pytest.approx({"token_embd": 1e-4, "attn_q": 2.3e-4, "ffn_down": 8e-4})
    assert SAMPLE.group(place, "Q8_0") == pytest.approx({"token_embd": 1e-6, "0": 8e-6, "1": 4.3e-6})
    assert SAMPLE.most("Q4_K", 2) == ["blk.0.ffn_down.weight", "blk.0.attn_q.weight"]
    assert "blk.1.ffn_down.weight" not in SAMPLE.most("Q4_K")


def test_heat_map() -> None:
    table = heat_table(SAMPLE, "Q4_K")
    assert table.columns == ("layer", "attn_q", "ffn_down", "sum")
    assert table.rows == (("0", "▓ 200", "█ 800", "1,000"), ("1", "  30.0", "–", "30.0"), ("token_embd", "", "", "▒ 100"))
    assert "  0" in heat_table(SAMPLE, "Q8_0").rows[0]


def test_tables_and_notes() -> None:
    assert main_type(SAMPLE) == "Q4_K"
    assert main_type(replace(SAMPLE, types=("Q8_0",))) == "Q8_0"
    assert [len(t.rows) for t in report_tables(SAMPLE)] == [3, 3, 3, 4]
    assert most_table(SAMPLE, "Q4_K", 1).rows == (("ffn_down", "0", "1 × 256", "144 bytes", "8.00", "800"),)
    assert "ffn_down 71%" in answer(SAMPLE)
    assert answer(replace(SAMPLE, kl={"output.weight": {"Q4_K": 0.0}})) == "Storing this model in Q4_K changes nothing."
    said = " ".join(notes(SAMPLE))
    assert "4 chunks only" in said
    assert "blk.0.attn_q.weight Q4_K → Q5_0" in said
    assert len(notes(replace(SAMPLE, n_chunk=32))) == 2
    text = markdown(SAMPLE, "a_b*c.gguf")
    assert text.startswith("# quantscope sensitivity of a_b\\*c.gguf\n")
    assert text.count("one matrix at a time in") == 2


def test_document() -> None:
    data = document(SAMPLE, "m.gguf", "t.txt", "i.gguf")
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    row = next(t for t in data["tensors"] if t["name"] == "blk.0.attn_q.weight")
    assert (row["layer"], row["role"], row["shape"]) == (0, "attn_q", [1, 256])
    assert row["types"]["Q4_K"] == {"kl": 2e-4, "stored": "Q5_0", "bytes": 144}
    assert data["tensors"][0]["layer"] is None
    assert data["by_role"]["ffn_down"] == pytest.approx({"Q4_K": 8e-4, "Q8_0": 1.2e-5})
    assert data["most_sensitive"]["Q4_K"][0] == "blk.0.ffn_down.weight"
    assert (data["version"], data["imatrix"]) == (1, "i.gguf")


# ---------------------------------------------------------------- the command


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a quick brown fox jumps over the lazy dog. " * 8, "utf-8")
    return path


def test_command(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = make_gguf(tmp_path / "m.gguf"), tmp_path / "out"
    command(str(model), text=text, types="q8_0, Q4_0", chunks=4, ctx=32, out=out, json=True)
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert (data["types"], data["n_chunk"], data["n_ctx"], len(data["tensors"])) == (["Q8_0", "Q4_0"], 4, 32, 16)
    assert json.loads((out / "sensitivity.json").read_text("utf-8")) == data
    assert data["answer"] in (out / "sensitivity.md").read_text("utf-8").replace("\\", "")
    assert "The most sensitive" in printed.err
    assert "one matrix at a time in Q8_0" in printed.err
    command(str(model), text=text, types="Q8_0", chunks=4, ctx=32)
    assert "one matrix at a time in Q8_0" in capsys.readouterr().out


def test_command_with_an_importance_matrix(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_gguf(tmp_path / "m.gguf", n_layer=1)
    sizes = {name: 96 if name == "ffn_down" else 64 for name in LINEARS}
    sums = {f"blk.0.{name}.weight": Entry(np.linspace(1e-3, 1, n, dtype=np.float32)[None], (1,)) for name, n in sizes.items()}
    write_imatrix(tmp_path / "i.gguf", Imatrix(sums))
    found = []
    for path in (None, tmp_path / "i.gguf"):
        command(str(model), text=text, types="Q4_0", chunks=4, ctx=32, imatrix=path, json=True)
        found.append({t["name"]: t["types"]["Q4_0"]["kl"] for t in json.loads(capsys.readouterr().out)["tensors"]})
    assert {name for name in found[0] if found[0][name] != found[1][name]} == set(sums)
    write_imatrix(tmp_path / "other.gguf", Imatrix({"blk.0.attn_q.weight": Entry(np.ones((1, 128), np.float32), (1,))}))
    with pytest.raises(ShapeError, match="of another model"):
        command(str(model), text=text, types="Q4_0", ctx=32, imatrix=tmp_path / "other.gguf")


def test_command_refuses(tmp_path: Path, text: Path) -> None:
    model = make_gguf(tmp_path / "m.gguf")
    (tmp_path / "short.txt").write_text("a short text", "utf-8")
    with pytest.raises(PromptError, match="expected at least 256, two chunks of 128"):
        command(str(model), text=tmp_path / "short.txt", ctx=128)
    for words in ("Q4_K_M", "Q9_0", "IQ2_XXS"):
        with pytest.raises(UnsupportedTypeError, match=f"--types: '{words}' is .* expected some of F32"):
            command(str(model), text=text, types=f"Q4_0,{words}")
    with pytest.raises(UsageError, match="at least one tensor type"):
        parse_types(" , ")
    with pytest.raises(UsageError, match="--chunks 0"):
        command(str(model), text=text, chunks=0, ctx=32)
    with pytest.raises(UsageError, match="is a file, expected a folder"):
        command(str(model), text=text, ctx=32, out=text)
    other = make_gguf(tmp_path / "g.gguf", metadata={"general.architecture": "gemma9"})
    with pytest.raises(UnsupportedArchitectureError, match="gemma9"):
        command(str(other), text=text, ctx=32)
    assert [t.name for t in parse_types("q4_k,Q4_K,Q8_0")] == ["Q4_K", "Q8_0"]
