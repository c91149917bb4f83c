"""Recipes: sizes against written files, measured KL against plain forwards, what is chosen and what is refused, and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.remedies import ratio as paired_ratio
from quantscope.cli.recipe import parse_size, parse_target
from quantscope.errors import UsageError
from quantscope.imatrix import Imatrix
from quantscope.metrics import kl_nats
from quantscope.model.forward import forward
from quantscope.qtypes import QTYPES
from quantscope.quants import encode
from quantscope.remedy.candidates import PRESET, RULE, SEARCHED, Candidate, Catalog, default_types, unscored
from quantscope.remedy.equalize import Equalized
from quantscope.remedy.export import export
from quantscope.remedy.measured_kl import measured
from quantscope.remedy.original import Original, original
from quantscope.remedy.recipe import Found, Target, as_recipe, check_possible, decided, find, importance_of, ratio, type_lines
from quantscope.remedy.recipe_file import Recipe, read_recipe
from quantscope.remedy.search import for_size
from quantscope.remedy.sensitivity import predict, role
from quantscope.remedy.two_models import Rounded
from quantscope.remedy.types import choose_types
from quantscope.report.recipe import answer, document, front_table, notes, tables
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.models import make_gguf

Q4_K, Q6_K, Q8_0 = QTYPES["Q4_K"], QTYPES["Q6_K"], QTYPES["Q8_0"]
TYPES = [QTYPES[t] for t in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Large enough for blocks of 256; a head of its own, and one matrix whose rows only blocks of 32 fill."""
    path = tmp_path_factory.mktemp("recipe") / "m.gguf"
    return original(open_source(str(make_gguf(path, n_layer=4, n_embd=256, n_ff=288, n_vocab=512, seed=5))))


@pytest.fixture(scope="module")
def weights(model: Original) -> Weights:
    return Weights(model.source, keep=True)


@pytest.fixture(scope="module")
def texts() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(512, (4, 24), generator=draw), torch.randint(512, (3, 24), generator=draw)


@pytest.fixture(scope="module")
def imatrix(weights: Weights, texts: tuple[Tensor, Tensor]) -> Imatrix:
    return importance_of(weights, texts[0], "text.txt")


@pytest.fixture(scope="module")
def catalog(model: Original, weights: Weights, texts: tuple[Tensor, Tensor], imatrix: Imatrix) -> Catalog:
    return Catalog(model, predict(weights, texts[0], TYPES, importance=imatrix.of, samples=64), [t.name for t in TYPES])


@pytest.fixture(scope="module")
def found(catalog: Catalog, weights: Weights, texts: tuple[Tensor, Tensor], imatrix: Imatrix) -> Found:
    """At the size of Q4_K_M."""
    return find(catalog, weights, Target(n_bytes=preset(catalog, "Q4_K_M").n_bytes), texts, imatrix.of)


def preset(catalog: Catalog, name: str) -> Candidate:
    return next(c for c in catalog.presets() if c.name == name)


# ---------------------------------------------------------------- sizes and candidates


def test_the_default_types_are_those_of_the_presets_that_can_be_written() -> None:
    assert {t.name for t in default_types()} == {t.name for t in TYPES}


def test_sizes_are_those_of_written_files(catalog: Catalog, model: Original, tmp_path: Path) -> None:
    for c in (preset(catalog, "Q4_K_M"), preset(catalog, "Q3_K_S"), catalog.smallest()):
        made = json.dumps(as_recipe(c, catalog).document())
        bare, said = (export(model, tmp_path / "o.gguf", c.types, 15, metadata=m) for m in ({}, {"quantscope.recipe": made}))
        assert c.bpw == pytest.approx(bare.bpw)
        assert 0 < bare.n_bytes - c.n_bytes < 300  # version, source, SHA-256
        assert said.n_bytes < c.n_bytes + catalog.key_bytes()
    assert catalog.bytes_of_bpw(c.bpw) == c.n_bytes


