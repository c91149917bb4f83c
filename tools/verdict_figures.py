"""Repeat on the bundled trained model the figures that were first computed on a toy with random weights, and on which the verdict rests.

    python -m tools.verdict_figures            a table on stdout, in Markdown: figure, value on the toy, value here, does it hold?

The toy: three layers, grouped key/value heads, random weights, float64.  Here: quantscope/data/demo-f16.gguf on 128 tokens of
quantscope/data/demo.txt.  Every figure is computed from the definition that stands beside it; nothing is fitted.  Half a minute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quantscope.cli.demo import MODEL, TEXT, bundled
from quantscope.diagnose.activation_rounding import BLOCKS
from quantscope.fingerprint import estimate_nmse, fingerprint
from quantscope.images import Images, Requantized
from quantscope.metrics import mean, nmse, rms
from quantscope.model import ops
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.forward import KVCache, forward
from quantscope.model.taps import READ_BY, Recorder
from quantscope.qtypes import QTYPES
from quantscope.quants.activations import round_activations
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import from_source
from quantscope.weights import Weights
from tools.attention_faults import BLIND, SEEN, ByHand, OtherRope, OverQueries, StaleCache, ZeroCache, interchanged

N_TOKENS = 128
STEPS = 12 * 127**2  # error variance of a step max/127: max²/STEPS, ε = c²/193,548
ROWS = 2048  # of 256 random values
Taps: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Figure:
    """One line of the table.  holds: "yes", or what is different."""

    what: str
    toy: str
    here: str
    holds: str


# ---- The model ----------------------------------------------------------------------------------------------------------


@cache
def model() -> Weights:
    return Weights(open_source(bundled(MODEL)), keep=True)


@cache
def text_ids() -> tuple[int, ...]:
    words = from_source(model().source).encode(Path(bundled(TEXT)).read_text("utf-8")[: 8 * N_TOKENS])
    return tuple(words[:N_TOKENS])


def taps(ids: tuple[int, ...], arithmetic: Arithmetic = EXACT, dtype: torch.dtype = torch.float32) -> Taps:
    """Every tap of these ids, [T,channels]."""
    recorder = Recorder()
    forward(torch.tensor([ids]), model(), recorder, dtype=dtype, arithmetic=arithmetic)
    return {name: x[0] for name, x in recorder.taps.items() if "kq_soft_max" not in name}


@cache
def exact() -> Taps:
    return taps(text_ids())


@cache
def quantized() -> Taps:
    """The same by the file in Q4_0, computed exactly: errors of a real kind."""
    w, recorder = model(), Recorder()
    matrices = [n for n in w.names() if len(w.shape(n)) == 2]
    forward(torch.tensor([text_ids()]), Requantized(Images(w), dict.fromkeys(matrices, QTYPES["Q4_0"])), recorder)
    return {name: x[0] for name, x in recorder.taps.items() if "kq_soft_max" not in name}


def error(ref: Tensor, test: Tensor) -> float:
    return float(nmse(ref.flatten(), test.flatten()))


def largest(ref: Taps, test: Taps, stem: str) -> float:
    """The largest error of a tap over all layers."""
    return max(error(ref[name], test[name]) for name in ref if name.partition("-")[0] == stem)


# ---- Rounding -----------------------------------------------------------------------------------------------------------


def rounded(x: Tensor, kind: str) -> Tensor:
    """x [T,K] after Q8_0 or Q8_K, as ggml rounds activations."""
    a = round_activations(np.ascontiguousarray(x.float().numpy()), kind)
    codes, scales = a.codes[: len(x)].astype(np.float64), a.scales[: len(x)].astype(np.float64)
    return torch.from_numpy(codes * np.repeat(scales, BLOCKS[kind], axis=1))


def predicted(x: Tensor, kind: str) -> float:
    """c²/193,548 · (B−1)/B with c² = mean(block max²) / mean(x²)."""
    B = BLOCKS[kind]
    peaks = x.double().reshape(-1, B).abs().amax(-1).square().mean()
    return float(peaks / x.double().square().mean() / STEPS) * (B - 1) / B


def random_data() -> dict[str, Tensor]:
    """[ROWS,256] float32 of each distribution; the spike is alone in its block of 32, or of 256."""
    g = torch.Generator().manual_seed(0)
    shape = (ROWS, 256)
    normal = torch.randn(shape, generator=g)
    uniform, other = torch.rand(shape, generator=g) * 2 - 1, torch.rand(shape, generator=g)
    laplace = torch.where(other < 0.5, 1.0, -1.0) * -torch.log1p(-torch.rand(shape, generator=g))
    return {"uniform": uniform, "Gaussian": normal, "Laplace": laplace}


def spikes(kind: str) -> Tensor:
    """One value 100 times the rest in every block."""
    x = torch.randn(ROWS, 256, generator=torch.Generator().manual_seed(1))
    x[:, :: BLOCKS[kind]] = 100.0
    return x


TOY_EPSILON = {
    ("uniform", "Q8_0"): 1.4e-5,
    ("uniform", "Q8_K"): 1.5e-5,
    ("Gaussian", "Q8_0"): 2.9e-5,
    ("Gaussian", "Q8_K"): 4.9e-5,
    ("Laplace", "Q8_0"): 4.5e-5,
    ("Laplace", "Q8_K"): 1.0e-4,
    ("spike", "Q8_0"): 1.6e-4,
    ("spike", "Q8_K"): 1.3e-3,
}


def rounding_errors() -> Iterator[Figure]:
    """ε of rounding, by the formula and measured; on real activations, where the formula holds and where it is only a bound."""
    for (name, kind), toy in TOY_EPSILON.items():
        x = spikes(kind) if name == "spike" else random_data()[name]
        measured = error(x.double(), rounded(x, kind))
        yield Figure(f"ε of {kind}, {name}", sci(toy), f"{sci(measured)} (formula {sci(predicted(x, kind))})", holds(toy, measured, 1.1))
    inputs = {name: x for name, x in exact().items() if name.partition("-")[0] in READ_BY}
    for kind in BLOCKS:
        if kind == "Q8_1":
            continue  # as Q8_0
        measured_by_tap = {name: error(x.double(), rounded(x, kind)) for name, x in inputs.items()}
        ratios = {name: m / predicted(inputs[name], kind) for name, m in measured_by_tap.items()}
        low = [f"{name} {r:.2f}" for name, r in ratios.items() if r < 0.9]
        yield Figure(
            f"ε of {kind} at the {len(inputs)} taps that products read: measured / formula",
            "1",
            f"median {median(ratios.values()):.3f}, at most {max(ratios.values()):.2f}; below 0.9: {', '.join(low) or 'none'}; "
            f"ε {span(list(measured_by_tap.values()))}",
            "yes" if 0.9 < median(ratios.values()) < 1.1 and not low else "an upper bound where a few values are huge",
        )


def beside_a_spike() -> Iterator[Figure]:
    """The rest of a block beside a spike of A·σ: ε = A²/193,548 while a step is below σ; above, only values over A/254 · σ are left."""
    for A, toy in ((100.0, 100**2 / STEPS), (254.0, 254**2 / STEPS), (400.0, 1.0)):
        x = torch.randn(ROWS, 256, generator=torch.Generator().manual_seed(2))
        x[:, 0] = A
        found = error(x[:, 1:].double(), rounded(x, "Q8_K")[:, 1:])
        said = f"{toy:.2g}" if A < 300 else "1 (vanishes above 254)"
        yield Figure(f"ε of the rest of a Q8_K block beside a spike of {A:g} σ", said, f"{found:.3f}", holds(toy, found, 1.15))


def after_a_product() -> Iterator[Figure]:
    """Var(yᵢ) = Σ_blocks d²/12 · Σ_{j∈block} W²ᵢⱼ against the measured error of real products."""
    ratios, w = [], model()
    for name, x in exact().items():
        stem, _, layer = name.partition("-")
        for product in READ_BY.get(stem, ()):
            W = w.get(f"blk.{layer}.{product}.weight" if layer else f"{product}.weight").double()  # [out,K]
            for kind, B in (("Q8_0", 32), ("Q8_K", 256)):
                steps = x.double().reshape(len(x), -1, B).abs().amax(-1) / 127  # [T,K/B]
                variance = (steps.square() / 12) @ W.square().reshape(len(W), -1, B).sum(-1).T  # [T,out]
                ratios.append(float(((x.double() - rounded(x, kind)) @ W.T).square().sum() / variance.sum()))
    inside = sum(0.95 < r < 1.05 for r in ratios)
    text = f"median {median(ratios):.3f}, {min(ratios):.2f} … {max(ratios):.2f}; {inside} of {len(ratios)} within 5 %"
    kept = "yes" if inside == len(ratios) else "but where rounding is only bounded, see above"
    yield Figure("error of a product with rounded activations: measured / formula", "within 5 %", text, kept)


def huge_channel() -> Iterator[Figure]:
    """One channel 300 times the rest, its weights 300 times smaller, rounded in blocks of 256."""
    found, w = [], model()
    for i in range(w.config.n_layer):
        x, W = exact()[f"ffn_norm-{i}"].double().clone(), w.get(f"blk.{i}.ffn_up.weight").double().clone()
        W[:, 7] *= float(x[:, 7].abs().mean() / (300 * rms(x.flatten())))
        x[:, 7] = 300 * rms(x.flatten()) * x[:, 7].sign()
        found.append(error(x @ W.T, rounded(x, "Q8_K") @ W.T))
    text = f"{span(found)} in {len(found)} layers"
    yield Figure("ε after a product, one channel 300 times the rest, Q8_K", "5e-2", text, holds(5e-2, median(found), 2))


def float_types() -> Iterator[Figure]:
    for name, dtype, toy in (("F16", torch.float16, 4e-8), ("BF16", torch.bfloat16, 2.8e-6)):
        found = [error(x, x.to(dtype).float()) for tap, x in exact().items() if tap.partition("-")[0] in READ_BY]
        yield Figure(f"ε of rounding to {name}", sci(toy), span(found), holds(toy, median(found), 1.5))


def flipped_roundings() -> Iterator[Figure]:
    """Inputs that differ by ε round to codes that differ now and then by one."""
    x = exact()["ffn_norm-4"].double()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * rms(x.flatten())
    for eps, toy in ((1e-14, 1e-9), (1e-10, 1.5e-7)):
        moved = codes_of(x + math.sqrt(eps) * noise)
        found = error(codes_of(x), moved)
        yield Figure(f"inputs {sci(eps)} apart, after rounding to Q8_0", sci(toy), sci(found), holds(toy, found, 4))


def codes_of(x: Tensor) -> Tensor:
    """Q8_0 in float64, so that inputs 1e-14 apart are still different."""
    blocks = x.reshape(-1, 32)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return (blocks / step).round() * step


# ---- What one token, and one repeated token, can show -------------------------------------------------------------------


def one_token() -> Iterator[Figure]:
    """With one token attention returns v, whatever q, k, RoPE, scale, mask and axis are."""
    ids = text_ids()[5:6]
    right = taps(ids)["result_output"]
    written_out = taps(ids, ByHand())["result_output"]
    change = {
        name: float(((written_out if isinstance(m, ByHand) else right) - taps(ids, m)["result_output"]).abs().max())
        for name, m in (BLIND | SEEN).items()
    }
    silent = [name for name in BLIND if change[name] == 0]
    rest = [f"{name} {sci(change[name])}" for name in BLIND if change[name]]
    yield Figure(
        "one token: change of the logits by faults of q, k, RoPE, scale, mask, axis",
        "exactly 0",
        f"exactly 0 for {len(silent)} of {len(BLIND)}{''.join('; ' + r for r in rest)}",
        "yes" if not rest else "no",
    )
    shown = ", ".join(f"{name} {change[name]:.2g}" for name in SEEN)
    seen = "yes" if all(change[name] > 0.1 for name in SEEN) else "no"
    yield Figure("one token: the same for faults of v and FFN", "visible", f"largest change of a logit: {shown}", seen)


def decoded(ids: tuple[int, ...], cells: KVCache) -> Tensor:
    """Logits [T,V], token by token."""
    return torch.cat([forward(torch.tensor([[i]]), model(), cache=cells)[0] for i in ids])


def spread(rows: Tensor) -> float:
    """The largest error of a row against the first."""
    return max(error(rows[0], row) for row in rows[1:])


def repeated_token() -> Iterator[Figure]:
    """One token repeated, without BOS: every row must be the same, whatever the weights."""
    ids = (text_ids()[5],) * 16
    right = spread(taps(ids)["result_output"])
    yield Figure("16 times one token: largest ε between rows, right engine", "identical", sci(right), "yes" if right < 1e-10 else "no")
    blind = max(spread(taps(ids, m)["result_output"]) for name, m in BLIND.items() if name != "softmax over queries")
    yield Figure("… with the same faults but the axis", "blind", f"at most {sci(blind)}", "yes" if blind < 1e-10 else "no")
    for what, toy, found in (
        ("softmax over queries", 1.3, spread(taps(ids, OverQueries())["result_output"])),
        ("lost cache (cells are zeros), step by step", 1.8, spread(decoded(ids, ZeroCache()))),
    ):
        yield Figure(f"… {what}", f"{toy:g}", f"{found:.2g} (logits)", "yes" if found > 1e-3 else "no")
    stale = spread(decoded(ids, StaleCache()))
    verdict = "this probe is blind to it" if stale < 1e-10 else "this probe shows it"
    yield Figure("… stale cache (a step sees itself only), step by step", "not computed", sci(stale), verdict)


# ---- Rotation -----------------------------------------------------------------------------------------------------------


def rotations() -> Iterator[Figure]:
    ids, right = text_ids(), exact()
    half = taps(ids, OtherRope(interchanged))
    sizes = [abs(float(rms(half[n].flatten()) / rms(x.flatten())) - 1) for n, x in right.items() if n.startswith("l_out")]
    found = largest(right, half, "l_out")
    logits = error(right["result_output"], half["result_output"])
    yield Figure("wrong RoPE layout: largest ε of a layer's output", "6e-2", f"{sci(found)}; logits {sci(logits)}", holds(6e-2, found, 2))
    yield Figure("… its RMS changes by at most", "3 %", f"{100 * max(sizes):.1f} %", holds(3, 100 * max(sizes), 1.1))
    far = OtherRope(lambda c: replace(c, theta=500000.0))
    for n, toy in ((2, 5e-5), (16, 0.27)):
        a, b = taps(ids[:n]), taps(ids[:n], far)
        inside, logits = largest(a, b, "kqv_out"), error(a["result_output"], b["result_output"])
        where = "distance 1" if n == 2 else "16 tokens"
        text = f"{sci(inside)} (kqv_out), {sci(logits)} (logits)"
        held = "between the two" if logits <= toy <= inside else holds(toy, inside, 2)
        yield Figure(f"theta 500,000 for 10,000: largest ε, {where}", sci(toy), text, held)
    a, b = (taps(ids[:16], m, torch.float64) for m in (EXACT, OtherRope(at=lambda p: p + 1)))
    yield Figure(
        "positions +1 on q and k: ε of outputs (float64)",
        "1e-31",
        f"{sci(largest(a, b, 'kqv_out'))}; of Qcur {sci(largest(a, b, 'Qcur'))}",
        "yes" if largest(a, b, "kqv_out") < 1e-25 else "no",
    )


# ---- Norms and activation functions -------------------------------------------------------------------------------------


def norms() -> Iterator[Figure]:
    """LayerNorm for RMSNorm: 2 − 2·√(1 − (mean/RMS)²) ≈ (mean/RMS)²."""
    w, ratios, found = model(), [], []
    for i in range(w.config.n_layer):
        x, gain = stream(i), w.get(f"blk.{i}.attn_norm.weight").double()
        right = ops.rms_norm(x, gain, w.config.norm_eps)
        found.append(error(right, ops.rms_norm(x - x.mean(-1, keepdim=True), gain, w.config.norm_eps)))
        ratios.append(found[-1] / float((mean(x) / rms(x)).square().mean()))
    text = f"measured / formula {min(ratios):.2f} … {max(ratios):.2f}; ε {span(found)}"
    yield Figure("LayerNorm for RMSNorm: ε ≈ (mean/RMS)²", "1e-3 and 1e-4 by the formula", text, holds(1, median(ratios), 1.1))


def stream(i: int) -> Tensor:
    """The input of layer i, float64."""
    return (exact()[f"l_out-{i - 1}"] if i else exact()["embd"]).double()


def epsilons() -> Iterator[Figure]:
    """eps 1e-6 for 1e-5 changes the size by √((RMS² + 1e-5) / (RMS² + 1e-6)) − 1."""
    for r, toy in ((0.0093, 0.05), (0.10, 0.0004)):
        change = gain(r)
        yield Figure(f"eps 1e-6 for 1e-5 at an RMS of {r:g}", percent(toy), f"{percent(change)} (formula)", holds(toy, change, 1.2))
    one = torch.ones(model().config.n_embd, dtype=torch.float64)
    for i in (0, model().config.n_layer - 1):
        rows = stream(i)
        at = float(rms(rows).median())
        row = rows[int((rms(rows) - at).abs().argmin())]
        change = float(rms(ops.rms_norm(row, one, 1e-6)) / rms(ops.rms_norm(row, one, 1e-5))) - 1
        text = f"{percent(change)} at an RMS of {at:.2g}"
        yield Figure(f"… at the input of layer {i}", f"{percent(gain(at))} (formula)", text, holds(gain(at), change, 1.1))


def gain(r: float) -> float:
    return math.sqrt((r * r + 1e-5) / (r * r + 1e-6)) - 1


def gelu() -> Iterator[Figure]:
    found = []
    for i in range(model().config.n_layer):
        gate, up = exact()[f"ffn_gate-{i}"].double(), exact()[f"ffn_up-{i}"].double()
        found.append(error(F.gelu(gate) * up, F.gelu(gate, approximate="tanh") * up))
    yield Figure("GELU by erf against tanh: largest ε", "4e-8", f"{sci(max(found))}", holds(4e-8, max(found), 1.1))


# ---- Statistics and fingerprints ----------------------------------------------------------------------------------------


def statistics() -> Iterator[Figure]:
    """ΔRMS/RMS = ρ√ε + ε/2 with ρ the cosine of error and signal; and what 16 sums of random signs tell."""
    off, sharp = [], []
    for name, x in exact().items():
        a, b = x.double().flatten(), quantized()[name].double().flatten()
        e = b - a
        eps, rho = float(e.square().sum() / a.square().sum()), float((e @ a) / (e.norm() * a.norm()))
        change = float(rms(b) / rms(a)) - 1
        off.append(abs(change - (rho * math.sqrt(eps) + eps / 2)) / math.sqrt(eps))
        sharp.append(estimate_nmse(fingerprint(x), fingerprint(quantized()[name])) / eps)
    text = f"median {sci(median(off))}, at most {sci(max(off))} ({len(off)} taps)"
    yield Figure("ΔRMS/RMS ≈ ρ√ε + ε/2: off by, in units of √ε", "≪ 1", text, "yes" if max(off) < 0.05 else "no")
    s = torch.tensor(sharp)
    text = f"{float(s.mean()):.2f} ± {percent(float(s.std()))} ({len(s)} taps)"
    yield Figure("16 sums of random signs: estimated / true ε", "1 ± 35 %", text, holds(0.35, float(s.std()), 1.2))
    x = torch.randn(4096, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 0.0019
    printed = error(x, (x * 1e4).round() / 1e4)
    yield Figure("printing four decimals at an RMS of 0.0019: q²/(12·RMS²)", "2e-4", sci(printed), holds(2e-4, printed, 1.2))


# ---- Table --------------------------------------------------------------------------------------------------------------


def sci(x: float) -> str:
    """Two significant digits: ``1.4e-5``, and 0 as it is."""
    if x == 0:
        return "0"
    mantissa, exponent = f"{x:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def span(values: list[float]) -> str:
    return f"{sci(min(values))} … {sci(max(values))}"


def percent(x: float) -> str:
    return f"{100 * x:.2g} %"


def holds(toy: float, here: float, factor: float) -> str:
    """Whether two figures are within a factor of each other; else how many times larger it is here."""
    return "yes" if toy / factor <= here <= toy * factor else f"{here / toy:.2g} times"


PARTS = (
    rounding_errors,
    beside_a_spike,
    after_a_product,
    huge_channel,
    float_types,
    flipped_roundings,
    one_token,
    repeated_token,
    rotations,
    norms,
    epsilons,
    gelu,
    statistics,
)


@torch.no_grad()
def figures() -> list[Figure]:
    return [figure for part in PARTS for figure in part()]


def table(rows: list[Figure]) -> str:
    """The figures in Markdown."""
    lines = ["| figure | toy | demo model | holds? |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.what} | {r.toy} | {r.here} | {r.holds} |" for r in rows)])


if __name__ == "__main__":
    print(table(figures()))
