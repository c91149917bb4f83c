"""Sums over a tap from which RMS, mean, NMSE and cosine follow; gathered batch by batch, merged exactly like one long batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class TapSums:
    """Running float64 sums of one tap: Σx, Σx², and against the original r: Σr², Σr·x, Σ(r−x)².

    ``add`` takes tensors of any equal shape; every value counts once, whatever its position or channel.
    """

    n: int = 0
    x: float = 0.0
    xx: float = 0.0
    rr: float = 0.0
    rx: float = 0.0
    dd: float = 0.0

    def add(self, ref: Tensor | None, test: Tensor) -> None:
        """Include the values of ``test`` and, where there is an original, their differences from ``ref``."""
        t = test.double().flatten()  # sums in float64
        self.n += t.numel()
        self.x += float(t.sum())
        self.xx += float(t @ t)
        if ref is not None:
            r = ref.double().flatten()
            d = r - t
            self.rr += float(r @ r)
            self.rx += float(r @ t)
            self.dd += float(d @ d)

    @property
    def mean(self) -> float:
        """Σx / n; NaN before the first value."""
        return self.x / self.n if self.n else math.nan

    @property
    def rms(self) -> float:
        """sqrt(Σx² / n); NaN before the first value."""
        return math.sqrt(self.xx / self.n) if self.n else math.nan

    @property
    def nmse(self) -> float:
        """Σ(r−x)² / Σr²; 0 where both are zero, infinity where only the original is."""
        if self.rr:
            return self.dd / self.rr
        return math.inf if self.dd else 0.0

    @property
    def sqnr_db(self) -> float:
        """−10·log10(NMSE) [dB]; +inf where identical."""
        e = self.nmse
        return math.inf if e == 0 else -10 * math.log10(e) if math.isfinite(e) else -math.inf

    @property
    def cos_sim(self) -> float:
        """Σr·x / sqrt(Σr²·Σx²); 1 where both are zero, 0 where one is."""
        norm = math.sqrt(self.rr * self.xx)
        if norm:
            return max(-1.0, min(1.0, self.rx / norm))
        return 1.0 if self.rr == self.xx else 0.0
