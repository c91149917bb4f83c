"""What an engine hands its taps to: keeps the wanted ones, whole or as fingerprints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantscope.errors import TraceContentError
from quantscope.trace import Evidence, Full


def keep_values(x: Tensor) -> Evidence:
    """All values, float32."""
    return Full(x.to("cpu", torch.float32).contiguous())


def keep_fingerprint(x: Tensor) -> Evidence:
    """Sixteen sums, RMS and peak instead of the values."""
    from quantscope.fingerprint import fingerprint

    return fingerprint(x)


def everything(name: str) -> bool:
    """All taps are wanted."""
    return True


class Collector:
    """A tap (``model.taps.Tap``) that keeps evidence: values come as [P,channels] or [H,P,S]; of two of one name the later one stays."""

    def __init__(self, wanted: Callable[[str], bool] = everything, keep: Callable[[Tensor], Evidence] = keep_values) -> None:
        self._wanted, self._keep = wanted, keep
        self.seen: set[str] = set()
        self.taps: dict[str, tuple[Evidence, ...]] = {}

    def wants(self, name: str) -> bool:
        self.seen.add(name)
        return self._wanted(name)

    def __call__(self, name: str, x: Tensor, /) -> None:
        if self.wants(name):
            self.taps[name] = (self._keep(x),)

    def complete(self) -> dict[str, tuple[Evidence, ...]]:
        """The evidence; TraceContentError when nothing was wanted of what the engine showed."""
        if not self.taps:
            raise TraceContentError(
                f"--taps matches none of the {len(self.seen)} taps of this run, expected at least one, as in --taps 'l_out|result'. "
                f"The names are {', '.join(sorted(self.seen)[:20])} and so on."
            )
        return self.taps


class Steps:
    """A tap that puts the steps of a decoding together: a row a step, handed on as [T,channels].

    Attention maps, whose rows grow from step to step, are left out.
    """

    def __init__(self, collect: Collector) -> None:
        self._collect = collect
        self._rows: dict[str, list[Tensor]] = {}
        self._n = 0

    def begin(self) -> Steps:
        """The next step: of several tensors of one tap in a step the last one counts."""
        self._n += 1
        return self

    def wants(self, name: str) -> bool:
        return not name.startswith("kq_soft_max") and self._collect.wants(name)

    def __call__(self, name: str, x: Tensor, /) -> None:
        if self.wants(name):
            rows = self._rows.setdefault(name, [])
            del rows[self._n - 1 :]
            rows.append(x.detach().to("cpu", torch.float32))

    def hand_on(self) -> None:
        """Give the collector what has come together."""
        for name, rows in self._rows.items():
            self._collect(name, torch.cat(rows))
