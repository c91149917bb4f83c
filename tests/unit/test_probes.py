"""Probes: what each is blind to, measured with the whole catalogue, and which of them notice a fault without any reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from quantscope.diagnose import probes
from quantscope.diagnose.faults import FAULTS, instances
from quantscope.diagnose.probes import BY_NAME, PROBES, ProbeResult, own_errors, probe_tokens, run_probes
from quantscope.diagnose.setup import Setup
from quantscope.diagnose.walk import Walker, walk
from quantscope.engines import Request
from quantscope.errors import EngineError, PromptError, QuantscopeError, UsageError
from quantscope.metrics import nmse
from quantscope.sources.resolve import open_source
from quantscope.trace import Full, Origin, Trace, full_trace
from quantscope.weights import Weights
from tests.hf_arch_models import make_hf_arch
from tests.models import STORIES, STORIES_PROMPT, make_gguf

ZERO = 1e-11  # NMSE of outputs that are the same but for the order of float32 sums
REQUEST = Request("reference", str(STORIES), ())
FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]


def outputs(base: Setup, of: Setup, every: bool = False) -> dict[str, torch.Tensor]:
    """Layer outputs and logits, or every tap, [1,T,channels]."""
    steps = walk(base, [Walker(of)], lambda tap: every or tap.startswith(("l_out", "result")))
    return {tap: x for step in steps for tap, x in step[0].items()}


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_what_a_probe_is_blind_to(arch: str, tmp_path: Path) -> None:
    """No fault of the list changes an output, and every fault of the catalogue that changes none is in the list."""
    path = make_gguf(tmp_path / "m.gguf", arch=arch, rope_freqs=FACTORS if arch == "llama" else None)
    source = open_source(path)
    weights = Weights(source)
    for name, ids in probe_tokens(source, [1, 270, 9, 30, 44], 288).items():
        base = Setup(weights, torch.tensor([ids]), n_prompt=1 if name == "decode" else None)
        right = outputs(base, base)
        moved: dict[str, float] = {}
        for instance in instances(base, []):
            wrong = instance.apply(base)
            if wrong is None or instance.fault.name == "bos-missing":
                continue
            made = outputs(base, wrong)
            error = max(float(nmse(x.flatten(), made[tap].flatten())) for tap, x in right.items())
            moved[instance.fault.name] = max(moved.get(instance.fault.name, 0.0), error)
        assert len(moved) > 30
        still = {fault for fault, error in moved.items() if error <= ZERO} - {"activations-clipped"}
        blind = set(BY_NAME[name].blind_to) & set(moved)
        # the catalogue's mask is that of one batch: that a decoding has no next token to see is not in it
        assert still == blind - ({"mask-next"} if name == "decode" else set()), name


def test_blind_faults_are_those_of_the_catalogue() -> None:
    known = {fault.name for fault in FAULTS}
    for probe in PROBES:
        assert set(probe.blind_to) <= known
    assert [p.name for p in PROBES] == ["one-token", "two-tokens", "repeated", "text", "prefix", "decode"]


# ---- Without a reference -----------------------------------------------------------------------------------------------------


def engine_with(name: str) -> Callable[[Sequence[Request]], list[Trace | QuantscopeError]]:
    """An engine that has a fault of the catalogue, in the place of ``run_several``."""
    weights = Weights(open_source(STORIES))

    def run_several(requests: Sequence[Request]) -> list[Trace | QuantscopeError]:
        made: list[Trace | QuantscopeError] = []
        for request in requests:
            base = Setup(weights, torch.tensor([request.tokens]), n_prompt=1 if request.steps else None)
            wrong = next((w for i in instances(base, []) if i.fault.name == name and (w := i.apply(base)) is not None), base)
            origin = Origin("planted", tokens=request.tokens)
            made.append(full_trace(origin, {tap: x[0] for tap, x in outputs(base, wrong, every=True).items()}))
        return made

    return run_several


def judged(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, ProbeResult]:
    monkeypatch.setattr(probes, "run_several", engine_with(name))
    return {r.probe.name: r for r in run_probes(REQUEST, STORIES_PROMPT)}


@pytest.mark.parametrize(
    ("fault", "differing", "first"),
    [
        ("none", set(), None),
        ("softmax-queries", {"repeated", "prefix"}, "kqv_out-0"),  # the catalogue has it for whole batches
        ("mask-missing", {"prefix", "decode"}, "kqv_out-0"),
        ("mask-next", {"prefix"}, "kqv_out-0"),
        ("cache-stale", {"decode"}, "kqv_out-0"),
        ("cache-off-by-one", {"decode"}, "kqv_out-0"),
        ("rope-theta", set(), None),  # wrong, but the same everywhere: a reference must judge it
        ("weight-transposed", set(), None),
        ("norm-layernorm", set(), None),
    ],
)
def test_what_shows_without_a_reference(fault: str, differing: set[str], first: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(fault, monkeypatch)
    assert {name for name, r in found.items() if r.conclusion == "differs"} == differing
    for name, r in found.items():
        alone = bool(r.probe.alone)
        assert (r.conclusion == "not judged") == (not alone)
        assert (r.nmse is None) == (r.floor is None) == (r.tap is None) == (not alone)
        assert r.first == (first if name in differing else None)
        if r.nmse is not None and r.floor is not None:
            assert (r.nmse > r.floor) == (name in differing)


def test_nan_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    run_right = engine_with("none")

    def run_several(requests: Sequence[Request]) -> list[Trace | QuantscopeError]:
        made = run_right(requests)
        for request, trace in zip(requests, made, strict=True):
            if request.steps:
                assert isinstance(trace, Trace)
                full = trace.find("l_out-2", Full)
                assert full is not None
                full.values[1, 3] = float("nan")
        return made

    monkeypatch.setattr(probes, "run_several", run_several)
    (decode,) = run_probes(REQUEST, STORIES_PROMPT, ["decode"])
    assert (decode.conclusion, decode.first, decode.tap) == ("differs", "l_out-2", "l_out-2")


def test_an_engine_that_fails_on_one_probe_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    run_right = engine_with("none")
    monkeypatch.setattr(
        probes,
        "run_several",
        lambda requests: [EngineError("died") if len(r.tokens) == 5 else t for r, t in zip(requests, run_right(requests), strict=True)],
    )
    found = {r.probe.name: r for r in run_probes(REQUEST, STORIES_PROMPT)}
    assert {name for name, r in found.items() if r.conclusion == "failed"} == {"text", "decode"}
    assert found["text"].error == "died"
    assert found["prefix"].conclusion == "not judged"  # nothing to hold it against
    assert found["prefix"].trace is not None
    assert found["repeated"].conclusion == "agrees"


def test_errors_are_the_formulas() -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 4.0]])
    assert own_errors("repeated", {"l_out-0": x, "Qcur-0": x}, {}) == {"l_out-0": pytest.approx(4 / 10)}
    assert own_errors("prefix", {"l_out-0": x[:1], "new": x}, {"l_out-0": x * 2}) == {"l_out-0": pytest.approx(5 / 20)}


# ---- Tokens and commands -----------------------------------------------------------------------------------------------------


def test_the_tokens_of_the_probes() -> None:
    source = open_source(STORIES)  # BOS is 1
    plan = probe_tokens(source, [1, 403, 403, 261], 512)
    assert plan == {
        "one-token": (403,),
        "two-tokens": (403, 261),
        "repeated": (403,) * 4,
        "text": (1, 403, 403, 261),
        "prefix": (1, 403),
        "decode": (1, 403, 403, 261),
    }
    only_bos = probe_tokens(source, [1], 512)
    assert set(only_bos) == {"one-token", "two-tokens", "repeated", "text"}
    assert 1 not in (*only_bos["one-token"], *only_bos["two-tokens"])
    assert len(set(only_bos["two-tokens"])) == 2


def test_commands_can_be_pasted() -> None:
    request = Request("llama.cpp", "my model.gguf", (), kv="F32", threads=2)
    text = (1, 5, 6)
    assert probes.commands(request, "one-token", (5,), text) == (
        "quantscope trace 'my model.gguf' --tokens 5 -o one-token-exact.safetensors",
        "quantscope trace 'my model.gguf' --engine llama.cpp --tokens 5 --kv F32 --threads 2 -o one-token-llama.cpp.safetensors",
        "quantscope compare one-token-exact.safetensors one-token-llama.cpp.safetensors",
    )
    whole, steps, compared = probes.commands(request, "decode", text, text)
    assert "--steps" not in whole
    assert "--steps" in steps
    assert compared == "quantscope compare text-llama.cpp.safetensors decode-llama.cpp.safetensors"
    assert probes.commands(request, "prefix", (1,), text)[-1].startswith(
        "quantscope diagnose 'my model.gguf' --against llama.cpp --tokens 1,5,6"
    )


def test_only_the_named_probes_and_what_is_refused() -> None:
    found = run_probes(REQUEST, STORIES_PROMPT, ["prefix", "one-token"])
    assert [r.probe.name for r in found] == ["one-token", "prefix"]
    assert found[1].conclusion == "agrees"
    with pytest.raises(PromptError):
        run_probes(REQUEST, [1, 100_000])
    with pytest.raises(PromptError):
        run_probes(REQUEST, [])
    with pytest.raises(UsageError):
        run_probes(Request("candle", str(STORIES), ()), STORIES_PROMPT)


@pytest.mark.parametrize(
    ("case", "conclusion"), [("gpt2", "not judged"), ("gpt_oss", "not judged"), ("hunyuan_v1_dense", "agrees"), ("bloom", "agrees")]
)
def test_rows_of_a_repeated_token_that_differ_and_are_right(case: str, conclusion: str, tmp_path: Path) -> None:
    """Positions in the stream and sinks: judged against the reference only.  q and k normed after RoPE differ, the other taps do not."""
    make_hf_arch(tmp_path, case)
    (found,) = run_probes(Request("reference", str(tmp_path), ()), (5, 17, 99, 3), ["repeated"])
    assert found.conclusion == conclusion
