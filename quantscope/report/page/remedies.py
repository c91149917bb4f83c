"""A sensitivity and a recipe as pages: which matrices count, and what a size costs."""

from __future__ import annotations

from quantscope.language import retold, say
from quantscope.remedy.recipe import Found
from quantscope.remedy.sensitivity import Sensitivity, place, role
from quantscope.report import recipe as recipe_report
from quantscope.report import sensitivity as sensitivity_report
from quantscope.report.page.content import Block, Chart, Frame, Page, Series, grid, rounded
from quantscope.wording import printable, sig


def sensitivity_page(s: Sensitivity, model: str) -> Page:
    """The page of a sensitivity: heat maps first."""
    report = sensitivity_report
    main = report.main_type(s)
    groups = (report.group_table(s, report.ROLES, role), report.group_table(s, report.LAYERS, place), report.most_table(s, main))
    blocks = (
        Block("heat", say("Layer by layer, role by role"), charts=(heat_chart(s),), tables=(report.heat_table(s, main),)),
        Block("groups", say("Sums"), charts=(role_chart(s),), tables=groups),
        Block("notes", say("Notes"), lines=tuple(("", note) for note in report.notes(s))),
    )
    return Page(say("quantscope sensitivity of {model}", model=printable(model)), report.answer(s), (), blocks)


def heat_chart(s: Sensitivity) -> Chart:
    """Role × layer, a frame a type: the predicted KL divergence of each matrix alone."""
    main = sensitivity_report.main_type(s)
    layers = [p for p in dict.fromkeys(map(place, s.kl)) if p.isdigit()]
    roles = list(dict.fromkeys(role(name) for name in s.kl if place(name).isdigit()))
    types = [main, *(t for t in s.types if t != main)]
    frames = tuple(Frame(t, grid({(role(n), place(n)): row.get(t) for n, row in s.kl.items()}, roles, layers)) for t in types)
    title = say("Predicted KL divergence of one matrix alone in a type")
    return Chart(
        "sensitivity",
        title,
        "heat",
        say("layer"),
        say("matrix"),
        x=[int(i) for i in layers],
        y=roles,
        frames=frames,
        z_title=say("KL [nats]"),
        log_z=True,
    )


def role_chart(s: Sensitivity) -> Chart:
    """A line a role: what the type of all its matrices costs."""
    sums = {t: s.group(role, t) for t in s.types}
    series = tuple(Series(r, list(s.types), rounded([sums[t].get(r) for t in s.types])) for r in dict.fromkeys(map(role, s.kl)))
    return Chart("roles", say("What each role costs in each type"), "lines", say("type"), say("KL [nats]"), series, log_y=True)


def recipe_page(f: Found, model: str) -> Page:
    """The page of a recipe: size against KL divergence with the presets on it, the candidates, the types of every matrix."""
    report = recipe_report
    candidates, front = report.tables(f)
    blocks = (
        Block("front", say("Size against KL divergence"), charts=(front_chart(f),), tables=(front,)),
        Block("candidates", say("Candidates"), charts=(candidate_chart(f),), tables=(candidates,)),
        Block("types", say("Types of the chosen recipe"), charts=(type_chart(f),)),
        Block("notes", say("Notes"), lines=tuple(("", note) for note in report.notes(f))),
    )
    return Page(say("quantscope recipe for {model}", model=printable(model)), report.answer(f), (), blocks)


def front_chart(f: Found) -> Chart:
    """The search as a line, every preset as a point."""
    searched = [p for p in f.front if p.name is None]
    line = Series(say("search"), rounded([p.n_bytes / 1e6 for p in searched]), rounded([p.kl for p in searched]))
    presets = [Series(p.name, rounded([p.n_bytes / 1e6]), rounded([p.kl]), style="label") for p in f.front if p.name is not None]
    title = say("Predicted: below the line is nothing")
    return Chart("front", title, "lines", say("file size [MB]"), say("KL [nats]"), (line, *presets), log_y=True)


def candidate_chart(f: Found) -> Chart:
    """The candidates that were measured, on the text that nothing was fitted to."""
    measured = [c for c in f.candidates if c.kl is not None]
    text = [say("{bpw} bits per weight", bpw=sig(c.bpw)) for c in measured]
    names = [retold(c.name) for c in measured]
    series = Series(say("other text"), names, rounded([c.kl[1] for c in measured if c.kl]), text=text)
    predicted = Series(say("predicted"), names, rounded([c.predicted for c in measured]), text=text)
    return Chart("candidates", say("Measured and predicted KL divergence"), "points", say("recipe"), say("KL [nats]"), (series, predicted))


def type_chart(f: Found) -> Chart:
    """Bits per weight of every matrix."""
    types = {name: t for name, t in f.chosen.types.items() if place(name).isdigit()}
    layers, roles = sorted({int(place(n)) for n in types}), list(dict.fromkeys(map(role, types)))
    bits = {(role(n), int(place(n))): t.bpw for n, t in types.items()}
    frame = Frame(retold(f.chosen.name), grid(bits, roles, layers))
    title = say("Bits per weight of every matrix")
    return Chart("types", title, "heat", say("layer"), say("matrix"), x=layers, y=roles, frames=(frame,), z_title=say("bits per weight"))
