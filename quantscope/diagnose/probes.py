"""Runs of an engine on few tokens, cheapest first, so that each adds one thing that can be wrong; three of them need no reference.

    run_probes(Request("llama.cpp", model, ()), tokens)  →  one ProbeResult for each row of PROBES

    one-token     at position 0 attention returns v: q, k, RoPE, scale, mask and cache change nothing
    repeated      all values are equal, so all rows are:            error of a tap = NMSE(its first row, its rows)
                  (not with positions in the stream or with sinks: there against a reference)
    prefix        what follows changes nothing before:              NMSE(rows of the whole text, the prefix run alone)
    decode        token by token over the cache as in one batch:    NMSE(rows of the batch, rows of the steps)

    floor of a tap = EXACT_FLOOR + PREDICTED_TIMES · NMSE(exact, emulated arithmetic of the engine), as ``compare`` has it

Two runs of an honest engine round in different places (llama.cpp has other kernels for one row than for many), but neither is farther
from exact than its arithmetic.  Emulating both runs would show less: emulated rows do not depend on what is beside them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from quantscope.compare import EXACT_FLOOR
from quantscope.engines import Request, check
from quantscope.engines.isolated import run_several
from quantscope.errors import QuantscopeError
from quantscope.golden.record import batch, tolerances
from quantscope.language import mark
from quantscope.metrics import nmse
from quantscope.model.arithmetic import Arithmetic
from quantscope.model.bf16_arithmetic import Bf16Arithmetic
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.model.taps import graph_order, stem_of
from quantscope.sources.base import Source
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import check_ids, from_source
from quantscope.trace import Full, Trace
from quantscope.weights import Weights

Name: TypeAlias = Literal["one-token", "two-tokens", "repeated", "text", "prefix", "decode"]
Conclusion: TypeAlias = Literal["agrees", "differs", "not judged", "failed"]
Taps: TypeAlias = Mapping[str, Tensor]

N_REPEATED = 4  # as the probe says
TURNED = ("Qcur", "Kcur", "Qcur_latent", "Kcur_latent")  # differ from position to position by RoPE
TURNED_THEN_NORMED = (*TURNED, "Qcur_normed", "Kcur_normed")
MAPS = "kq_soft_max"  # rows grow from position to position

# faults of the catalogue that change no output (layer output, logits) of a run, whatever the weights
_ROPE = ("layout", "theta", "offset", "offset-q", "offset-k", "missing", "stuck", "missing-k", "missing-q", "reversed")
_NO_PAST = (
    *(f"rope-{name}" for name in (*_ROPE, "factors-ignored", "scaling-ignored")),
    *(f"mask-{name}" for name in ("missing", "next", "self")),
    *(f"scale-{name}" for name in ("missing", "embd", "linear")),
    "softmax-queries",
    "q-norm-ignored",
)
_CACHE = ("cache-stale", "cache-off-by-one")
_RELATIVE = ("rope-offset",)  # on q and k alike: only Qcur and Kcur show it


@dataclass(frozen=True)
class Probe:
    """exercises: what is in the run.  blind_to: faults that change none of its outputs.  alone: what it shows without a reference."""

    name: Name
    exercises: str
    blind_to: tuple[str, ...]
    alone: str = ""


PROBES: tuple[Probe, ...] = (
    Probe(
        "one-token",
        mark("one token at position 0: the embedding, the norms, every product, the feed-forward and the head; attention returns v"),
        (*_NO_PAST, *_CACHE),
    ),
    Probe("two-tokens", mark("a second position: RoPE, the scale, the mask and a softmax over two keys"), (*_RELATIVE, *_CACHE)),
    Probe(
        "repeated",
        mark("one token 4 times: every value is the same, so attention returns it whatever its weights are"),
        tuple(name for name in (*_NO_PAST, *_CACHE) if name != "softmax-queries"),
        mark("all rows must be the same: a softmax over the wrong axis, weights that do not sum to 1, positions added to the stream"),
    ),
    Probe("text", mark("the prompt in one batch"), (*_RELATIVE, *_CACHE)),
    Probe(
        "prefix",
        mark("the beginning of the prompt alone, against the same positions of the whole"),
        (*_RELATIVE, *_CACHE),
        mark("tokens that follow must change nothing before them: the causal mask, a softmax over the wrong axis"),
    ),
    Probe(
        "decode",
        mark("the prompt token by token over the key/value cache"),
        (*_RELATIVE, "mask-missing", "mask-next"),
        mark("every step must be as in the batch: the cache, the positions of decoded tokens, the mask of the batch"),
    ),
)
BY_NAME: Mapping[str, Probe] = {probe.name: probe for probe in PROBES}


@dataclass(frozen=True)
class ProbeResult:
    """What a probe has shown.

    trace: for the comparison with a reference; None where the engine failed, and ``error`` says how.  nmse, floor, tap: of the tap nearest
    to its floor or farthest beyond; first: the first tap in the order of the graph that is beyond.  Both are None for probes that need a
    reference, whose conclusion is "not judged".  commands: what reproduces it.
    """

    probe: Probe
    tokens: tuple[int, ...]
    trace: Trace | None
    conclusion: Conclusion
    commands: tuple[str, ...]
    nmse: float | None = None
    floor: float | None = None
    tap: str | None = None
    first: str | None = None
    error: str = ""


def run_probes(request: Request, tokens: Sequence[int], names: Iterable[str] | None = None) -> list[ProbeResult]:
    """Run the probes of a prompt, those of ``names`` or all that it is long enough for.

    request: engine, model and options; its own tokens and ``fingerprint`` do not count.  A foreign engine runs in a process of its own,
    started once.  Raises UsageError for options the engine does not have, PromptError for ids that are no tokens, and what opening the
    model raises; an engine that fails or dies is a result.
    """
    check(request)
    source = open_source(request.model)
    weights = Weights(source)
    ids = check_ids(tokens, weights.config.n_vocab, weights.config.n_ctx)
    plan = probe_tokens(source, ids, weights.config.n_vocab)
    wanted = [name for name in plan if names is None or name in set(names)]
    needed = [name for name in plan if name in wanted or (name == "text" and {"prefix", "decode"} & set(wanted))]
    made = dict(zip(needed, run_several([_request(request, name, plan[name]) for name in needed]), strict=True))
    judge = _Judge(weights, _arithmetic(request))
    return [_result(request, BY_NAME[name], plan, made, judge) for name in wanted]


def probe_tokens(source: Source, ids: Sequence[int], n_vocab: int) -> dict[str, tuple[int, ...]]:
    """Probe → its tokens, in the order of PROBES.  ``prefix`` and ``decode`` need a prompt of two tokens."""
    bos = _bos(source)
    plain = list(dict.fromkeys(i for i in ids if i != bos)) or [next(i for i in range(n_vocab) if i != bos)]
    second = plain[1] if len(plain) > 1 else next(i for i in range(n_vocab) if i not in (bos, plain[0]))
    plan = {"one-token": (plain[0],), "two-tokens": (plain[0], second), "repeated": (plain[0],) * N_REPEATED, "text": tuple(ids)}
    if len(ids) > 1:
        plan |= {"prefix": tuple(ids[: len(ids) // 2]), "decode": tuple(ids)}
    return plan


def _bos(source: Source) -> int | None:
    """BOS, whose activations are unlike any other token's; None where the file has no vocabulary to say."""
    try:
        return from_source(source).bos_id
    except QuantscopeError:
        return None