def test_an_assignment_fills_its_budget(catalog: Catalog) -> None:
    """What the search counts and what a candidate weighs are the same bytes and the same nats."""
    choices = catalog.choices()
    budget = preset(catalog, "Q4_K_M").n_bytes - catalog.fixed_bytes()
    best = for_size(choices, budget)
    c = catalog.candidate("x", SEARCHED, {n: QTYPES[t] for n, t in best.types.items()})
    assert c.n_bytes == catalog.fixed_bytes() + best.n_bytes
    assert c.predicted == pytest.approx(best.kl)
    assert c.predicted <= preset(catalog, "Q4_K_M").predicted


def test_allowed_types_limit_what_may_be_chosen(catalog: Catalog, weights: Weights, texts: tuple[Tensor, Tensor], imatrix: Imatrix) -> None:
    few = Catalog(catalog.model, catalog.found, ["Q4_K", "Q8_0"])
    assert set(few.choices()["blk.0.attn_q.weight"]) == {"Q4_K", "Q8_0"}
    assert set(few.choices()["blk.0.ffn_down.weight"]) == {"Q5_0", "Q8_0"}  # 288 inputs: no block of 256
    result = find(few, weights, Target(n_bytes=preset(catalog, "Q6_K").n_bytes), texts, imatrix.of)
    assert result.best_preset is None
    assert {"Q4_K_M", "Q5_K_M"} <= set(result.barred)
    assert {p.name for p in result.front if p.name} == {c.name for c in catalog.presets()}
    for c in result.candidates:
        assert {t.name for t in c.types.values()} <= {"Q4_K", "Q8_0", "Q5_0", "F32"}
    assert "has these types only" in answer(result)
    assert any("--types does not allow: " in n for n in notes(result))
    assert few.allows(preset(catalog, "Q8_0"))
    assert next(Catalog(catalog.model, catalog.found, ["Q4_0", "Q8_0"]).rules(10**9)).name == "uniform (Q8_0)"


def test_presets_are_those_of_llama_quantize_with_an_importance_matrix(tmp_path: Path) -> None:
    """Q4_0 then has Q4_1 for ffn_down of the first eighth of the layers."""
    model = original(open_source(str(make_gguf(tmp_path / "m.gguf", n_layer=8))))
    catalog = Catalog(model, unscored(model, Weights(model.source), TYPES), [t.name for t in TYPES])
    types = preset(catalog, "Q4_0").types
    assert [types[f"blk.{i}.ffn_down.weight"].name for i in (0, 1)] == ["Q4_1", "Q4_0"]


def test_rules_of_thumb(catalog: Catalog) -> None:
    most = preset(catalog, "Q5_K_M").n_bytes
    uniform, ends, roles = catalog.rules(most)
    assert (uniform.name, ends.name) == ("uniform (Q5_K)", "first and last layers high (Q4_K, Q6_K)")
    kinds = {i: ends.types[f"blk.{i}.attn_q.weight"].name for i in range(4)}
    assert kinds == {0: "Q6_K", 1: "Q4_K", 2: "Q4_K", 3: "Q6_K"}
    high = {role(n) for n, t in roles.types.items() if n.startswith("blk.") and t in (Q6_K, Q8_0)}
    assert high == {"attn_v", "ffn_down"}
    for c in (uniform, ends, roles):
        assert c.kind == RULE
        assert c.n_bytes <= most
        assert c.types["blk.1.attn_norm.weight"].name == "F32"
    assert list(catalog.rules(1000)) == []


# ---------------------------------------------------------------- measurement


def test_measured_kl_is_that_of_a_plain_forward(weights: Weights, catalog: Catalog, texts: tuple[Tensor, Tensor], imatrix: Imatrix) -> None:
    recipes = [preset(catalog, name).types for name in ("Q3_K_M", "Q5_0")]
    for types, found in zip(recipes, measured(weights, recipes, texts[0], imatrix.of), strict=True):
        other = Rounded(Equalized(weights), types)
        for name, t in types.items():
            if t.is_quantized:
                w = weights.get(name)
                other.bytes[name] = encode(w.numpy(), t, w.shape[1], imatrix.of(name))
        expected = kl_nats(forward(texts[0], weights), forward(texts[0], other)).mean(-1)
        np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3)
        assert found.shape == (4,)


