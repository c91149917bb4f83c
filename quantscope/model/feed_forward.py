"""The feed-forward of a layer: one network, or a mixture of experts of which each token uses a few.

    ffn(x) = down(f(gate·x) · up·x)          moe(x) = Σ over the chosen experts of weightₑ · ffnₑ(x)  +  ffn of the shared experts
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantscope.arch.config import Experts, ModelConfig
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.ops import SMALLEST_SUM, routed
from quantscope.model.taps import Tap, no_tap, wants


def feed_forward(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap = no_tap, m: Arithmetic = EXACT) -> Tensor:
    """A layer's feed-forward, dense or a mixture of experts: x [B,T,E] → [B,T,E]."""
    out = moe(x, w, config, tap, m) if "ffn_gate_inp.weight" in w else ffn(x, w, config, tap, m)
    tap("ffn_out", out)
    return out


def ffn(
    x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap = no_tap, m: Arithmetic = EXACT, suffix: str = ""
) -> Tensor:
    """down(silu(gate(x)) · up(x)), or down(f(up(x))) where there is no gate: x [B,T,E] → [B,T,E].  suffix: of the matrices' names."""
    up = m.linear(x, w, f"ffn_up{suffix}", scale_last=True)  # [B,T,F]
    gate: Tensor | None = None
    if f"ffn_gate{suffix}.weight" in w:
        gate = m.linear(x, w, f"ffn_gate{suffix}", scale_last=True)  # [B,T,F]
        tap("ffn_gate", gate)
    tap("ffn_up", up)
    if gate is None and up.shape[-1] == 2 * config.n_ff:  # both in one matrix, [B,T,2F]
        gate, up = up.chunk(2, dim=-1)
    act = m.activate(config.block.activation, *((up, None) if gate is None else (gate, up)))  # [B,T,F]
    if "ffn.act.scales" in w:
        act = act / w["ffn.act.scales"]
    tap("ffn_swiglu", act)
    return m.linear(act, w, f"ffn_down{suffix}", scale_last=True)  # [B,T,E]


def moe(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap = no_tap, m: Arithmetic = EXACT) -> Tensor:
    """A mixture of experts: x [B,T,E] → [B,T,E]."""
    assert config.experts is not None
    chosen, weight = router(x, w, config.experts, tap, m)  # [B,T,n_used] each
    out = expert_outputs(x, chosen, w, config, tap, m)  # [B,T,n_used,E]
    mixed = (out * weight[..., None]).sum(-2)  # [B,T,E]
    tap("ffn_moe_out", mixed)
    return mixed + shared_experts(x, w, config, tap, m) if "ffn_up_shexp.weight" in w else mixed


def router(x: Tensor, w: Mapping[str, Tensor], experts: Experts, tap: Tap, m: Arithmetic) -> tuple[Tensor, Tensor]:
    """Which experts each token goes through, and with what weight: x [B,T,E] → int64 and float [B,T,n_used]."""
    logits = m.linear(x, w, "ffn_gate_inp")  # [B,T,X]
    tap("ffn_moe_logits", logits)
    probs, chosen = routed(logits, w.get("exp_probs_b.bias"), experts.gating, experts.n_used, experts.n_group, experts.n_group_used)
    if experts.gating != "softmax of the chosen":
        tap("ffn_moe_probs", probs)
    tap("ffn_moe_topk", chosen)
    weight = probs.gather(-1, chosen)
    if experts.gating == "softmax of the chosen":
        weight = weight.softmax(-1)
    if experts.normalised:
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)
    weight = weight * experts.scale if experts.scale != 1 else weight
    tap("ffn_moe_weights", weight)
    return chosen, weight


def expert_outputs(x: Tensor, chosen: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap, m: Arithmetic) -> Tensor:
    """What every chosen expert makes of its tokens: x [B,T,E], chosen int64 [B,T,n_used] → [B,T,n_used,E].

    One expert after the other, each on the tokens that chose it; one that no token chose is not read at all.
    """
    rows, slots = x.flatten(0, -2), chosen.flatten(0, -2)  # [N,E], [N,n_used]
    shown = [name for name in ("ffn_moe_gate", "ffn_moe_up", "ffn_moe_swiglu", "ffn_moe_down") if wants(tap, name)]
    out = x.new_zeros(*slots.shape, x.shape[-1])  # [N,n_used,E]
    made: dict[str, Tensor] = {}
    for e in slots.unique().tolist():
        token, slot = (slots == e).nonzero(as_tuple=True)
        parts = one_expert(rows[token], w, e, config, m)
        out[token, slot] = parts["ffn_moe_down"]
        for name in shown:
            if name in parts:
                made.setdefault(name, x.new_zeros(*slots.shape, parts[name].shape[-1]))[token, slot] = parts[name]
    for name, values in made.items():
        tap(name, values.reshape(*x.shape[:-1], -1))  # [B,T,n_used·F]
    return out.reshape(*chosen.shape, -1)


def one_expert(x: Tensor, w: Mapping[str, Tensor], e: int, config: ModelConfig, m: Arithmetic) -> dict[str, Tensor]:
    """The taps of expert e on its tokens x [n,E]."""
    if "ffn_gate_up_exps.weight" in w:
        gate, up = m.expert_linear(x, w, "ffn_gate_up_exps", e).chunk(2, dim=-1)
    else:
        gate, up = (m.expert_linear(x, w, f"ffn_{part}_exps", e) for part in ("gate", "up"))  # [n,M] each
    act = m.activate(config.block.activation, gate, up)
    return {"ffn_moe_gate": gate, "ffn_moe_up": up, "ffn_moe_swiglu": act, "ffn_moe_down": m.expert_linear(act, w, "ffn_down_exps", e)}


def shared_experts(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap, m: Arithmetic) -> Tensor:
    """The experts that every token goes through, one feed-forward, with a gate of their own where the model has one: [B,T,E] → [B,T,E]."""
    out = ffn(x, w, config, tap, m, suffix="_shexp")
    tap("ffn_shexp", out)
    if "ffn_gate_inp_shexp.weight" not in w:
        return out
    out = out * (x @ w["ffn_gate_inp_shexp.weight"]).sigmoid()[..., None]  # one number a token
    tap("ffn_shexp_out", out)
    return out
