"""The feed-forward of a layer: one network, or a mixture of experts of which each token uses a few.

ffn(x) = down(f(gate·x) · up·x)          moe(x) = Σ over the chosen experts of weightₑ · ffnₑ(x)  +  ffn of the shared experts
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantscope.arch.config import Experts, ModelConfig
from quantscope.model.arithmetic import EXACT, Arithmetic
from quantscope.model.ops import SMALLEST_SUM
from quantscope.model.taps import Tap, no_tap, wants


def feed_forward(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap = no_tap, m: Arithmetic = EXACT) -> Tensor:
    """A layer's feed-forward, dense or a mixture of experts: x [B,T,E] → [B,T,E]."""
    if "ffn_gate_inp.weight" in w:
        return moe(x, w, config, tap, m)
    out = ffn(x, w, config, tap, m)
    tap("ffn_out", out)
    return out


def ffn(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap = no_tap, m: Arithmetic = EXACT, suffix: str = "") -> Tensor:
    """down(silu(gate(x)) · up(x)), or down(f(up(x))) where there is no gate: x [B,T,E] → [B,T,E].  suffix: of the matrices' names."""
    gate: Tensor | None = None
    if f"ffn_gate{suffix}.weight" in w:
        gate = m.linear(x, w, f"ffn_gate{suffix}", scale_last=True)  # [B,T,F]
        tap("ffn_gate", gate)
    up = m.linear(x, w, f"ffn_up{suffix}", scale_last=True)  # [B,T,F]
    tap("ffn_up", up)
    act = activation(gate, up, w, config, m)  # [B,T,F]
    tap("ffn_swiglu", act)
    return m.linear(act, w, f"ffn_down{suffix}", scale_last=True)  # [B,T,E]


def activation(gate: Tensor | None, up: Tensor, w: Mapping[str, Tensor], config: ModelConfig, m: Arithmetic) -> Tensor:
    """f(gate) · up, or f(up) without a gate: [...,F] each → [...,F]; where both are one product, ``up`` is [...,2F]."""
    kind = config.block.activation
    if gate is None and config.block.fused:
        gate, up = up.chunk(2, dim=-1)
    act = m.activate(kind, up, None) if gate is None else m.activate(kind, gate, up)
    return act / w["ffn.act.scales"] if "ffn.act.scales" in w else act


def moe(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap = no_tap, m: Arithmetic = EXACT) -> Tensor:
    """A mixture of experts: x [B,T,E] → [B,T,E]."""
    assert config.experts is not None
    chosen, weight = router(x, w, config.experts, tap, m)  # [B,T,n_used] each
    out = expert_outputs(x, chosen, w, config, tap, m)  # [B,T,n_used,E]
    mixed = (out * weight[..., None]).sum(-2)  # [B,T,E]
    tap("ffn_moe_out", mixed)
    if "ffn_up_shexp.weight" not in w:
        return mixed
    out = mixed + shared_experts(x, w, config, tap, m)
    tap("ffn_out", out)
    return out


def router(x: Tensor, w: Mapping[str, Tensor], experts: Experts, tap: Tap, m: Arithmetic) -> tuple[Tensor, Tensor]:
    """Which experts each token goes through, and with what weight: x [B,T,E] → int64 and float [B,T,n_used]."""
    logits = m.linear(x, w, "ffn_gate_inp")  # [B,T,X]
    tap("ffn_moe_logits", logits)
    probs = expert_probabilities(logits, experts)
    if experts.gating != "softmax of the chosen":
        tap("ffn_moe_probs", probs)
    chosen = expert_choice(probs, w.get("exp_probs_b.bias"), experts)
    tap("ffn_moe_topk", chosen)
    weight = expert_weights(probs, chosen, experts)
    tap("ffn_moe_weights", weight)
    return chosen, weight


def expert_probabilities(logits: Tensor, experts: Experts) -> Tensor:
    """Of all experts, [...,X]; the logits themselves where only those of the chosen go through a softmax."""
    if experts.gating == "softmax of the chosen":
        return logits
    return logits.softmax(-1) if experts.gating == "softmax" else logits.sigmoid()


