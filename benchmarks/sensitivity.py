"""Predicted against measured sensitivity: every matrix in every type, alone, on the same tokens.

    python -m benchmarks.sensitivity [--model FILE] [--text FILE] [--chunks 16] [--ctx 256] [--types Q2_K,Q3_K] [--seeds 1] [--json FILE]

Measured: the mean KL divergence over all tokens with one matrix replaced; the layers before it are not run again, their result is kept.
Both are timed in one process (CPU seconds and wall), encoding included.  Spearman: rank correlation over all (tensor, type) pairs, and
within each type and each role.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import correlation, median

import torch
from torch import Tensor

from benchmarks.measure import machine
from quantscope.cli.demo import MODEL, TEXT, bundled
from quantscope.inputs import read_inputs
from quantscope.model.forward import embed, embedded, head, layer, tables
from quantscope.model.ops import exact_matmul
from quantscope.qtypes import QuantType, qtype
from quantscope.recipes import TensorShape, fallback, is_quantizable
from quantscope.remedy.sensitivity import place, predict, quantized, role
from quantscope.remedy.small_kl import small_kl
from quantscope.results import StudyOptions
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights

TYPES = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,Q8_0,Q4_0"
PART = 2048  # [tokens] that go through a layer at a time
MIN_SPEARMAN, MIN_RATIO = 0.9, 20

KL = Mapping[str, Mapping[str, float]]  # tensor → type → nats


@dataclass(frozen=True)
class Timed:
    """CPU seconds and wall seconds of a piece of work."""

    cpu: float
    wall: float


class Truth:
    """Runs the model with one matrix replaced, from the layer that has it."""

    def __init__(self, weights: Weights, ids: Tensor) -> None:
        self.weights, self.ids = weights, ids
        self.before = [embed(ids, weights)]  # hidden state before each layer, and after the last; [C,T,E] each
        self.rope = tables(self.before[0], weights)
        for i in range(weights.config.n_layer):
            self.before.append(self._layer(self.before[i], i, weights.layer(i)))
        self.top = dict(weights.top())
        self.logits = self._logits(self.before[-1], self.top)  # [C,T,V]

    def kl(self, name: str, values: Tensor) -> float:
        """Mean KL divergence in nats with ``values`` in place of a matrix."""
        top, first = dict(self.top), 0
        h = self.before[0]
        if name == "token_embd.weight":
            h = embedded(values[self.ids], self.weights)
        if name == self.weights.top_names()["output.weight"]:
            top["output.weight"] = values
        if name.startswith("blk."):
            first = int(place(name))
            changed = dict(self.weights.layer(first)) | {name.split(".", 2)[2]: values}
            h = self._layer(self.before[first], first, changed)
            first += 1
        elif name == "output.weight":
            h, first = self.before[-1], self.weights.config.n_layer
        for i in range(first, self.weights.config.n_layer):
            h = self._layer(h, i, self.weights.layer(i))
        parts = [small_kl(self.logits[p], head(h[p], top, self.weights.config)).double().sum() for p in self._parts()]
        return float(sum(parts)) / self.ids.numel()

    def _parts(self) -> Iterator[slice]:
        each = max(1, PART // self.ids.shape[1])
        return (slice(a, a + each) for a in range(0, len(self.ids), each))

    def _layer(self, h: Tensor, i: int, w: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([layer(h[p], w, i, self.weights.config, self.rope) for p in self._parts()])

    def _logits(self, h: Tensor, top: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([head(h[p], top, self.weights.config) for p in self._parts()])


def measure(weights: Weights, ids: Tensor, types: Sequence[QuantType], progress: Callable[[str], None] = lambda text: None) -> KL:
    """The measured KL divergence of every matrix in every type."""
    with torch.no_grad(), exact_matmul():
        truth = Truth(weights, ids)
        names = [n for n in weights.names() if is_quantizable(TensorShape(n, weights.shape(n)), weights.config.arch)]
        found: dict[str, dict[str, float]] = {}
        for k, name in enumerate(names):
            w = weights.get(name)
            found[name] = {t.name: truth.kl(name, quantized(w, fallback(t, w.shape[-1]))) for t in types}
            progress(f"{k + 1}/{len(names)} {name}")
    return found


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.process_time(), time.perf_counter()

    def read(self) -> Timed:
        return Timed(time.process_time() - self.start[0], time.perf_counter() - self.start[1])


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation of two lists without ties to speak of; NaN for fewer than three pairs."""

    def ranks(x: Sequence[float]) -> list[float]:
        return torch.tensor(x, dtype=torch.float64).argsort().argsort().tolist()

    return correlation(ranks(a), ranks(b)) if len(a) > 2 else math.nan


def pairs(predicted: KL, measured: KL, keep: Callable[[str, str], bool] = lambda name, t: True) -> tuple[list[float], list[float]]:
    """The pairs of (tensor, type) that both have and ``keep`` wants."""
    chosen = [(name, t) for name, row in measured.items() for t in row if t in predicted[name] and keep(name, t)]
    return [predicted[n][t] for n, t in chosen], [measured[n][t] for n, t in chosen]


