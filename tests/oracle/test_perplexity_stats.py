"""Statistics of the logits, from llama.cpp's own logits: beside plain numpy, and beside what llama-perplexity printed for the same run.

Recorded with the programs of the llama.cpp that llama-cpp-python 0.3.36 carries, AVX2, the stories260K test model and the bundled text:

    llama-quantize stories260K-f32.gguf q4_0.gguf Q4_0
    llama-perplexity -m stories260K-f32.gguf -f demo.txt $OPTIONS --kl-divergence-base base.kld
    llama-perplexity -m q4_0.gguf -f demo.txt $OPTIONS --kl-divergence-base base.kld --kl-divergence
    OPTIONS="-c 256 --chunks 8 -ctk f32 -ctv f32 -fa off"

The file base.kld is not the original's logits: log-probabilities come in 65,536 steps that end 16 below the largest.  ``Stored`` repeats
that, and their KL divergence, so that every digit can be compared; what it does to the exact divergence is a test of its own.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantscope.arch.read import read_config
from quantscope.engines.llama_session import LlamaSession
from quantscope.inputs import read_inputs
from quantscope.logit_stats import logit_stats
from quantscope.logit_sums import LogitSums
from quantscope.results import LogitStats, StudyOptions
from quantscope.sources.gguf import open_gguf
from quantscope.study import run_study
from tests.oracle.ggml_cpu import SAME_ORDER
from tests.oracle.llama_quant import quantized_types

ROOT = Path(__file__).resolve().parents[2]
MODEL, TEXT = ROOT / "tests" / "data" / "stories260K-f32.gguf", ROOT / "quantscope" / "data" / "demo.txt"
N_CTX, N_CHUNKS = 256, 8
LOWEST, STEPS = 16, 65_535  # of the file with the base's log-probabilities
REL = 1e-3 if SAME_ORDER else 1e-2  # on another machine an activation that lies between two Q8_0 codes may get the other one

BASE_PPL = (43.0315, 31.5932, 26.9126, 29.1451, 33.3767, 31.2036, 31.7536, 31.2668)  # of the first 1, 2, ... chunks
PRINTED = """
Mean PPL(Q)                   :  33.932427 ±   3.037521
Mean PPL(base)                :  31.165491 ±   2.730790
Cor(ln(PPL(Q)), ln(PPL(base))):  96.82%
Mean ln(PPL(Q)/PPL(base))     :   0.085060 ±   0.022412
Mean PPL(Q)/PPL(base)         :   1.088782 ±   0.024402
Mean PPL(Q)-PPL(base)         :   2.766936 ±   0.788347
Mean    KLD:   0.129987 ±   0.006009
Maximum KLD:   2.617922
99.9%   KLD:   1.625421
99.0%   KLD:   0.865168
95.0%   KLD:   0.433982
90.0%   KLD:   0.304486
Median  KLD:   0.072191
10.0%   KLD:   0.010573
 5.0%   KLD:   0.004235
 1.0%   KLD:   0.000270
 0.1%   KLD:   0.000047
Minimum KLD:   0.000040
Mean    Δp: -0.767 ± 0.230 %
Maximum Δp: 43.106%
99.9%   Δp: 42.266%
99.0%   Δp: 22.842%
95.0%   Δp:  5.717%
90.0%   Δp:  3.655%
75.0%   Δp:  0.477%
Median  Δp: -0.027%
25.0%   Δp: -1.058%
10.0%   Δp: -5.981%
 5.0%   Δp: -10.968%
 1.0%   Δp: -31.424%
 0.1%   Δp: -55.899%