def test_the_importance_weighs_the_layers_matrices_only(imatrix: Imatrix) -> None:
    assert len(imatrix.entries) == 7 * 4
    assert imatrix.of("output.weight") is None
    assert imatrix.datasets == ("text.txt",)


# ---------------------------------------------------------------- the choice


def candidate(name: str, kind: str, n_bytes: int, here: float | None, elsewhere: float | None) -> Candidate:
    kl = [None if x is None else np.array([x, x * 1.1]) for x in (here, elsewhere)]
    return Candidate(name, kind, {"a.weight": Q4_K}, n_bytes, 4.5, 0.01, *kl)


def test_the_other_text_decides_and_a_better_preset_wins() -> None:
    some = [
        candidate("mix", SEARCHED, 1000, 0.01, 0.03),
        candidate("Q4_K_M", PRESET, 1000, 0.02, 0.02),
        candidate("Q4_K_S", PRESET, 900, 0.03, 0.025),
        candidate("Q3_K_M", PRESET, 800, None, None),
    ]
    assert decided(some, Target(n_bytes=1000)).name == "Q4_K_M"
    assert decided(some, Target(kl=0.027)).name == "Q4_K_S"
    assert decided(some, Target(kl=0.0215)).name == "Q4_K_M"


def test_what_is_found_is_never_worse_than_the_presets_that_fit(found: Found, catalog: Catalog) -> None:
    kls = {c.name: c.kl[1] for c in found.candidates if c.kl}
    assert found.chosen.kl is not None
    assert found.chosen.kl[1] == min(kls.values())
    assert {"Q4_K_M", "lowest predicted KL"} <= set(kls)
    assert sum(c.kind == PRESET and c.kl is not None for c in found.candidates) == 2
    most = found.target.n_bytes or 0
    assert all(c.n_bytes <= most for c in found.candidates)
    assert found.chosen.kind != PRESET or found.chosen is found.best_preset
    searched = next(c for c in found.candidates if c.kind == SEARCHED)
    assert searched.n_bytes + catalog.key_bytes() <= most


def test_the_smallest_recipe_for_a_kl(catalog: Catalog, weights: Weights, texts: tuple[Tensor, Tensor], imatrix: Imatrix) -> None:
    wanted = preset(catalog, "Q4_K_M").predicted
    result = find(catalog, weights, Target(kl=wanted), texts, imatrix.of)
    assert result.chosen.kl is not None
    assert 0.7 * wanted < result.chosen.kl[1] <= wanted
    assert result.chosen.n_bytes < preset(catalog, "Q6_K").n_bytes
    few = Catalog(catalog.model, catalog.found, ["Q4_K"])
    with pytest.raises(UsageError, match="--max-kl"):
        find(few, weights, Target(kl=wanted / 1000), texts, imatrix.of)


def test_the_front_has_every_preset_and_assignments_that_fall(found: Found, catalog: Catalog) -> None:
    assert {p.name for p in found.front if p.name} == {c.name for c in catalog.presets()}
    searched = [p for p in found.front if p.name is None]
    assert len(searched) == 12
    assert all(a.kl > b.kl and a.n_bytes < b.n_bytes for a, b in pairwise(searched))
    assert all(p.best is not None and p.best <= p.kl * (1 + 1e-9) for p in found.front)