def expert_choice(probs: Tensor, bias: Tensor | None, experts: Experts) -> Tensor:
    """The numbers of the chosen experts in falling order: probs [...,X] → int64 [...,n_used].  bias: [X], added for the choice only."""
    wanted = probs if bias is None else probs + bias
    if experts.n_group > 1:
        groups = wanted.reshape(*wanted.shape[:-1], experts.n_group, -1)  # [...,groups,X/groups]
        best = groups.topk(experts.n_best, dim=-1).values.sum(-1).topk(experts.n_group_used, dim=-1).indices
        allowed = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=probs.device).scatter_(-1, best, True)
        wanted = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    return wanted.topk(experts.n_used, dim=-1).indices


def expert_weights(probs: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
    """What the outputs of the chosen experts are multiplied by: probs [...,X], chosen [...,n_used] → [...,n_used]."""
    weight = probs.gather(-1, chosen)
    if experts.gating == "softmax of the chosen":
        weight = weight.softmax(-1)
    if experts.normalised:
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)
    return weight * experts.scale if experts.scale != 1 else weight


def expert_outputs(x: Tensor, chosen: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap, m: Arithmetic) -> Tensor:
    """What every chosen expert makes of its tokens: x [B,T,E], chosen int64 [B,T,n_used] → [B,T,n_used,E].

    One expert after the other, each on the tokens that chose it; one that no token chose is not read at all.
    """
    rows, slots = x.flatten(0, -2), chosen.flatten(0, -2)  # [N,E], [N,n_used]
    shown = [name for name in EXPERT_TAPS if name == EXPERT_TAPS[-1] or wants(tap, name)]
    made: dict[str, Tensor] = {}
    for e in torch.unique(slots).tolist():
        token, slot = (slots == e).nonzero(as_tuple=True)
        parts = one_expert(rows[token], w, e, config, m)
        for name in shown:
            made.setdefault(name, x.new_zeros(*slots.shape, parts[name].shape[-1]))[token, slot] = parts[name]
    for name in shown:
        tap(name, made[name].reshape(*x.shape[:-1], -1))  # [B,T,n_used·M]
    return made[EXPERT_TAPS[-1]].reshape(*chosen.shape, -1)


EXPERT_TAPS = ("ffn_moe_gate", "ffn_moe_up", "ffn_moe_swiglu", "ffn_moe_down")


def one_expert(x: Tensor, w: Mapping[str, Tensor], e: int, config: ModelConfig, m: Arithmetic) -> dict[str, Tensor]:
    """The taps of expert e on its tokens x [n,E]."""
    if "ffn_gate_up_exps.weight" in w:
        gate, up = m.expert_linear(x, w, "ffn_gate_up_exps", e).chunk(2, dim=-1)
    else:
        gate, up = (m.expert_linear(x, w, f"ffn_{part}_exps", e) for part in ("gate", "up"))  # [n,M] each
    act = activation(gate, up, w, config, m)
    return dict(zip(EXPERT_TAPS, (gate, up, act, m.expert_linear(act, w, "ffn_down_exps", e)), strict=True))


def chosen_linear(x: Tensor, chosen: Tensor, w: Mapping[str, Tensor], name: str, m: Arithmetic, *, each: bool = False) -> Tensor:
    """One matrix of every chosen expert: x [B,T,in], chosen [B,T,n_used] → [B,T,n_used·out].  each: x is [B,T,n_used·in]."""
    slots = chosen.flatten(0, -2)  # [N,n_used]
    n_used = slots.shape[-1]
    inputs = x.reshape(len(slots), n_used if each else 1, -1).expand(-1, n_used, -1)  # [N,n_used,in]
    made: Tensor | None = None
    for e in torch.unique(slots).tolist():
        y = m.expert_linear(inputs[slots == e], w, name, e)
        made = y.new_zeros(*slots.shape, y.shape[-1]) if made is None else made
        made[slots == e] = y
    assert made is not None
    return made.reshape(*x.shape[:-1], -1)


def shared_experts(x: Tensor, w: Mapping[str, Tensor], config: ModelConfig, tap: Tap, m: Arithmetic) -> Tensor:
    """The experts that every token goes through, one feed-forward, with a gate of their own where the model has one: [B,T,E] → [B,T,E]."""
    out = ffn(x, w, config, tap, m, suffix="_shexp")
    tap("ffn_shexp", out)
    if "ffn_gate_inp_shexp.weight" not in w:
        return out
    out = out * shared_gate(x, w)
    tap("ffn_shexp_out", out)
    return out


def shared_gate(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """How much of the shared experts a token gets: x [...,E] → [...,1]."""
    return (x @ w["ffn_gate_inp_shexp.weight"]).sigmoid()[..., None]
