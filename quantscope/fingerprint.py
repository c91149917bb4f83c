"""Fingerprints: the direction of a tensor in 64 bytes, for engines in which dumping tensors is hard.

    s_k = Σ_i sign(k, i)·x_i / √n,   k = 0 … 15,   i the flat row-major index into [P,channels] or [H,P,S]

The signs come from an integer hash, so E (s_k(x) − s_k(y))² = mean (x − y)² and sixteen of them estimate the NMSE with a relative standard
deviation of √(2/16) = 35 %, whatever the difference is: unlike RMS or mean they see a transposed weight, permuted channels, swapped heads.
Source: random projections, as in AMS sketches (Alon, Matias, Szegedy 1996).  docs/fingerprints.md specifies hash and text line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quantscope.errors import ImportFormatError, TraceContentError
from quantscope.quants.kernel import inline, kernel
from quantscope.trace import Fingerprint, Full, Origin, Positions, Trace

N_SUMS = 16
RELATIVE_SD = math.sqrt(2 / N_SUMS)  # of the estimated NMSE, at most: of a difference in a single element it is 0


def sign_word(i: Any) -> Any:
    """uint32 whose bit k is 1 where sign(k, i) = −1.  A golden-ratio multiple, then the finalizer of MurmurHash3."""
    h = np.uint32((np.uint32(i) + np.uint32(1)) * np.uint32(0x9E3779B1))
    h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    h = np.uint32((h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(h ^ (h >> np.uint32(16)))


_sign_word = inline(sign_word)


@kernel
def _add_up(x: Any, sums: Any) -> Any:
    """sums[k] += Σ sign(k, i)·x_i over x float32 [n]; returns Σ x², the largest magnitude (NaN beats all) and its first index."""
    squares, peak, at = 0.0, -1.0, 0
    for i in range(x.size):
        h, v = _sign_word(i), np.float64(x[i])
        for k in range(N_SUMS):
            sums[k] += v * (1.0 - 2.0 * np.float64((h >> np.uint32(k)) & np.uint32(1)))  # a branch would be taken wrongly half the time
        squares += v * v
        a = abs(v)
        if a > peak or (a != a and peak == peak):
            peak, at = a, i
    return squares, peak, at


def sign_bits(n: int) -> Tensor:
    """The signs of the first n elements, bool [16,n]: True where sign(k, i) = −1.  For tests and for other implementations."""
    i = np.arange(n, dtype=np.uint32)
    return torch.from_numpy((sign_word(i) >> np.arange(N_SUMS, dtype=np.uint32)[:, None]) & 1).bool()


def fingerprint(x: Tensor, positions: Positions = None) -> Fingerprint:
    """The fingerprint of a tap's values, [P,channels] or [H,P,S]; any float dtype, read as float32, sums in float64.

    Raises TraceContentError for an empty tensor.  A NaN or infinity shows in every sum, in ``rms`` and in ``peak``.
    """
    values = x.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1)
    n = values.size
    if n == 0:
        raise TraceContentError(
            "a fingerprint of no values: expected at least one. The tap was cut to no positions: trace at least one token."
        )
    sums = np.zeros(N_SUMS)
    squares, peak, at = _add_up(values, sums)
    return Fingerprint(torch.from_numpy(sums / math.sqrt(n)).float(), n, math.sqrt(squares / n), float(peak), int(at), positions)


def estimate_nmse(ref: Fingerprint, test: Fingerprint) -> float:
    """NMSE from two fingerprints of the same values' places, Σ_k (a_k − b_k)² / 16 / rms_ref²; relative standard deviation 35 %.

    0 where the sums are equal, +inf where only the reference is zero, NaN where a sum is.
    Raises TraceContentError when the fingerprints are of different numbers of values.
    """
    if ref.n != test.n:
        raise TraceContentError(
            f"two fingerprints to compare: expected the same number of values, found {ref.n:,} and {test.n:,}. They are of different "
            f"positions or of another model: print a tap for the same tokens on both sides, or add `pos=` to the line."
        )
    error = float((ref.sums.double() - test.sums.double()).square().mean())
    return 0.0 if error == 0 else error / ref.rms**2 if ref.rms else math.nan if math.isnan(error) else math.inf


def estimate_quantile(p: float) -> float:
    """What the estimate divided by the true NMSE stays below with probability p: χ²₁₆(p) / 16.  0.43 for p = 2.5 %, 1.80 for 97.5 %."""
    from scipy.stats import chi2

    return float(chi2.ppf(p, N_SUMS)) / N_SUMS


def fingerprint_trace(trace: Trace) -> Trace:
    """The same trace with a fingerprint in the place of every whole tensor; other evidence stays."""
    taps = {
        tap: tuple(fingerprint(e.values, e.positions) if isinstance(e, Full) else e for e in pieces) for tap, pieces in trace.taps.items()
    }
    return Trace(trace.origin, taps)


# ---- One text line a tap ------------------------------------------------------------------------------------------------

_NUMBER = r"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
_SPAN = r"\d{1,7}(?:-\d{1,7})?"
_SEPARATOR = r"[,\s]\s*"
_LINE = re.compile(
    rf"qsfp1\s+(?P<tap>\S+)\s+n=(?P<n>\d{{1,15}})\s+rms=(?P<rms>{_NUMBER})\s+peak=(?P<peak>{_NUMBER})\s+at=(?P<at>\d{{1,15}})"
    rf"(?:\s+pos=(?P<pos>{_SPAN}(?:,{_SPAN})*))?"
    rf"\s+s=\[?\s*(?P<sums>{_NUMBER}(?:{_SEPARATOR}{_NUMBER}){{{N_SUMS - 1}}})\s*\]?\s*;",
    re.IGNORECASE,
)
_RUN = re.compile(r"qsfp1-run\b(?P<fields>.*)")
_FIELD = re.compile(r"(tokens|engine|model|sha256)=(\S+)")
_ANY = re.compile(r"\bqsfp(\d+)(?:(-run)\b|\s|$)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Run(NamedTuple):
    """What a line ``qsfp1-run tokens=1,2,3 engine=NAME model=FILE sha256=HEX`` says of the lines after it; any field may be missing."""

    tokens: tuple[int, ...] | None = None
    engine: str | None = None
    model: str | None = None
    sha256: str | None = None


def to_line(tap: str, f: Fingerprint) -> str:
    """``qsfp1 l_out-3 n=5120 rms=1.23 peak=9.87 at=4711 s=0.1,...,0.2;`` with nine significant digits, which float32 survives unchanged."""
    at = f"{f.at} pos={_shown(f.positions)}" if f.positions else f"{f.at}"
    return f"qsfp1 {tap} n={f.n} rms={f.rms:.9g} peak={f.peak:.9g} at={at} s={','.join(f'{s:.9g}' for s in f.sums.tolist())};"


def run_line(origin: Origin) -> str:
    """The line before the taps of a run: ``qsfp1-run tokens=1,2,3 engine=NAME model=FILE sha256=HEX``, what is known of it."""
    tokens = None if origin.tokens is None else ",".join(map(str, origin.tokens))
    fields = {"tokens": tokens, "engine": origin.engine, "model": origin.model, "sha256": origin.model_sha256}
    return " ".join(["qsfp1-run", *(f"{name}={'_'.join(value.split())}" for name, value in fields.items() if value)])


def parse_line(text: str) -> tuple[str, Fingerprint] | Run | None:
    """What one line of a log says: a tap and its fingerprint, the beginning of a run, or None where it is another line.

    Anything may stand before and after (time stamps, colours, brackets around the sums); sums are separated by commas or spaces.
    Raises ImportFormatError where such a line is cut short, has another number of sums, or is of an unknown version.
    """
    text = _COLOUR.sub("", text)
    found = _ANY.search(text)
    if found is None:
        return None
    if found[1] != "1":
        raise ImportFormatError(f"a fingerprint of version {found[1]}, expected 1: `{_short(text)}`. Use a newer quantscope.")
    if found[2]:
        return _run(_RUN.search(text), text)
    line = _LINE.search(text)
    if line is None:
        raise ImportFormatError(
            f"a fingerprint line that is damaged or cut short: `{_short(text)}`, expected `qsfp1 TAP n=N rms=R peak=P at=I s=`, sixteen "
            f"numbers and `;`. The log was cut, or two threads wrote into one line: print each line at once (docs/fingerprints.md)."
        )
    sums = torch.tensor([float(s) for s in re.split(_SEPARATOR, line["sums"])])
    n, at = int(line["n"]), int(line["at"])
    positions = None if line["pos"] is None else _read_positions(line["pos"], n)
    if at >= n or positions == ():
        raise ImportFormatError(
            f"a fingerprint line that contradicts itself: `{_short(text)}`, expected at < n and `pos=` with 1 to n rising positions. "
            f"Compare the engine's code with the example in docs/fingerprints.md."
        )
    return line["tap"], Fingerprint(sums, n, float(line["rms"]), float(line["peak"]), at, positions)


def _run(found: re.Match[str] | None, text: str) -> Run:
    fields = dict(_FIELD.findall(found["fields"] if found else ""))
    tokens = fields.pop("tokens", None)
    if tokens is not None and not re.fullmatch(r"\d{1,10}(,\d{1,10})*", tokens):
        raise ImportFormatError(f"a fingerprint log whose ids cannot be read: `{_short(text)}`, expected `tokens=1,2,3` without spaces.")
    return Run(None if tokens is None else tuple(map(int, tokens.split(","))), **fields)


def _shown(positions: Sequence[int]) -> str:
    """``0-3,7``: runs of consecutive positions as first-last."""
    runs: list[list[int]] = []
    for p in positions:
        if runs and p == runs[-1][-1] + 1:
            runs[-1][1:] = [p]
        else:
            runs.append([p])
    return ",".join("-".join(map(str, run)) for run in runs)


def _read_positions(text: str, n: int) -> tuple[int, ...]:
    """``0-3,7`` → 0, 1, 2, 3, 7; nothing where they do not rise or are more than n."""
    spans = [range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1) for part in text.split(",")]
    rising = all(spans) and all(a[-1] < b[0] for a, b in pairwise(spans))
    return tuple(chain(*spans)) if rising and sum(map(len, spans)) <= n else ()


def _short(text: str) -> str:
    return " ".join(text.split())[:60]
