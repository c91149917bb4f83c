"""Findings about a quantized key/value cache: what it costs by itself, and whether it or the weights do the damage."""

from __future__ import annotations

from quantscope.language import say
from quantscope.phrases import paragraph, size, times
from quantscope.results import Finding, Study, Variant
from quantscope.wording import sig

CLEARLY = 1.5  # one divergence over this multiple of the other is the larger one


def cost(study: Study) -> Finding | None:
    """Each cache alone, and beside each set of quantized weights."""
    whole = study.reference
    alone = {v.kv: v for v in study.quantized if whole and v.kv and v.types == whole.types and _kl(v) is not None}
    if whole is None or not alone:
        return None
    sentences, evidence = [], {}
    for kv, variant in alone.items():
        kl = _kl(variant)
        evidence[variant.name] = {"kl_nats": kl, "kv_bytes": variant.kv_bytes}
        sentences.append(
            say(
                "A key/value cache of type {kv}, {bytes} a token, costs {kl} nats with the weights of {original} as they are.",
                kv=kv,
                bytes=size(variant.kv_bytes),
                kl=sig(kl),
                original=whole.name,
            )
        )
    for both in study.quantized:
        weights = next((v for v in study.quantized if v.kv is None and v.types == both.types and v.path == both.path), None)
        if both.kv in alone and weights is not None and (said := _beside(both, weights, alone[both.kv])):
            sentences.append(said)
            evidence[both.name] = {"kl_nats": _kl(both), "weights": _kl(weights), "cache": _kl(alone[both.kv])}
    return Finding("kv-cache", paragraph(sentences), evidence)


def _beside(both: Variant, weights: Variant, cache: Variant) -> str | None:
    """Which of the two does more in a variant that has both; None where a divergence is unknown."""
    together, w, c = _kl(both), _kl(weights), _kl(cache)
    if together is None or w is None or c is None:
        return None
    values = {"variant": both.name, "both": sig(together), "weights": sig(w), "cache": sig(c)}
    if c > CLEARLY * w:
        share = times(c / w) if w else "∞"
        return say(
            "In {variant}, {both} nats, the cache does most of the damage: {cache} alone, {times} the {weights} of the weights alone.",
            **values,
            times=share,
        )
    if w > CLEARLY * c:
        return say(
            "In {variant}, {both} nats, the weights do most of the damage: {weights} alone, against {cache} of the cache alone.", **values
        )
    return say("In {variant}, {both} nats, weights and cache cost about the same: {weights} and {cache} alone.", **values)


def _kl(v: Variant) -> float | None:
    return v.logits.kl_nats if v.logits else None