def agreement(predicted: KL, measured: KL) -> dict[str, dict[str, float]]:
    """Group → Spearman, pairs, median of predicted / measured, and their spread (standard deviation of the log ratio)."""
    types = list(next(iter(measured.values())))
    groups: dict[str, Callable[[str, str], bool]] = {"all": lambda name, t: True}
    groups |= {t: lambda name, other, t=t: other == t for t in types}  # type: ignore[misc]
    groups |= {r: lambda name, t, r=r: role(name) == r for r in dict.fromkeys(map(role, measured))}  # type: ignore[misc]
    out = {}
    for group, keep in groups.items():
        a, b = pairs(predicted, measured, keep)
        logs = torch.tensor([math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0 and y > 0])
        ratio = median(x / y for x, y in zip(a, b, strict=True) if y > 0)
        out[group] = {"spearman": spearman(a, b), "pairs": len(a), "ratio": ratio, "spread": float(logs.std())}
    return out


def text_table(groups: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"{'group':14} {'pairs':>6} {'Spearman':>9} {'pred/meas':>10} {'spread of its log':>18}"]
    lines += [f"{g:14} {r['pairs']:6} {r['spearman']:9.3f} {r['ratio']:10.2f} {r['spread']:18.2f}" for g, r in groups.items()]
    return "\n".join(lines)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the bundled demo model")
    parser.add_argument("--text", type=Path, help="default: the bundled text")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--seeds", type=int, default=1, help="predictions, with other drawn labels each")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Result:
    """Predictions, one a seed, and what they are compared with; seconds of each."""

    predicted: tuple[KL, ...]
    predicting: tuple[Timed, ...]
    measured: KL
    measuring: Timed

    @property
    def groups(self) -> list[dict[str, dict[str, float]]]:
        return [agreement(p, self.measured) for p in self.predicted]

    @property
    def ratio(self) -> float:
        """How many times the CPU seconds of a prediction the measurement takes."""
        return self.measuring.cpu / max(t.cpu for t in self.predicting)


def show_progress(what: str) -> None:
    """On one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r{what:40}", end="", file=sys.stderr, flush=True)


def run(weights: Weights, ids: Tensor, types: Sequence[QuantType], n_seeds: int) -> Result:
    predict(weights, ids[:1], types)  # compiles the codecs
    predicted, predicting = [], []
    for seed in range(n_seeds):
        clock = Clock()
        predicted.append(predict(weights, ids, types, seed=seed).kl)
        predicting.append(clock.read())
    clock = Clock()
    measured = measure(weights, ids, types, show_progress)
    return Result(tuple(predicted), tuple(predicting), measured, clock.read())


def text_report(r: Result) -> str:
    lines = [text_table(r.groups[0])]
    for k, (t, groups) in enumerate(zip(r.predicting, r.groups, strict=True)):
        lines.append(
            f"seed {k}: Spearman {groups['all']['spearman']:.4f}; predicted in {t.cpu:.1f} CPU s ({t.wall:.1f} s), measured in "
            f"{r.measuring.cpu:.1f} CPU s ({r.measuring.wall:.1f} s): {r.measuring.cpu / t.cpu:.1f}x"
        )
    return "\n".join(lines)


def document(r: Result, ids: Tensor) -> dict[str, object]:
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "n_chunk": ids.shape[0],
        "n_ctx": ids.shape[1],
        "predicted": [{"cpu_s": t.cpu, "wall_s": t.wall, "kl": kl} for kl, t in zip(r.predicted, r.predicting, strict=True)],
        "measured": {"cpu_s": r.measuring.cpu, "wall_s": r.measuring.wall, "kl": r.measured},
        "agreement": r.groups,
    }


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    model, text = args.model or bundled(MODEL), args.text or bundled(TEXT)
    source = open_source(str(model))
    weights, types = Weights(source, keep=True), [qtype(name) for name in args.types.split(",")]
    options = StudyOptions(models=(str(model),), text=text, n_ctx=args.ctx, n_chunks=args.chunks)
    given = read_inputs(options, source, weights.config).text
    assert given is not None
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads")
    print(f"{model.name}, {len(given.ids)} chunks of {args.ctx} tokens, {args.types}", flush=True)
    result = run(weights, given.ids, types, args.seeds)
    print(text_report(result))
    if args.json:
        args.json.write_text(json.dumps(document(result, given.ids), indent=1) + "\n", "utf-8")
    worst = min(g["all"]["spearman"] for g in result.groups)
    good = worst >= MIN_SPEARMAN and result.ratio >= MIN_RATIO
    reached = "reached" if good else "NOT reached"
    print(f"{reached}: Spearman {worst:.3f} (target {MIN_SPEARMAN}), {result.ratio:.1f}x less CPU time (target {MIN_RATIO}x)")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
