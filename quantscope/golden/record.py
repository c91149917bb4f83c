"""Running the probes: every tap by the exact forward, in one batch and step by step, and how far honest arithmetic may be off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantscope.compare import EXACT_FLOOR, PREDICTED_TIMES
from quantscope.golden.probes import Probe
from quantscope.metrics import nmse
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.forward import KVCache, forward
from quantscope.model.taps import Recorder
from quantscope.weights import WeightProvider

ROWS_FLOOR = 1e-12  # NMSE of dequantized weights: a few float32 roundings


@dataclass(frozen=True)
class Recorded:
    """A probe with its expected values and the NMSE up to which a tap counts as right."""

    probe: Probe
    taps: Mapping[str, Tensor]
    tolerance: Mapping[str, float]


def batch(weights: WeightProvider, ids: Sequence[int], arithmetic: Arithmetic = EXACT) -> Mapping[str, Tensor]:
    """Every tap of one forward over all ids: [T,channels], [H,T,T]."""
    recorder = Recorder()
    forward(torch.tensor([ids], dtype=torch.int64), weights, recorder, arithmetic=arithmetic)
    return {name: x[0] for name, x in recorder.taps.items()}


def step_by_step(weights: WeightProvider, ids: Sequence[int]) -> Mapping[str, Tensor]:
    """The same one token at a time over a cache: [T,channels] of every tap but the attention maps, whose rows grow."""
    cache, steps = KVCache(), []
    for token in ids:
        recorder = Recorder()
        forward(torch.tensor([[token]], dtype=torch.int64), weights, recorder, cache=cache)
        steps.append(recorder.taps)
    return {name: torch.cat([step[name][0] for step in steps]) for name in steps[0] if not name.startswith("kq_soft_max")}


def record(probes: Sequence[Probe], weights: WeightProvider, emulated: Arithmetic | None = None) -> list[Recorded]:
    """Every probe run exactly.  ``decode`` has the values of its batch, and its tolerance also covers the exact forward step by step.

    emulated: an arithmetic whose distance from the exact one is honest; None: nothing but another order of float32 sums is.
    """
    out: list[Recorded] = []
    for probe in probes:
        if probe.name == "decode":
            whole, stepped = out[-1], step_by_step(weights, probe.ids)
            taps = {name: whole.taps[name] for name in stepped}
            own = tolerances(taps, stepped)
            out.append(Recorded(probe, taps, {name: max(own[name], whole.tolerance[name]) for name in taps}))
        else:
            taps = dict(batch(weights, probe.ids))
            other = taps if emulated is None else batch(weights, probe.ids, emulated)
            out.append(Recorded(probe, taps, tolerances(taps, other)))
    return out


def tolerances(ref: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, float]:
    """EXACT_FLOOR + PREDICTED_TIMES · nmse(ref, other) of every tap over the whole tensor, as ``compare`` has it."""
    return {name: EXACT_FLOOR + PREDICTED_TIMES * nmse(x.flatten(), other[name].flatten()).item() for name, x in ref.items()}