def test_the_ratio_is_that_of_paired_chunks() -> None:
    draw = np.random.default_rng(0)
    b = draw.random(12) + 0.5
    a = 0.7 * b + 0.02 * draw.random(12)
    pair = [replace(candidate("x", RULE, 1, 1, 1), elsewhere=x) for x in (a, b)]
    r, half = ratio(*pair)
    assert (r, r - half, r + half) == pytest.approx(paired_ratio(a, b))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(bpw=1), "expected at least .*, 2.* bits per weight"),
        (Target(n_bytes=1000), "a target of 1.00 kB: expected at least"),
        (Target(bpw=64), "expected less than the original has"),
    ],
)
def test_impossible_sizes(model: Original, weights: Weights, target: Target, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_possible(model, weights, target, TYPES)


def test_the_least_size_that_is_named_is_possible(model: Original, weights: Weights, catalog: Catalog) -> None:
    least = catalog.smallest().n_bytes + catalog.key_bytes()
    check_possible(model, weights, Target(n_bytes=least), TYPES)
    with pytest.raises(UsageError):
        check_possible(model, weights, Target(n_bytes=least - 1), TYPES)


def test_targets_as_they_are_given() -> None:
    assert parse_size("600M") == 600_000_000
    assert parse_target(None, "1.5k", None) == Target(n_bytes=1500)
    for given in (
        (None, None, None),
        (4.5, "600M", None),
        (4.5, None, 0.1),
        (0.0, None, None),
        (None, None, float("nan")),
        (None, "x", None),
    ):
        with pytest.raises(UsageError):
            parse_target(*given)


# ---------------------------------------------------------------- files and report


def test_both_files_say_the_same_types(found: Found, catalog: Catalog, model: Original, tmp_path: Path) -> None:
    for c in (found.chosen, preset(catalog, "Q4_0"), preset(catalog, "F16")):
        made = as_recipe(c, catalog)
        (tmp_path / "r.json").write_text(json.dumps(made.document()))
        (tmp_path / "r.txt").write_text(type_lines(made))
        lines = replace(read_recipe(tmp_path / "r.txt"), base="Q8_0")
        for recipe in (read_recipe(tmp_path / "r.json"), lines):
            choice = choose_types(model, recipe)
            assert {n: t.name for n, t in choice.types.items()} == {n: t.name for n, t in c.types.items()}
    assert as_recipe(preset(catalog, "Q4_0"), catalog).base == "Q4_0"


def test_a_line_means_one_tensor() -> None:
    assert r"^output\.weight$=q6_k" in type_lines(Recipe(None, (("output.weight", Q6_K),)))


def test_answers() -> None:
    mix, best = candidate("lowest predicted KL", SEARCHED, 10**6, 0.01, 0.014), candidate("Q4_K_M", PRESET, 10**6, 0.02, 0.02)
    f = Found(Target(n_bytes=10**6), mix, (mix, best), (), n_chunks=(4, 2), n_ctx=64)
    assert answer(f).startswith("A mix of Q4_K × 1 is the best recipe found for 1.00 MB: 1.00 MB, 4.50 bits per weight")
    assert "30% below Q4_K_M with 0.0210 in 1.00 MB" in answer(f)
    f = replace(f, chosen=best, candidates=(best, mix))
    assert answer(f).startswith("The preset Q4_K_M is the best recipe found for 1.00 MB")
    assert "no mix that was tried is better there" in answer(f)
    f = replace(f, chosen=mix, candidates=(mix,), target=Target(bpw=2.6))
    assert answer(f).endswith("No preset of llama-quantize that quantscope writes is so small.")
    assert any("2 chunks that judge" in n for n in notes(f))


def test_tables_and_document(found: Found, catalog: Catalog) -> None:
    first, _ = tables(found)
    assert [row[-1] for row in first.rows].count("chosen") == 1
    assert {row[0] for row in front_table(found).rows} >= {"Q4_K_M", "Q8_0", "search"}
    data = json.loads(json.dumps(document(found, as_recipe(found.chosen, catalog), "m.gguf", "text.txt"), allow_nan=False))
    (chosen,) = (c for c in data["candidates"] if c["chosen"])
    assert data["chosen"] == chosen["name"]
    assert chosen["other_kl"] == min(c["other_kl"] for c in data["candidates"] if c["other_kl"] is not None)
    assert all(chosen["types"][n] == t for n, t in data["recipe"]["types"].items())
    assert any("Rules of thumb" in n for n in data["notes"])
