"""Findings about the generated tokens: the answer in one sentence, who keeps the original's token, and what that proves."""

from __future__ import annotations

from quantscope.language import say
from quantscope.phrases import clauses, count, joined, listed, paragraph, size
from quantscope.results import Finding, Generated, Study, Variant
from quantscope.wording import percent, quoted, sig

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
    """``4.6 MB, 5.70 bits per weight, KL divergence 0.012 nats``; what is unknown is left out."""
    kl = variant.logits.kl_nats if variant.logits else None
    parts = [size(variant.file_bytes)] if variant.file_bytes is not None else []
    parts += [say("{n} bits per weight", n=sig(variant.bpw))] if variant.bpw is not None else []
    parts += [say("KL divergence {kl} nats", kl=sig(kl))] if kl is not None else []
    return joined(parts)


def keep(variants: list[Variant]) -> str:
    """The English verb for so many."""
    return "keeps" if len(variants) == 1 else "keep"


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
    text = say(
        "Of {variants}, {best} is closest to {original} (KL divergence {best_kl} nats) and {worst} farthest ({worst_kl} nats).",
        variants=count(len(kls), "variant"),
        original=study.original,
        best=best,
        best_kl=sig(kls[best]),
        worst=worst,
        worst_kl=sig(kls[worst]),
    )
    return Finding("answer", text, {"kl_nats": kls})


def _answer_with_original(study: Study, kept: list[Variant], lost: list[Variant]) -> Finding:
    token = first_token(study.reference)
    assert token is not None
    if not lost:
        text = _all_keep(kept, quoted(token.text))
    elif kept:
        text = _some_keep(kept, lost, quoted(token.text))
    else:
        text = say("No variant keeps the original's next token {token}: {changed}.", token=quoted(token.text), changed=_changed(lost))
    return Finding("answer", text, {"original_id": token.id, "kept": [v.name for v in kept], "changed": [v.name for v in lost]})


def _changed(lost: list[Variant]) -> str:
    return listed(say("{name} ({value})", name=v.name, value=quoted(v.generated[0].text)) for v in lost)


def _all_keep(kept: list[Variant], token: str) -> str:
    if len(kept) == 1:
        return say("{name} keeps the original's next token {token}.", name=kept[0].name, token=token)
    who = say("Both variants") if len(kept) == 2 else say("All {n} variants", n=len(kept))
    best = smallest(kept)
    if best is None:
        return say("{variants} keep the original's next token {token}.", variants=who, token=token)
    return say(
        "{variants} keep the original's next token {token}, down to the smallest, {best} ({weight}).",
        variants=who,
        token=token,
        best=best.name,
        weight=weight(best),
    )


def _some_keep(kept: list[Variant], lost: list[Variant], token: str) -> str:
    who = {"kept": names(kept), "changed": _changed(lost), "_keep": keep(kept), "_change": "changes" if len(lost) == 1 else "change"}
    best = smallest(kept)
    if best is None:
        return say("{kept} {_keep} the original's next token {token}, {changed} {_change} it.", token=token, **who)
    return say(
        "{kept} {_keep} the original's next token {token}, {changed} {_change} it; the smallest that keeps it is {best} ({weight}).",
        token=token,
        best=best.name,
        weight=weight(best),
        **who,
    )


def _answer_without_original(study: Study) -> Finding | None:
    tokens = {v.name: v.generated[0] for v in study.variants if v.generated}
    if len(tokens) < 2:
        return None
    what = listed(f"{name} {quoted(t.text)}" for name, t in tokens.items())
    if engine_of(study) != REFERENCE:
        unknown = say("whether the quantization, the engine, the file or the prompt decides it")
    else:
        unknown = say("what the unquantized weights would generate")
    if len({t.id for t in tokens.values()}) == 1:
        text = say(
            "The variants generate the same token ({what}), and without the original nothing here tells {unknown}.",
            what=what,
            unknown=unknown,
        )
    else:
        text = say(
            "The variants generate different tokens ({what}), and without the original nothing here tells {unknown}.",
            what=what,
            unknown=unknown,
        )
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
    return Finding("generated", paragraph(sentences), evidence)


def _changed_tokens(study: Study) -> str:
    token = first_token(study.reference)
    if token is None:
        return ""
    what = {"token": quoted(token.text), "id": token.id}
    if token.prob is None:
        first = say("The original puts {token} (id {id}) first.", **what)
    else:
        first = say("The original puts {token} (id {id}) first with probability {chance}.", chance=percent(token.prob), **what)
    return paragraph([first, *(_changed_token(v.name, v.generated[0]) for v in keepers(study)[1])])