Minimum Δp: -57.515%
RMS Δp    :  7.370 ± 0.514 %
Same top p: 77.067 ± 1.320 %
"""
QUANTILES = {"Maximum": "max", "99.9%": "p999", "99.0%": "p99", "95.0%": "p95", "90.0%": "p90", "75.0%": "p75", "Median": "median"} | {
    "25.0%": "p25", "10.0%": "p10", "5.0%": "p05", "1.0%": "p01", "0.1%": "p001", "Minimum": "min"
}  # fmt: skip
FIELDS = {
    "Mean PPL(Q)": "ppl",
    "Cor(ln(PPL(Q)), ln(PPL(base)))": "ln_ppl_cor",
    "Mean ln(PPL(Q)/PPL(base))": "ln_ppl_ratio",
    "Mean PPL(Q)/PPL(base)": "ppl_ratio",
    "Mean PPL(Q)-PPL(base)": "ppl_diff",
    "Mean KLD": "kl_nats",
    "Mean Δp": "dp_mean",
    "RMS Δp": "rms_dp",
    "Same top p": "top1_agree",
} | {f"{theirs} {what}": f"{prefix}_{ours}" for what, prefix in (("KLD", "kl_nats"), ("Δp", "dp")) for theirs, ours in QUANTILES.items()}


@dataclass(frozen=True)
class Run:
    """Logits of both models at the scored positions, float32 [C,P,V], and the tokens that follow, [C,P]."""

    base: NDArray[np.float32]
    quantized: NDArray[np.float32]
    labels: NDArray[np.int64]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    source = open_gguf(MODEL)
    text = read_inputs(StudyOptions((str(MODEL),), text=TEXT, n_ctx=N_CTX, n_chunks=N_CHUNKS), source, read_config(source)).text
    assert text is not None
    q4_0 = tmp_path_factory.mktemp("q4_0") / "q4_0.gguf"
    assert quantized_types(MODEL, q4_0, "Q4_0")
    both = []
    for path in (MODEL, q4_0):
        with LlamaSession(path, n_ctx=N_CTX) as llama:
            both.append(np.stack([llama.decode(row)[text.first : text.last] for row in text.ids.tolist()]))
    return Run(*both, text.ids.numpy()[:, text.first + 1 :])


def log_softmax(x: NDArray[Any]) -> NDArray[np.float64]:
    moved = x.astype(np.float64) - x.max(-1, keepdims=True)
    return moved - np.log(np.exp(moved).sum(-1, keepdims=True))


def at_labels(log_p: NDArray[np.float64], run: Run) -> NDArray[np.float64]:
    return np.take_along_axis(log_p, run.labels[..., None], -1)[..., 0]


def streamed(run: Run) -> LogitSums:
    """Both models' logits, 100 ids at a time."""
    members = [torch.from_numpy(x.reshape(-1, x.shape[-1])) for x in (run.base, run.quantized)]
    sums = LogitSums(len(members[0]), 2, labels=torch.from_numpy(run.labels.ravel()), has_reference=True)
    for v0 in range(0, members[0].shape[-1], 100):
        sums.add(v0, [x[:, v0 : v0 + 100] for x in members])
    return sums


def ours(run: Run) -> LogitStats:
    def shaped(x: torch.Tensor) -> NDArray[Any]:
        return x.numpy().reshape(run.labels.shape)

    s = streamed(run)
    return logit_stats(
        n_positions=run.labels.size,
        kl=shaped(s.kl[1]),
        same_top=shaped(s.same_top[1]),
        log_p=shaped(s.log_p[1]),
        ref_log_p=shaped(s.log_p[0]),
    )


class Stored:
    """What llama-perplexity makes of a run: the base's log-probabilities as its file holds them, and KL divergence from those."""

    def __init__(self, run: Run) -> None:
        largest, smallest = run.base.max(-1, keepdims=True), run.base.min(-1, keepdims=True)
        smallest = np.maximum(smallest, largest - np.float32(LOWEST))
        step = (largest - smallest) / np.float32(STEPS)
        codes = np.rint(np.maximum(run.base - smallest, 0) / step)
        lse = np.log(np.exp(run.base.astype(np.float64) - largest).sum(-1, keepdims=True)).astype(np.float32)
        self.log_p = (step * codes + (smallest - largest - lse)).astype(np.float64)
        counted = np.where(self.log_p > -LOWEST, np.exp(self.log_p) * (self.log_p - log_softmax(run.quantized)), 0)
        self.kl = counted.sum(-1)
        self.stats = logit_stats(
            n_positions=run.labels.size,
            kl=self.kl,
            same_top=run.base.argmax(-1) == run.quantized.argmax(-1),
            log_p=at_labels(log_softmax(run.quantized), run),
            ref_log_p=at_labels(self.log_p, run),
        )
        self.base = logit_stats(n_positions=run.labels.size, log_p=at_labels(self.log_p, run))


def printed() -> dict[str, list[tuple[float, float]]]:
    """Name → value, and its error where there is one, each with the unit of its last digit; percent as fractions."""
    found = {}
    for line in PRINTED.strip().splitlines():
        name, _, numbers = line.rpartition(":")
        scale = 100.0 if "%" in numbers else 1.0
        digits = re.findall(r"-?\d+\.\d+", numbers)
        found[" ".join(name.split())] = [(float(d) / scale, 10.0 ** -len(d.partition(".")[2]) / scale) for d in digits]
    return found


@pytest.mark.skipif(
    not SAME_ORDER, reason="recorded with AVX2: on this CPU llama.cpp's Q4_0 logits are others, so not every digit is compared"
)
def test_every_digit_that_llama_perplexity_printed(run: Run) -> None:
    theirs, stored, n_compared = printed(), Stored(run), 0
    for name, numbers in theirs.items():
        stats, field = (stored.base, "ppl") if name == "Mean PPL(base)" else (stored.stats, FIELDS[name])
        for (value, unit), suffix in zip(numbers, ("", "_se"), strict=False):
            assert getattr(stats, field + suffix) == pytest.approx(value, rel=REL, abs=2 * unit), name + suffix
            n_compared += 1
    assert n_compared == 43


