"""Findings about the generated tokens: the answer in one sentence, who keeps the original's token, and what that proves."""

from __future__ import annotations

from quantscope.language import say
from quantscope.results import Finding, Generated, Study, Variant
from quantscope.wording import count, listed, percent, quoted, sig, size

REFERENCE = "reference"


def engine_of(study: Study) -> str:
    """Who produced the numbers; the exact reference unless the provenance names another engine."""
    return str(study.provenance.get("engine", REFERENCE))


def first_token(variant: Variant | None) -> Generated | None:
    return variant.generated[0] if variant is not None and variant.generated else None


def keepers(study: Study) -> tuple[list[Variant], list[Variant]]:
    """(variants whose first token is the original's, variants with another); both empty without an original's token."""
    original = first_token(study.reference)
    kept: list[Variant] = []
    lost: list[Variant] = []
    for v in study.quantized:
        token = first_token(v)
        if original is not None and token is not None:
            (kept if token.id == original.id else lost).append(v)
    return kept, lost


def smallest(variants: list[Variant]) -> Variant | None:
    """The variant with the fewest bytes; None when no size is known."""
    sized = [v for v in variants if v.file_bytes is not None]
    return min(sized, key=lambda v: v.footprint, default=None)


def by_size(variants: list[Variant]) -> list[Variant]:
    """Largest first; variants of unknown size last."""
    return sorted(variants, key=lambda v: v.footprint, reverse=True)


def names(variants: list[Variant]) -> str:
    return listed(v.name for v in variants)


def weight(variant: Variant) -> str:
    """``4.6 MB, 5.70 bits per weight, KL 0.012 nats``; what is unknown is left out."""
    kl = variant.logits.kl_nats if variant.logits else None
    parts = [size(variant.file_bytes)] if variant.file_bytes is not None else []
    parts += [f"{sig(variant.bpw)} bits per weight"] if variant.bpw is not None else []
    parts += [f"KL divergence {sig(kl)} nats"] if kl is not None else []
    return ", ".join(parts)


# ---- The answer ---------------------------------------------------------------------------------------------------------


def answer(study: Study) -> Finding | None:
    """The whole study in one sentence."""
    kept, lost = keepers(study)
    if kept or lost:
        return _answer_with_original(study, by_size(kept), by_size(lost))
    if study.original is None:
        return _answer_without_original(study)
    kls = {v.name: v.logits.kl_nats for v in study.quantized if v.logits and v.logits.kl_nats is not None}
    if not kls:
        return None
    best, worst = min(kls, key=kls.__getitem__), max(kls, key=kls.__getitem__)
    text = f"Of {count(len(kls), 'variant')}, {best} is closest to {study.original} (KL divergence {sig(kls[best])} nats)"
    return Finding("answer", f"{text} and {worst} farthest ({sig(kls[worst])} nats).", {"kl_nats": kls})


def _answer_with_original(study: Study, kept: list[Variant], lost: list[Variant]) -> Finding:
    token = first_token(study.reference)
    assert token is not None
    best = smallest(kept)
    changed = listed(f"{v.name} ({quoted(v.generated[0].text)})" for v in lost)
    if not lost:
        text = f"{'Both variants' if len(kept) == 2 else names(kept) if len(kept) == 1 else f'All {len(kept)} variants'} "
        text += f"{'keeps' if len(kept) == 1 else 'keep'} the original's next token {quoted(token.text)}"
        if best is not None and len(kept) > 1:
            text += f", down to the smallest, {best.name} ({weight(best)})"
    elif kept:
        text = f"{names(kept)} {'keeps' if len(kept) == 1 else 'keep'} the original's next token {quoted(token.text)}, "
        text += f"{changed} {'changes' if len(lost) == 1 else 'change'} it"
        if best is not None:
            text += f"; the smallest that keeps it is {best.name} ({weight(best)})"
    else:
        text = f"No variant keeps the original's next token {quoted(token.text)}: {changed}"
    return Finding("answer", text + ".", {"original_id": token.id, "kept": [v.name for v in kept], "changed": [v.name for v in lost]})


def _answer_without_original(study: Study) -> Finding | None:
    tokens = {v.name: v.generated[0] for v in study.variants if v.generated}
    if len(tokens) < 2:
        return None
    what = listed(f"{name} {quoted(t.text)}" for name, t in tokens.items())
    same = len({t.id for t in tokens.values()}) == 1
    foreign = engine_of(study) != REFERENCE
    unknown = (
        "whether the quantization, the engine, the file or the prompt decides it"
        if foreign
        else "what the unquantized weights would generate"
    )
    text = (
        f"The variants generate {'the same token' if same else 'different tokens'} ({what}), and without the original nothing here tells "
    )
    text += f"{unknown}."
    return Finding("answer", text, {"ids": {name: t.id for name, t in tokens.items()}})


# ---- The tokens ---------------------------------------------------------------------------------------------------------


def generated(study: Study) -> Finding | None:
    """How the generated tokens differ, and how clear the choice was."""
    if not any(v.generated for v in study.variants):
        return None
    sentences = [s for s in (_changed_tokens(study), _continuations(study), _not_greedy(study)) if s]
    if not sentences:
        return None
    evidence = {
        v.name: {"ids": [g.id for g in v.generated], "rank": v.generated[0].rank, "rank_in_original": v.generated[0].rank_in_original}
        for v in study.variants
        if v.generated
    }
    return Finding("generated", " ".join(sentences), evidence)


