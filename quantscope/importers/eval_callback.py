"""The log of ``llama-eval-callback`` or ``llama-debug --verbose`` → traces of samples and sums.

Until September 2025 the sum was of the printed values only, and until 2025 some nodes had other names.  {ne0, ne1, ...}: ne0 runs fastest.
Source: src/llama-graph.cpp and examples/eval-callback of llama.cpp, pull requests 15637 and 19331.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from quantscope.engines.node_names import VIEWS, TapNamer
from quantscope.errors import ImportFormatError
from quantscope.importers.axes import ATTENTION_MAP, BY_HEAD
from quantscope.importers.base import PRINTED, Draft, Imported, Run, non_finite_note
from quantscope.importers.callback_log import CallbackLog, Graph, Node
from quantscope.importers.printed import Printed
from quantscope.language import english, mark
from quantscope.model.taps import EMBD
from quantscope.trace import Origin, Sample, Stats
from quantscope.wording import count, listed

FLAT = ("attn_norm", "ffn_inp", "ffn_norm", "ffn_out", "l_out", "result_norm", "result_output")  # ne = {channels, tokens}
# ne = {head_dim, heads, tokens} or {channels, tokens}
RESHAPED = (*(stem for stem in BY_HEAD if stem != "kqv_out"), "Qcur_latent", "Kcur_latent")


def read_eval_callback(text: str, name: str) -> Imported:
    """The evaluations in a log, each a trace of samples (``%12.4f`` values) and sums.

    name: of the file, for errors.  Raises ImportFormatError where no node can be read.
    """
    log = CallbackLog(text)
    graphs = [g for g in log.graphs if g.nodes and not g.warm_up]
    sums_of_all = _sums_are_of_all(graphs)
    runs = _runs(graphs, _origin(log.facts, sums_of_all), sums_of_all)
    if not any(r.trace.taps for r in runs):
        raise ImportFormatError(
            f"{name}: expected tensors as llama-eval-callback prints them, found {count(log.n_headers, 'node')} and none with complete "
            f"values that is a tap. The log was cut short or filtered: run `llama-eval-callback -m MODEL -p TEXT > FILE 2>&1` again."
        )
    return Imported("eval-callback", tuple(runs), warnings=tuple(f"{name}: {w}" for w in log.warnings))


def _origin(facts: Mapping[str, str], sums_of_all: bool | None) -> Origin:
    """Who wrote the log, as far as it says, and what its sums are of."""
    notes = {
        None: (),
        True: (mark("Sums were added up by llama.cpp in float32, over all values."),),
        False: (mark("Sums are left out: this build of llama.cpp added up the printed values only."),),
    }
    return Origin("llama.cpp", facts.get("engine_version"), "ggml", facts.get("model"), arch=facts.get("arch"), notes=notes[sums_of_all])


# ---- Graphs → traces ----------------------------------------------------------------------------------------------------


def _sums_are_of_all(graphs: Sequence[Graph]) -> bool | None:
    """Whether sums are of all values or, as older builds did, of the printed ones; None where no tensor was shortened."""
    printed = [n.values for g in graphs for n in g.nodes if n.values]
    shortened = [v for v in printed if v.shortened and v.sum is not None and math.isfinite(v.sum)]
    return None if not shortened else not all(v.sum_is_of_printed for v in shortened)


def _runs(graphs: Sequence[Graph], origin: Origin, sums_of_all: bool | None) -> list[Run]:
    """One run a graph.  A graph goes on where the one before stopped when it is of one token, or the prompt had more ids than that."""
    runs: list[Run] = []
    start, tokens = 0, None
    for graph in graphs:
        n = _n_tokens(graph)
        prompt_goes_on = tokens is not None and start + n <= len(tokens)
        continues = bool(runs) and not graph.anew and (n == 1 or prompt_goes_on)
        if not continues:
            start, tokens = 0, graph.tokens
        draft = Draft(None if tokens is None or len(tokens) < start + n else tokens[: start + n], start, n)
        _gather(graph, draft, sums_of_all is not False)
        positions = tuple(range(start, start + n)) if start else None
        whole = replace(origin, tokens=draft.tokens, positions=positions)
        runs.append(Run(f"call {len(runs) + 1}", draft.trace(whole), continues, n))
        start += n
    return runs


def _n_tokens(graph: Graph) -> int:
    """Tokens of an evaluation: rows of the embeddings, else the most rows of any node that holds one token a row."""
    embedded = next((n.ne[1] for n in graph.nodes if n.stem == EMBD), 0)
    rows = (n.ne[1] for n in graph.nodes if n.stem in FLAT)
    return embedded or max(rows, default=0) or len(graph.tokens or (0,))


def named(nodes: Sequence[Node]) -> Iterator[tuple[str, Node]]:
    """(tap, node) for the nodes that are taps, in order; the names of older builds are understood."""
    namer = TapNamer()
    before_2025 = any(n.stem == "kqv_merged_cont" for n in nodes)  # then kqv_out is the output projection
    for node in nodes:
        stem = {"kqv_merged_cont": "kqv_out", "kqv_out": "attn_out"}.get(node.stem, node.stem) if before_2025 else node.stem
        # With flash attention kqv_out is a view of the operation's result, with the values of the tap.
        op = "CONT" if stem == "kqv_out" and node.op in VIEWS else node.op
        tap = namer(f"{stem}-{node.layer}" if node.layer else stem, op, node.sources)
        if tap is not None:
            yield tap, node


def _gather(graph: Graph, draft: Draft, with_sums: bool) -> None:
    """The evidence of every tap; of several nodes of one tap the last one counts."""
    unplaced = []
    for tap, node in dict(named(graph.nodes)).items():
        if node.values is None:
            continue
        placed = _placed(tap, node, draft)
        if placed is None:
            unplaced.append(tap)
            continue
        draft.add(tap, placed)
        if with_sums and node.values.sum is not None:
            draft.add(tap, Stats({"sum": node.values.sum}, placed.positions, {"sum": 6}))
        if note := non_finite_note(tap, placed.values, PRINTED):
            draft.notes.append(note)
    if unplaced:
        draft.notes.append(english("Left out, as the log does not say which positions they hold: {taps}.", taps=listed(unplaced)))


def _placed(tap: str, node: Node, draft: Draft) -> Sample | None:
    """The printed values with their flat indices in [P,channels] or [H,P,S]; None where they are neither of all positions nor the last."""
    assert node.values is not None
    stem = tap.partition("-")[0]
    if stem == ATTENTION_MAP:
        return _attention_map(node.ne, node.values, draft)
    n = draft.n if stem in RESHAPED else (*node.ne, 1)[1]
    if n is None or n not in (draft.n, 1) or node.values.n_values % n:
        return None
    positions = None if n == draft.n else draft.last  # the last layer and the head may keep the last token only
    return Sample(node.values.values, node.values.index, (n, node.values.n_values // n), positions, node.values.digits)


def _attention_map(ne: Sequence[int], printed: Printed, draft: Draft) -> Sample | None:
    """Without the keys that only fill the cache up to a multiple of 256."""
    padded, n, heads = (*ne, 1, 1)[:3]
    keys = (draft.start or 0) + n
    if n != draft.n or padded < keys:
        return None
    row, key = printed.index // padded, printed.index % padded
    kept = key < keys
    return Sample(printed.values[kept], (row * keys + key)[kept], (heads, n, keys), None, printed.digits)
