"""Which type each tensor of a new file gets: a preset of llama-quantize, a recipe, options; and what is to be said about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantscope.errors import UnsupportedTypeError, UsageError
from quantscope.qtypes import QuantType
from quantscope.quants import CODECS, can_decode, can_encode
from quantscope.recipes import (
    ALIASES,
    PRESETS,
    Options,
    Override,
    TensorShape,
    assign_types,
    is_quantizable,
    preset_name,
    unmatched_overrides,
)
from quantscope.remedy.original import Original
from quantscope.remedy.recipe_file import Recipe
from quantscope.sources.base import show
from quantscope.wording import count, listed, some

NAMED = 3  # tensors that a message lists


@dataclass(frozen=True)
class Choice:
    """types: canonical name → type, of every tensor.  file_type: ``general.file_type``.  notes: what to know before the work begins."""

    types: Mapping[str, QuantType]
    file_type: int
    notes: tuple[str, ...] = ()


def choose_types(
    model: Original, recipe: Recipe, overrides: Sequence[Override] = (), *, pure: bool = False, imatrix: bool = False
) -> Choice:
    """The types that llama-quantize gives with the recipe's base as preset and its entries as ``--tensor-type`` options.

    overrides: come before the recipe's entries.  Without a base both together must name every matrix.
    Raises UsageError when they do not, for an unknown preset, and for entries beside F32, F16 or BF16 as base; UnsupportedTypeError for a
    type that cannot be read or written here.
    """
    tensors = [TensorShape(name, t.shape, t.qtype) for name, t in model.tensors.items()]
    overrides = (*overrides, *recipe.overrides(model.tensors.keys()))
    base, file_type = _base(model, recipe, tensors, overrides)
    if base == "Q2_K_S" and not imatrix:
        raise UsageError(
            "Q2_K_S without an importance matrix: its two bits fit nothing without one, so llama-quantize refuses as well. Give one with "
            "`--imatrix FILE`, as `quantscope imatrix MODEL --text TEXT -o FILE` makes it, or choose Q2_K."
        )
    types = assign_types(base, tensors, model.facts, Options(overrides=overrides, pure=pure, imatrix=imatrix))
    _check_codecs(model, types)
    notes = [
        *model.notes,
        *_requantized(model, types),
        *_fallbacks(model, tensors, PRESETS[base].qtype, overrides),
        *_unmatched(model, overrides),
    ]
    return Choice(types, file_type, tuple(notes))


def _base(model: Original, recipe: Recipe, tensors: Sequence[TensorShape], overrides: Sequence[Override]) -> tuple[str, int]:
    """(preset of what the entries do not name, general.file_type): of the type that most weights get where the recipe has no base."""
    if recipe.base is not None:
        preset = preset_name(recipe.base)
        return preset, PRESETS[preset].file_type
    matrices = [t for t in tensors if is_quantizable(t, model.facts.arch)]
    weights: Counter[QuantType] = Counter()
    unnamed = []
    for t in matrices:
        wanted = _wanted(t.name, overrides)
        if wanted is None:
            unnamed.append(t.name)
        else:
            weights[wanted] += model.tensors[t.name].n_elements
    if unnamed or not weights:
        raise UsageError(
            f"the recipe names {len(matrices) - len(unnamed)} of {count(len(matrices), 'matrix', 'matrices')} and has no base, expected a "
            f"type for each: {some(unnamed, NAMED)} would have none. Give a preset for the rest, `--type Q4_K_M`, or a "
            f'"base" in the recipe.'
        )
    most = weights.most_common(1)[0][0].name
    preset = ALIASES.get(most, most) if most in {*PRESETS, *ALIASES} else "Q8_0"
    # entries count beside quantized presets only; as all matrices are named it matters for nothing else which preset it is
    return preset if PRESETS[preset].qtype.is_quantized else "Q8_0", PRESETS[preset].file_type


def _wanted(name: str, overrides: Sequence[Override]) -> QuantType | None:
    return next((o.qtype for o in overrides if o.matches(name)), None)


def _check_codecs(model: Original, types: Mapping[str, QuantType]) -> None:
    """UnsupportedTypeError before the first byte is written."""
    path = show(model.source.path)
    for name, t in types.items():
        stored = model.tensors[name].qtype
        if t == stored:
            continue
        if not can_decode(stored):
            raise UnsupportedTypeError(
                f"{path}: tensor {name!r} has the type {stored}, which holds no weights that could be made {t}. Expected a "
                f'floating-point or block type: leave it as it is with a recipe, `"{name}": "{stored}"`, or convert the original again.'
            )
        if not can_encode(t):
            known = [n for n, c in CODECS.items() if c.encoder]
            raise UnsupportedTypeError(
                f"tensor {name!r} is to become {t}, expected one of {', '.join(known)}: quantscope reads {t} but does not write it. Choose "
                f"another type, or write the file with llama-quantize."
            )


def _requantized(model: Original, types: Mapping[str, QuantType]) -> list[str]:
    changed = [name for name, t in types.items() if model.tensors[name].qtype.is_quantized and t != model.tensors[name].qtype]
    if not changed:
        return []
    kinds = listed(sorted({model.tensors[name].qtype.name for name in changed}))
    return [
        f"Requantizing: {count(len(changed), 'tensor')} of {show(model.source.path)} {'is' if len(changed) == 1 else 'are'} {kinds} "
        f"already, so that both errors add up. This can be far worse than quantizing the F16, BF16 or F32 original; llama-quantize asks "
        f"for --allow-requantize here."
    ]


def _fallbacks(model: Original, tensors: Sequence[TensorShape], base: QuantType, overrides: Sequence[Override]) -> list[str]:
    short = [
        t.name for t in tensors if is_quantizable(t, model.facts.arch) and t.shape[-1] % (_wanted(t.name, overrides) or base).block_size
    ]
    if not short:
        return []
    return [
        f"The rows of {count(len(short), 'tensor')} cannot be filled with blocks of the wanted type, so that a neighbouring type takes "
        f"its place, as in llama-quantize: {some(short, NAMED)}."
    ]


def _unmatched(model: Original, overrides: Sequence[Override]) -> list[str]:
    return [f"No tensor name contains {o.pattern!r} (={o.qtype}): misspelt?" for o in unmatched_overrides(overrides, model.tensors)]