def _changed_token(name: str, g: Generated) -> str:
    token, rank, chance = quoted(g.text), g.rank_in_original, percent(g.prob)
    if g.prob is None and rank is None:
        return say("{name} puts {token} first.", name=name, token=token)
    if rank is None:
        return say("{name} puts {token} first (probability {chance} in {name}).", name=name, token=token, chance=chance)
    if g.prob is None:
        return say("{name} puts {token} first, which the original ranks {rank}.", name=name, token=token, rank=rank)
    return say(
        "{name} puts {token} first, which the original ranks {rank} (probability {chance} in {name}).",
        name=name,
        token=token,
        rank=rank,
        chance=chance,
    )


def _continuations(study: Study) -> str:
    """How many tokens of a longer greedy continuation are the original's."""
    reference = study.reference
    if reference is None or len(reference.generated) < 2:
        return ""
    wanted = [g.id for g in reference.generated]
    equal = {v.name: _leading([g.id for g in v.generated], wanted) for v in study.quantized if v.generated}
    whole = [name for name, n in equal.items() if n == len(wanted)]
    parts = [say("{names} for all of them", names=listed(whole))] if whole else []
    parts += [say("{name} for {n}", name=name, n=n) for name, n in equal.items() if n < len(wanted)]
    if not parts:
        return ""
    return say("Of the original's {n} greedy tokens the continuation stays the same in {parts}.", n=len(wanted), parts=listed(parts))


def _leading(ids: list[int], wanted: list[int]) -> int:
    """Number of leading equal ids."""
    return next((i for i, (a, b) in enumerate(zip(ids, wanted, strict=False)) if a != b), min(len(ids), len(wanted)))


def _not_greedy(study: Study) -> str:
    odd = [v for v in study.variants if v.generated and (v.generated[0].rank or 1) > 1]
    if not odd:
        return ""
    what = listed(say("that of {name} has rank {rank}", name=v.name, rank=v.generated[0].rank) for v in odd)
    return say(
        "Not every token is the largest of its own logits ({what}): it was sampled or taken by other rules than greedy decoding, so "
        "different tokens may in part be an effect of sampling.",
        what=what,
    )


def smallest_that_keeps(study: Study) -> Finding | None:
    """The smallest variant with the original's first token, and whether a larger one loses it."""
    kept, lost = keepers(study)
    best = smallest(kept)
    if best is None:
        return None
    text = say("The smallest variant that keeps the top token is {name} ({weight}).", name=best.name, weight=weight(best))
    larger = [v for v in lost if (v.file_bytes or 0) > (best.file_bytes or 0)]
    if larger:
        more = say(
            "{names} {_lose} it although larger, so keeping this one token is partly luck: go by the KL divergence.",
            names=names(larger),
            _lose="loses" if len(larger) == 1 else "lose",
        )
    else:
        more = say("This is one token of one prompt; the KL divergence is the steadier measure.")
    text = paragraph([text, more])
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
    text = say("{names} agree on {token} (id {id}).", names=names(largest), token=quoted(token.text), id=token.id)
    reference = first_token(study.reference)
    if reference is not None and reference.id != token.id:
        means = say("The original does not, so here agreement means that they share an error, not that they are right.")
    else:
        means = say(
            "Agreement across quantizations shows that their formats are decoded consistently; it does not show that an engine is right."
        )
    text = paragraph([text, means])
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
    text = say(
        "{groups} give every tensor the same type here and so are one and the same: where blocks do not fill the rows of a model, a preset "
        "falls back to other types.",
        groups=clauses(names(group) for group in alike),
    )
    return Finding("same-weights", text, {"groups": [[v.name for v in group] for group in alike]})


def limits(study: Study) -> Finding | None:
    """What the study cannot show."""
    engine = engine_of(study)
    sentences = []
    if study.original is None:
        sentences.append(
            say("No variant is the original (F16 or F32 weights): how much of any difference is quantization damage cannot be concluded.")
        )
    if engine != REFERENCE:
        about = say(
            "All numbers come from {engine}; no independent reference ran the same files on the same token ids, so a bug of that engine is "
            "neither shown nor ruled out.",
            engine=engine,
        )
    elif study.base is not None:
        about = say(
            "All variants were run by the same reference with exact arithmetic, but the original's distributions come from {original}: the "
            "arithmetic of whatever program wrote that file is in every difference, beside the weights'.",
            original=study.original,
        )
    elif any(v.kv for v in study.variants):
        about = say(
            "All variants were run by the same reference with exact arithmetic, so what differs comes from the weights, and in the "
            "variants with kv= in their names from keys and values as a cache of that type gives them back. An engine that gives "
            "something else for one of these files, the same cache and the same token ids differs for another reason: its own "
            "arithmetic, its code, or other ids."
        )
    else:
        about = say(
            "All variants were run by the same reference with exact arithmetic, so what differs comes from the weights alone. An engine "
            "that gives something else for one of these files and the same token ids differs for another reason: its own arithmetic, its "
            "code, or other ids."
        )
    return Finding("limits", paragraph([*sentences, about]), {"original": study.original, "engine": engine})
