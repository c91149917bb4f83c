"""The catalogue against the local replay: a fault is seen in the operations it names, in no other, and is what explains them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantscope.diagnose.causes import find
from quantscope.diagnose.decodings import DECODINGS
from quantscope.diagnose.faults import FAULTS, MATRICES, Instance, instances
from quantscope.diagnose.local import causes, contradicted, cover
from quantscope.diagnose.replay import replay
from quantscope.diagnose.setup import Setup
from quantscope.diagnose.twins import PROBES, probe
from quantscope.diagnose.walk import Walker, walk
from quantscope.model.taps import LAYER_TAPS, split_tap
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Origin, Trace, full_trace
from quantscope.weights import Weights
from tests.models import LINEARS, make_gguf
from tools.fault_table import FILE, table

IDS = (1, 17, 250, 31, 99, 42, 8)
MODELS: dict[str, dict[str, Any]] = {
    "shared heads": {},
    "biases": {"biases": LINEARS, "n_head_kv": 1},
    "rope_freqs, tied": {"rope_freqs": (1, 1, 1, 1.5, 2.5, 4, 8, 8), "tied": True},
    "yarn": {"metadata": {f"llama.rope.scaling.{k}": v for k, v in (("type", "yarn"), ("factor", 4.0), ("original_context_length", 32))}},
    "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3"},
    "Q4_0": {"dtype": "Q4_0"},
    "Q5_1": {"dtype": "Q5_1"},
}
OF_THE_RUN = ("layer-skipped", "layer-repeated", "bos-missing")  # no operation is wrong by itself, or the ids are others
UNSEEN = 1e-6  # NMSE


def setup_of(tmp_path: Path, n_prompt: int | None = None, **model: Any) -> Setup:
    weights = Weights(open_source(make_gguf(tmp_path / "m.gguf", seed=3, **model)), keep=True)
    return Setup(weights, torch.tensor([IDS]), n_prompt=n_prompt)


def trace_of(setup: Setup, faulty: Setup) -> Trace:
    """What an engine with this setup shows; whole tensors."""
    taps: dict[str, torch.Tensor] = {}
    for step in walk(setup, [Walker(faulty)], lambda name: True):
        taps |= {name: x[0] for name, x in step[0].items()}
    return full_trace(Origin("engine", tokens=IDS), taps)


def stems(taps: Any) -> set[str]:
    return {(split_tap(tap) or (tap, None))[0] for tap in taps}


@pytest.mark.parametrize("model", MODELS)
def test_each_fault_is_in_its_own_operations_and_explains_them(model: str, tmp_path: Path) -> None:
    setup = setup_of(tmp_path, n_prompt=4, **MODELS[model])
    assert isinstance(setup.weights, Weights)
    seen = 0
    for instance in instances(setup, limits=(1.5,)):
        if instance.fault.name in OF_THE_RUN:
            continue
        faulty = instance.apply(setup)
        assert faulty is not None
        trace = trace_of(setup, faulty)
        r = replay(trace, setup.weights, predicted=None)
        convicted = r.those("convicted")
        assert stems(row.tap for row in convicted) <= set(instance.ops), instance.label
        if not convicted:
            continue
        seen += 1
        found = causes(trace, setup.weights, convicted, 4)
        suspects = {c.instance for own in found.values() for c in own}
        explained, left = cover(found, contradicted(trace, setup.weights, r, suspects, 4))
        unjudged = [row for row in convicted if row.n == 0]  # of another shape
        assert instance.fault.name in {name for e in explained for name in e.names}, instance.label
        assert len(left) == len(unjudged), instance.label
    assert seen > 60


@pytest.mark.parametrize("name", ["weight-transposed (ffn_down)", "rope-missing-k", "norm-layernorm (ffn_norm)", "scale-missing"])
def test_the_narrowest_fault_is_named_first(name: str, tmp_path: Path) -> None:
    """A fault that would have shown in an operation that is right does not stand for one that would not."""
    setup = setup_of(tmp_path)
    instance = next(i for i in instances(setup) if i.label == name)
    faulty = instance.apply(setup)
    assert faulty is not None
    trace = trace_of(setup, faulty)
    assert isinstance(setup.weights, Weights)
    r = replay(trace, setup.weights, predicted=None)
    found = causes(trace, setup.weights, r.those("convicted"))
    suspects = {c.instance for own in found.values() for c in own}
    (only,), left = cover(found, contradicted(trace, setup.weights, r, suspects))
    assert (only.instance.label, left) == (name, [])


def test_the_catalogue_is_what_was_promised() -> None:
    names = {f.name for f in FAULTS}
    assert len(names) >= 35
    assert names >= set(DECODINGS)
    promised = {
        "weight-transposed",
        "embedding-column",
        "rope-layout",
        "mask-missing",
        "gqa-tile",
        "q6_k-order",
        "cache-stale",
        "bos-missing",
    }
    assert promised <= names
    assert set(MATRICES.values()) <= {*LAYER_TAPS, "result_output"}
    assert {name for twins, _ in PROBES for name in twins} <= names


def test_a_fault_that_changes_nothing_is_no_instance(tmp_path: Path) -> None:
    labels = {i.label for i in instances(setup_of(tmp_path, n_head_kv=4))}
    assert "gqa-tile" not in labels  # every head has its own
    assert "rope-theta (10000)" not in labels  # the file's own
    assert "norm-eps (1e-05)" not in labels
    assert "bias-ignored (attn_q)" not in labels
    assert "cache-stale" not in labels  # one batch
    assert "rope-factors-ignored" not in labels


def test_says_and_probes_are_sentences(tmp_path: Path) -> None:
    for instance in instances(setup_of(tmp_path, arch="qwen2")):
        assert "{" not in instance.says, instance.label
    assert "angles" not in probe(["act-gelu-erf", "act-gelu-tanh"])
    assert "float32" in probe(["act-gelu-erf", "act-gelu-tanh"])
    assert "eight different tokens" in probe(["rope-layout", "gqa-tile"])


def test_two_faults_can_be_applied_one_after_the_other(tmp_path: Path) -> None:
    """Mask and scale are settings of one attention: neither undoes the other."""
    setup = setup_of(tmp_path)
    by_label = {i.label: i for i in instances(setup)}

    def applied(*labels: str) -> torch.Tensor:
        s: Setup | None = setup
        for label in labels:
            s = by_label[label].apply(s) if s is not None else None
        assert s is not None
        piece = trace_of(setup, s).find("kq_soft_max-0", Full)
        assert piece is not None
        return piece.values

    both = applied("mask-missing", "scale-missing")
    torch.testing.assert_close(both, applied("scale-missing", "mask-missing"))
    for one in ("mask-missing", "scale-missing"):
        assert (both - applied(one)).abs().max() > UNSEEN
    assert (both.triu(1) > 0).any()


def test_an_instance_knows_its_label() -> None:
    fault = next(f for f in FAULTS if f.name == "norm-weight-twice")
    assert Instance(fault, "ffn_norm").label == "norm-weight-twice (ffn_norm)"
    assert Instance(fault, "ffn_norm").ops == ("ffn_norm",)
    norms = {"attn_norm", "ffn_norm", "result_norm", "Qcur_normed", "Kcur_normed"}
    assert set(Instance(fault, "all").ops) == norms | {"Qcur_pre", "Kcur_latent"}  # made of normed latent vectors


def test_the_table_in_the_docs_is_fresh() -> None:
    assert FILE.read_text(encoding="utf-8") == table()


def test_two_wrong_rotations_are_one_after_the_other(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    by_label = {i.label: i for i in instances(setup)}

    def turned(*labels: str) -> torch.Tensor:
        s: Setup | None = setup
        for label in labels:
            s = by_label[label].apply(s) if s is not None else None
        assert s is not None
        full = trace_of(setup, s).find("Qcur-0", Full)
        assert full is not None
        return full.values

    torch.testing.assert_close(turned("rope-reversed", "rope-reversed"), turned())
    torch.testing.assert_close(turned("rope-offset (1)", "rope-offset (-1)"), turned())
    torch.testing.assert_close(turned("rope-offset-q (1 q)", "rope-missing-k"), turned("rope-offset (1)"))
    torch.testing.assert_close(turned("rope-missing", "rope-reversed"), turned("rope-missing"))


def test_taps_of_another_shape_are_explained_by_the_fault_that_makes_them(tmp_path: Path) -> None:
    """Twice as many heads: their maps cannot be judged one by one, and nothing is added to explain them."""
    setup = setup_of(tmp_path, arch="qwen2")
    instance = next(i for i in instances(setup) if i.fault.name == "head-dim-half")
    faulty = instance.apply(setup)
    assert faulty is not None
    assert isinstance(setup.weights, Weights)
    trace = trace_of(setup, faulty)
    found = find(Trace(replace(trace.origin, arithmetic="exact float32"), trace.taps), setup.weights)
    assert ([n.instance.fault.name for n in found.named], found.unexplained, found.level) == (["head-dim-half"], (), 5)


def test_a_layer_that_was_not_run_is_named_from_the_stream(tmp_path: Path) -> None:
    """Nothing but l_out-1 of it is there: the same as l_out-0."""
    setup = setup_of(tmp_path, dtype="Q4_1")
    instance = next(i for i in instances(setup) if i.label == "layer-skipped (1)")
    faulty = instance.apply(setup)
    assert faulty is not None
    assert isinstance(setup.weights, Weights)
    trace = trace_of(setup, faulty)
    assert "attn_norm-1" not in trace.taps
    found = find(Trace(replace(trace.origin, arithmetic="exact float32"), trace.taps), setup.weights)
    assert found.taps == ("l_out-1",)
    assert [n.instance.label for n in found.named] == ["layer-skipped (1)"]
    assert found.level == 5
