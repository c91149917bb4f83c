"""A sensitivity as a paragraph, as tables (a heat map of roles and layers first), as Markdown, and as the document of ``--json``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from quantscope.language import mark, say
from quantscope.phrases import count, listed, size, some
from quantscope.remedy.sensitivity import Sensitivity, place, role
from quantscope.report.markdown import escaped, pipe_table
from quantscope.report.table import Table
from quantscope.wording import MISSING, idle_experts, percent, printable, sig

SENSITIVITY_VERSION = 1  # of the JSON document
SHADES = "█▓▒░ "  # at least 1/2, 1/4, 1/8, 1/16 of the largest cell, and less
MICRO = 1e6  # tables are in 10⁻⁶ nats
PREFERRED = "Q4_K"  # the type whose heat map is shown first
FEW_CHUNKS = 8  # below this a note says how uncertain single predictions are
MOST = 10  # tensors in the table of the most sensitive ones


def main_type(s: Sensitivity) -> str:
    """The type that the answer and the heat map of the terminal are about."""
    return PREFERRED if PREFERRED in s.types else s.types[0]


def answer(s: Sensitivity) -> str:
    """What costs most in the main type."""
    t = main_type(s)
    roles = s.group(role, t)
    total = sum(roles.values())
    worst = s.most(t, 1)
    if not worst or total == 0:
        return say("Storing this model in {type} changes nothing.", type=t)
    ranked = sorted(roles, key=lambda r: -roles[r])[:3]
    shares = listed(f"{printable(r)} {percent(roles[r] / total)}" for r in ranked)
    return say(
        "All matrices in {type}: about {total} nats per token, if the errors only add up; of it {shares}. The most sensitive one is {name} "
        "with {kl} nats.",
        type=t,
        total=sig(total),
        shares=shares,
        name=printable(worst[0]),
        kl=sig(s.kl[worst[0]][t]),
    )


def notes(s: Sensitivity) -> list[str]:
    """What was run, and what limits the figures."""
    lines = [
        say(
            "Predicted from {chunks} of {n_ctx} tokens: each figure is the mean KL divergence when one matrix alone is stored in that "
            "type.",
            chunks=count(s.n_chunk, "chunk"),
            n_ctx=f"{s.n_ctx:,}",
        )
    ]
    if s.n_chunk < FEW_CHUNKS:
        lines.append(
            say(
                "{chunks} only: the figures of single matrices are uncertain by tens of percent. Give a longer text, or more of it with "
                "`--chunks`.",
                chunks=count(s.n_chunk, "chunk"),
            )
        )
    if any(role(name).endswith("_exps") for name in s.kl):
        lines.append(
            say(
                "The choice of the experts is taken as it is: where errors send tokens to other experts, a matrix before a router costs "
                "more than is predicted. `quantscope study` counts such tokens, and `quantscope recipe` decides by measurement."
            )
        )
    if s.idle:
        lines.append(
            say(
                "No token reaches some of the experts ({some}): nothing is known of what quantization does to them. Study a longer text.",
                some=printable(idle_experts(s.idle)),
            )
        )
    other = [f"{name} {asked} → {kept}" for name, row in s.stored.items() for asked, kept in row.items() if asked != kept]
    if other:
        names = printable(some(other, 3))
        lines.append(say("Another type where blocks do not fill the rows, as in llama-quantize: {names}.", names=names))
    return lines


def tables(s: Sensitivity) -> list[Table]:
    """For the terminal: the heat map of the main type, groups, the most sensitive tensors."""
    return [heat_table(s, main_type(s)), group_table(s, ROLES, role), group_table(s, LAYERS, place), most_table(s, main_type(s))]


def heat_table(s: Sensitivity, qtype: str) -> Table:
    """A row a layer, a column a role; shaded by powers of two below the largest cell."""
    layers = [p for p in dict.fromkeys(map(place, s.kl)) if p.isdigit()]
    roles = list(dict.fromkeys(role(name) for name in s.kl if place(name).isdigit()))
    top = [name for name in s.kl if not place(name).isdigit()]
    cells = {(place(name), role(name)): row[qtype] for name, row in s.kl.items() if qtype in row}
    largest, sums = max(cells.values(), default=0.0), s.group(place, qtype)
    rows = [(p, *(_shaded(cells.get((p, r)), largest) for r in roles), _micro(sums.get(p))) for p in layers]
    rows += [(place(name), *("" for _ in roles), _shaded(s.kl[name].get(qtype), largest)) for name in top]
    caption = say(
        "KL divergence in 10⁻⁶ nats per token, one matrix at a time in {type}; {half} half of the largest cell or more, {quarter} a "
        "quarter, {eighth} an eighth, {sixteenth} a sixteenth",
        type=qtype,
        **dict(zip(("half", "quarter", "eighth", "sixteenth"), SHADES, strict=False)),
    )
    return Table(
        (say("layer"), *roles, say("sum")),
        tuple(rows),
        caption,
        layers=tuple(int(p) if p.isdigit() else -1 for p, *_ in rows),
        important=frozenset({-1}),
    )


ROLES = mark("role"), mark("By role: the sum of its matrices, in 10⁻⁶ nats per token")
LAYERS = mark("layer"), mark("By layer: the sum of its matrices, in 10⁻⁶ nats per token")


def group_table(s: Sensitivity, words: tuple[str, str], key: Callable[[str], str]) -> Table:
    """Sums over the tensors of each group, a column a type.  words: heading and caption."""
    sums = {t: s.group(key, t) for t in s.types}
    groups = list(dict.fromkeys(map(key, s.kl)))
    rows = tuple((g, *(_micro(sums[t].get(g)) for t in s.types)) for g in groups)
    numbers = tuple(int(g) if g.isdigit() else -1 for g in groups) if words is LAYERS else ()
    heading, caption = map(say, words)
    return Table((heading, *s.types), rows, caption, layers=numbers, important=frozenset({-1}))


def most_table(s: Sensitivity, qtype: str, n: int = MOST) -> Table:
    """The most sensitive tensors in one type: shape, size, and the figure in every type."""
    rows = tuple(
        (
            printable(role(name)),
            place(name) if place(name).isdigit() else MISSING,
            " × ".join(f"{x:,}" for x in s.shapes[name]),
            size(s.n_bytes[name][qtype]),
            *(_micro(s.kl[name].get(t)) for t in s.types),
        )
        for name in s.most(qtype, n)
    )
    caption = say("The most sensitive matrices in {type}, in 10⁻⁶ nats per token", type=qtype)
    return Table((say("matrix"), say("layer"), say("shape"), say("in {type}", type=qtype), *s.types), rows, caption)


def markdown(s: Sensitivity, model: str) -> str:
    """The whole report: a heat map for every type."""
    shown = [*(heat_table(s, t) for t in (main_type(s), *(t for t in s.types if t != main_type(s)))), *tables(s)[1:]]
    blocks = [f"# {say('quantscope sensitivity of {model}', model=escaped(model))}", f"**{escaped(answer(s))}**"]
    blocks.append("\n".join(f"- {escaped(line)}" for line in notes(s)))
    for table in shown:
        blocks += [f"### {escaped(table.caption)}", pipe_table(table)]
    return "\n\n".join(blocks) + "\n"


def document(s: Sensitivity, model: str, text: str, imatrix: str | None = None) -> dict[str, Any]:
    """What ``--json`` prints; KL divergences in nats per token."""
    return {
        "version": SENSITIVITY_VERSION,
        "answer": answer(s),
        "model": printable(model),
        "text": printable(text),
        "imatrix": None if imatrix is None else printable(imatrix),
        "n_chunk": s.n_chunk,
        "n_ctx": s.n_ctx,
        "types": list(s.types),
        "tensors": [_tensor(s, name) for name in s.kl],
        "by_layer": _grouped(s, place),
        "by_role": _grouped(s, role),
        "most_sensitive": {t: s.most(t, MOST) for t in s.types},
        "notes": notes(s),
    }


def _tensor(s: Sensitivity, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "layer": int(place(name)) if place(name).isdigit() else None,
        "role": role(name),
        "shape": list(s.shapes[name]),
        "types": {t: {"kl": kl, "stored": s.stored[name][t], "bytes": s.n_bytes[name][t]} for t, kl in s.kl[name].items()},
    }


def _grouped(s: Sensitivity, key: Callable[[str], str]) -> dict[str, dict[str, float]]:
    sums = {t: s.group(key, t) for t in s.types}
    return {g: {t: sums[t][g] for t in s.types if g in sums[t]} for g in dict.fromkeys(map(key, s.kl))}


def _micro(kl: float | None) -> str:
    return MISSING if kl is None else sig(kl * MICRO, 3, 0.01)


def _shaded(kl: float | None, largest: float) -> str:
    """``"▓ 12.3"``: the shade says how far below the largest cell, in powers of two."""
    if kl is None or largest <= 0:
        return _micro(kl)
    below = 4 if kl <= 0 else min(4, max(0, math.ceil(math.log2(largest / kl)) - 1))
    return f"{SHADES[below]} {_micro(kl)}"