def _changed_tokens(study: Study) -> str:
    token = first_token(study.reference)
    if token is None:
        return ""
    sure = f" with probability {percent(token.prob)}" if token.prob is not None else ""
    text = f"The original puts {quoted(token.text)} (id {token.id}) first{sure}."
    for v in keepers(study)[1]:
        g = v.generated[0]
        place = f", which the original ranks {g.rank_in_original}" if g.rank_in_original is not None else ""
        chance = f" (probability {percent(g.prob)} in {v.name})" if g.prob is not None else ""
        text += f" {v.name} puts {quoted(g.text)} first{place}{chance}."
    return text


def _continuations(study: Study) -> str:
    """How many tokens of a longer greedy continuation are the original's."""
    reference = study.reference
    if reference is None or len(reference.generated) < 2:
        return ""
    wanted = [g.id for g in reference.generated]
    equal = {v.name: _leading([g.id for g in v.generated], wanted) for v in study.quantized if v.generated}
    whole = [name for name, n in equal.items() if n == len(wanted)]
    parts = [f"{listed(whole)} for all of them"] if whole else []
    parts += [f"{name} for {n}" for name, n in equal.items() if n < len(wanted)]
    return f"Of the original's {len(wanted)} greedy tokens the continuation stays the same in {listed(parts)}." if parts else ""


def _leading(ids: list[int], wanted: list[int]) -> int:
    """Number of leading equal ids."""
    return next((i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), min(len(ids), len(wanted)))


def _not_greedy(study: Study) -> str:
    odd = [v for v in study.variants if v.generated and (v.generated[0].rank or 1) > 1]
    if not odd:
        return ""
    what = listed(f"that of {v.name} has rank {v.generated[0].rank}" for v in odd)
    return (
        f"Not every token is the largest of its own logits ({what}): it was sampled or taken by other rules than greedy decoding, so "
        f"different tokens may in part be an effect of sampling."
    )


def smallest_that_keeps(study: Study) -> Finding | None:
    """The smallest variant with the original's first token, and whether a larger one loses it."""
    kept, lost = keepers(study)
    best = smallest(kept)
    if best is None:
        return None
    text = f"The smallest variant that keeps the top token is {best.name} ({weight(best)})."
    larger = [v for v in lost if (v.file_bytes or 0) > (best.file_bytes or 0)]
    if larger:
        verb = "loses" if len(larger) == 1 else "lose"
        text += f" {names(larger)} {verb} it although larger, so keeping this one token is partly luck: go by the KL divergence."
    else:
        text += " This is one token of one prompt; the KL divergence is the steadier measure."
    return Finding("smallest-top-token", text, {"name": best.name, "file_bytes": best.file_bytes, "bpw": best.bpw})


def agreement(study: Study) -> Finding | None:
    """What variants that agree with each other do and do not show."""
    groups: dict[int, list[Variant]] = {}
    for v in study.quantized:
        if v.generated:
            groups.setdefault(v.generated[0].id, []).append(v)
    largest = max(groups.values(), key=len, default=[])
    if len(largest) < 2:
        return None
    token = largest[0].generated[0]
    ids = {name: [v.name for v in vs] for name, vs in ((str(i), vs) for i, vs in groups.items())}
    text = f"{names(largest)} agree on {quoted(token.text)} (id {token.id}). "
    reference = first_token(study.reference)
    if reference is not None and reference.id != token.id:
        text += "The original does not, so here agreement means that they share an error, not that they are right."
    else:
        text += (
            "Agreement across quantizations shows that their formats are decoded consistently; it does not show that an engine is right."
        )
    return Finding("agreement", text, {"groups": ids})


def same_weights(study: Study) -> Finding | None:
    """Presets that come to the same types because blocks do not fill the rows of this model."""
    groups: dict[tuple[object, ...], list[Variant]] = {}
    for v in study.quantized:
        if v.types and v.path is None:
            groups.setdefault((v.kv, *sorted(v.types.items())), []).append(v)
    alike = [group for group in groups.values() if len(group) > 1]
    if not alike:
        return None
    text = (
        f"{'; '.join(names(group) for group in alike)} give every tensor the same type here and so are one and the same: where blocks do "
        f"not fill the rows of a model, a preset falls back to other types."
    )
    return Finding("same-weights", text, {"groups": [[v.name for v in group] for group in alike]})


def limits(study: Study) -> Finding | None:
    """What the study cannot show."""
    engine = engine_of(study)
    sentences = []
    if study.original is None:
        sentences.append(
            "No variant is the original (F16 or F32 weights): how much of any difference is quantization damage cannot be concluded."
        )
    if engine != REFERENCE:
        sentences.append(
            f"All numbers come from {engine}; no independent reference ran the same files on the same token ids, so a bug of that "
            f"engine is neither shown nor ruled out."
        )
    elif study.base is not None:
        sentences.append(
            f"All variants were run by the same reference with exact arithmetic, but the original's distributions come from "
            f"{study.original}: the arithmetic of whatever program wrote that file is in every difference, beside the weights'."
        )
    elif any(v.kv for v in study.variants):
        sentences.append(
            say(
                "All variants were run by the same reference with exact arithmetic, so what differs comes from the weights, and in the "
                "variants with kv= in their names from keys and values as a cache of that type gives them back. An engine that gives "
                "something else for one of these files, the same cache and the same token ids differs for another reason: its own "
                "arithmetic, its code, or other ids."
            )
        )
    else:
        sentences.append(
            "All variants were run by the same reference with exact arithmetic, so what differs comes from the weights alone. An engine "
            "that gives something else for one of these files and the same token ids differs for another reason: its own "
            "arithmetic, its code, or other ids."
        )
    return Finding("limits", " ".join(sentences), {"original": study.original, "engine": engine})