def _request(request: Request, name: str, tokens: tuple[int, ...]) -> Request:
    return replace(request, tokens=tokens, fingerprint=False, predict=False, steps=name == "decode")


def _arithmetic(request: Request) -> Arithmetic | None:
    """What emulates the engine's arithmetic; None where it is exact."""
    if request.engine == "llama.cpp" or request.arithmetic == "ggml":
        return ggml_arithmetic(request.kv)
    return Bf16Arithmetic() if request.dtype == "bfloat16" or request.arithmetic == "bf16" else None


# ---- Judging without a reference ---------------------------------------------------------------------------------------------


class _Judge:
    """The floors of a prompt's taps, computed once for each prompt."""

    def __init__(self, weights: Weights, emulated: Arithmetic | None) -> None:
        self._weights, self._emulated = weights, emulated
        self._known: dict[tuple[int, ...], Mapping[str, float]] = {}

    @property
    def rows_alike(self) -> bool:
        """Whether a token repeated gives rows that are the same: not where positions are added to the stream, nor with attention sinks,
        whose share of the scores falls from row to row."""
        layer_names = self._weights.layer_names(0)
        return "position_embd.weight" not in self._weights.top_names() and "attn_sinks.weight" not in layer_names

    @property
    def turned(self) -> tuple[str, ...]:
        """Taps that RoPE makes differ from row to row."""
        return TURNED if self._weights.config.block.qk_norm == "before" else TURNED_THEN_NORMED

    def floors(self, tokens: tuple[int, ...]) -> Mapping[str, float]:
        if tokens not in self._known:
            exact: Taps = {} if self._emulated is None else batch(self._weights, tokens)
            self._known[tokens] = {} if self._emulated is None else tolerances(exact, batch(self._weights, tokens, self._emulated))
        return self._known[tokens]