def test_the_perplexities_that_llama_perplexity_printed(run: Run) -> None:
    log_p = streamed(run).log_p[0].numpy().reshape(run.labels.shape)
    found = [logit_stats(n_positions=0, log_p=log_p[: n + 1]).ppl for n in range(N_CHUNKS)]
    assert found == pytest.approx(BASE_PPL, rel=1e-5)  # float32 weights: nothing is quantized


def test_a_whole_study_has_the_perplexity_that_llama_perplexity_printed() -> None:
    """From the F32 file and the text, in this project's own arithmetic."""
    study = run_study(StudyOptions(models=(str(MODEL),), types=("Q8_0",), text=TEXT, n_ctx=N_CTX, n_chunks=N_CHUNKS))
    assert study.reference is not None
    assert study.reference.logits is not None
    assert study.reference.logits.n_positions == N_CHUNKS * (N_CTX // 2 - 1)
    assert study.reference.logits.ppl == pytest.approx(BASE_PPL[-1], rel=1e-5)


def test_their_file_is_close_to_the_exact_divergence(run: Run) -> None:
    """A log-probability is off by half a step at most, and what ends 16 below counts little, except in a perplexity."""
    exact, stored = streamed(run).kl[1].numpy().reshape(run.labels.shape), Stored(run)
    assert np.abs(exact - stored.kl).max() < LOWEST / STEPS
    assert exact.mean() == pytest.approx(stored.kl.mean(), rel=1e-4)
    stats = ours(run)
    assert stats.ppl == pytest.approx(stored.stats.ppl, rel=1e-12)
    assert stats.top1_agree == stored.stats.top1_agree
    assert stats.ln_ppl_ratio is not None
    assert stats.ln_ppl_ratio == pytest.approx(math.log(stats.ppl / BASE_PPL[-1]), abs=1e-5)
    assert stored.stats.ln_ppl_ratio == pytest.approx(
        0.08506, rel=REL, abs=1e-4 if SAME_ORDER else 2e-3
    )  # 4 % more: tokens that the base finds impossible


def test_definitions_in_plain_numpy(run: Run) -> None:
    lp, lq = log_softmax(run.base), log_softmax(run.quantized)
    kl, n = (np.exp(lp) * (lp - lq)).sum(-1), run.labels.size
    base, q = -at_labels(lp, run), -at_labels(lq, run)
    dp = np.exp(-q) - np.exp(-base)
    same = (run.base.argmax(-1) == run.quantized.argmax(-1)).astype(float)

    def se(values: NDArray[np.float64]) -> float:
        return math.sqrt(values.var(ddof=1) / n)

    ppl, ppl_base = math.exp(q.mean()), math.exp(base.mean())
    half = 2.364624251592785 * kl.mean(1).std(ddof=1) / math.sqrt(N_CHUNKS)  # Student's t(0.975, 7)
    expected = {
        "n_positions": n,
        "kl_nats": kl.mean(),
        "kl_nats_se": se(kl),
        "kl_nats_low": kl.mean() - half,
        "kl_nats_high": kl.mean() + half,
        "top1_agree": same.mean(),
        "top1_agree_se": se(same),
        "rms_dp": math.sqrt((dp**2).mean()),
        "rms_dp_se": se(dp**2) / (2 * math.sqrt((dp**2).mean())),
        "dp_mean": dp.mean(),
        "dp_mean_se": se(dp),
        "ppl": ppl,
        "ppl_se": ppl * se(q),
        "ln_ppl_ratio": q.mean() - base.mean(),
        "ln_ppl_ratio_se": se(q - base),
        "ppl_ratio": ppl / ppl_base,
        "ppl_ratio_se": ppl / ppl_base * se(q - base),
        "ppl_diff": ppl - ppl_base,
        "ppl_diff_se": se(ppl * q - ppl_base * base),
        "ln_ppl_cor": np.corrcoef(q.ravel(), base.ravel())[0, 1],
    }
    percents = {
        "max": 100,
        "p999": 99.9,
        "p99": 99,
        "p95": 95,
        "p90": 90,
        "median": 50,
        "p10": 10,
        "p05": 5,
        "p01": 1,
        "p001": 0.1,
        "min": 0,
    }
    for prefix, values, wanted in (("kl_nats", kl, percents), ("dp", dp, percents | {"p75": 75, "p25": 25})):
        expected |= {f"{prefix}_{name}": np.percentile(values, percent) for name, percent in wanted.items()}
    found = dataclasses.asdict(ours(run))
    histogram = found.pop("kl_histogram")
    assert sum(histogram["counts"]) + histogram["below"] + histogram["above"] == n
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-12)
