"""A finding about mixtures of experts: how many tokens a variant sends through other experts, and where most of them."""

from __future__ import annotations

from quantscope.language import say
from quantscope.phrases import listed
from quantscope.results import Finding, Study, Variant
from quantscope.wording import percent


def elsewhere(study: Study) -> Finding | None:
    """The mean over the layers and the layer with most of them, of every variant."""
    having = {v.name: shares for v in study.quantized if (shares := _shares(v))}
    if not having:
        return None
    told, evidence = [], {}
    for name, shares in having.items():
        layer = max(shares, key=lambda i: shares[i])
        mean = sum(shares.values()) / len(shares)
        told.append(
            say("{name} {mean}, most in layer {layer} ({most})", name=name, mean=percent(mean), layer=layer, most=percent(shares[layer]))
        )
        evidence[name] = {"mean": mean, "layer": layer, "most": shares[layer]}
    text = say("Share of the tokens that go through other experts than in the original, mean of the layers: {shares}.", shares=listed(told))
    return Finding("routing", text, evidence)


def _shares(v: Variant) -> dict[int, float]:
    return {r.layer: r.rerouted for r in v.routing if r.rerouted is not None}