def _result(
    request: Request, probe: Probe, plan: Mapping[str, tuple[int, ...]], made: Mapping[str, Trace | QuantscopeError], judge: _Judge
) -> ProbeResult:
    tokens, trace = plan[probe.name], made[probe.name]
    plain = ProbeResult(probe, tokens, None, "failed", commands(request, probe.name, tokens, plan["text"]))
    if isinstance(trace, QuantscopeError):
        return replace(plain, error=str(trace))
    whole = made["text"] if probe.name in ("prefix", "decode") else trace
    if not probe.alone or isinstance(whole, QuantscopeError) or (probe.name == "repeated" and not judge.rows_alike):
        return replace(plain, trace=trace, conclusion="not judged")
    errors = own_errors(probe.name, _values(trace), _values(whole), judge.turned)
    floors = judge.floors(tokens)
    allowed = {tap: floors.get(tap, EXACT_FLOOR) for tap in errors}
    beyond = [tap for tap in errors if not errors[tap] <= allowed[tap]]  # NaN is beyond
    tap = max(errors, key=lambda t: errors[t] / allowed[t] if errors[t] == errors[t] else float("inf"), default=None)
    if tap is None:
        return replace(plain, trace=trace, conclusion="not judged")
    return replace(
        plain,
        trace=trace,
        conclusion="differs" if beyond else "agrees",
        commands=_with_floor(plain.commands, max(allowed.values())),
        nmse=errors[tap],
        floor=allowed[tap],
        tap=tap,
        first=min(beyond, key=graph_order, default=None),
    )


def _values(trace: Trace) -> Taps:
    return {tap: full.values for tap in trace.taps if not tap.startswith(MAPS) and (full := trace.find(tap, Full)) is not None}


def own_errors(name: str, taps: Taps, whole: Taps, turned: Sequence[str] = TURNED) -> dict[str, float]:
    """Tap → NMSE of a probe against itself or against the whole prompt: [T,channels] each.  turned: taps whose rows differ by RoPE."""
    if name == "repeated":
        return {tap: _nmse(x[:1].expand_as(x), x) for tap, x in taps.items() if stem_of(tap) not in turned}
    return {tap: _nmse(whole[tap][: len(x)], x) for tap, x in taps.items() if tap in whole}


def _nmse(ref: Tensor, test: Tensor) -> float:
    return 0.0 if torch.equal(ref, test) else float(nmse(ref.flatten(), test.flatten()))


# ---- Commands ----------------------------------------------------------------------------------------------------------------


def commands(request: Request, name: str, tokens: tuple[int, ...], text: tuple[int, ...]) -> tuple[str, ...]:
    """The command lines that reproduce a probe; what has no command of its own is in ``quantscope diagnose``."""
    ours, exact = f"{name}-{request.engine}.safetensors", f"{name}-exact.safetensors"
    traced = f"{_trace(request, tokens)}{' --steps' if name == 'decode' else ''} -o {ours}"
    if name == "decode":
        whole = f"text-{request.engine}.safetensors"
        return f"{_trace(request, text)} -o {whole}", traced, f"quantscope compare {whole} {ours}"
    if BY_NAME[name].alone:
        engine = f"--against {request.engine} --tokens {_ids(text)}"
        return traced, f"quantscope diagnose {shlex.quote(request.model)} {engine}"
    reference = f"quantscope trace {shlex.quote(request.model)} --tokens {_ids(tokens)} -o {exact}"
    return reference, traced, f"quantscope compare {exact} {ours}"


def _with_floor(given: tuple[str, ...], floor: float) -> tuple[str, ...]:
    """A comparison of two runs of one engine, with the largest floor of their taps: ``compare`` knows floors against a reference only."""
    return tuple(f"{c} --floor {floor:.2g}" if c.startswith("quantscope compare") else c for c in given)


def _trace(request: Request, tokens: Sequence[int]) -> str:
    default = Request(request.engine, request.model, ())
    options = [("arithmetic", request.arithmetic), ("dtype", request.dtype), ("kv", request.kv), ("threads", request.threads)]
    given = "".join(f" --{key} {value}" for key, value in options if value != getattr(default, key))
    return f"quantscope trace {shlex.quote(request.model)} --engine {request.engine} --tokens {_ids(tokens)}{given}"


def _ids(tokens: Sequence[int]) -> str:
    return ",".join(map(str, tokens))
