"""The lines of a llama.cpp debug log → graphs: the nodes of each evaluation with what was printed of their values.

    common_debug_cb_eval:   l_out-0 = (f32)   ADD(ffn_out-0{256, 5, 1, 1}, ffn_inp-0{256, 5, 1, 1}}) = {256, 5, 1, 1}
        [
            [
                [     -0.0181,       0.0272,       0.0272,    ...,      -0.1234,       0.5678,       0.9012  ],
                ...,
            ],
        ]
        sum = -3.141593

Older builds write ``ggml_debug:`` and indent and space otherwise.  What stands between the lines of a tensor is passed over, and so is a
prefix that every line has (a time stamp).  Source: common/debug.cpp of llama.cpp, and examples/eval-callback before 2026.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from quantscope.importers.printed import Printed, PrintedReader
from quantscope.model.taps import split_tap

HEADER = re.compile(
    r"^(?P<prefix>.*?)\b(?:common_debug_cb_eval|ggml_debug)(?:<[^>]*>)?:\s*(?P<name>\S.*?) = \((?P<type>\w+)\)\s+"
    r"(?P<op>[A-Z][A-Z0-9_]*)\((?P<sources>.*)\) = \{(?P<ne>\d+(?:, \d+)*)\}"
)
SOURCE = re.compile(r"([^{},]+?)\{")
BEGUN = re.compile(r"\b(?:common_debug_cb_eval|ggml_debug)(?:<[^>]*>)?:")
# What older builds called the nodes, where no newer build means something else by the name.
OLD_NAMES = {"inp_embd": "embd", "ffn_gate_par": "ffn_swiglu", "kq_soft_max_ext": "kq_soft_max"}


@dataclass
class Node:
    """One node of the graph, its values as far as they were printed."""

    name: str
    op: str
    ne: tuple[int, ...]  # ne0 runs fastest
    values: Printed | None = None
    sources: tuple[str, ...] = ()  # names of the tensors it is made of, as far as the line says them

    @property
    def stem(self) -> str:
        """The name without its layer, as newer builds have it."""
        stem = self.name.partition("-")[0]
        return OLD_NAMES.get(stem, stem)

    @property
    def layer(self) -> str:
        return self.name.partition("-")[2]


@dataclass
class Graph:
    """The nodes of one evaluation in order, and the ids that the log names for it."""

    nodes: list[Node] = field(default_factory=list)
    seen: set[tuple[str, str]] = field(default_factory=set)
    tokens: tuple[int, ...] | None = None
    anew: bool = False  # the log shows that a program or prompt began before it
    warm_up: bool = False  # an empty run before the prompt


FACTS = {  # of the run, where the log has them
    "model": re.compile(r"loaded meta data with .* from (?:.*[/\\])?(\S+\.gguf)\b"),
    "arch": re.compile(r"general\.architecture\s+str\s*=\s*(\w+)"),
    "engine_version": re.compile(r"\bbuild(?:_info)?\s*[:=]\s*(b?\d+\S*(?: \([0-9a-f]+\))?)"),
}
N_TOKENS = re.compile(r"number of input tokens = (\d+)\s*$")
ONE_ID = re.compile(r" {2}(\d{1,7})\s*$")
DEBUG_IDS = re.compile(r"Token ids \((\d+)\):")
ID_IN_PIECES = re.compile(r"\((\d+)\) ")


class CallbackLog:
    """One pass over the lines."""

    def __init__(self, text: str) -> None:
        self.graphs = [Graph()]
        self.facts: dict[str, str] = {}
        self.warnings: list[str] = []
        self.n_headers = 0
        self._open: tuple[Node, PrintedReader, re.Pattern[str]] | None = None
        self._ids: list[int] | None = None  # being listed, one a line
        self._n_ids = 0
        self._pieces = 0  # ids that the next line should hold, as text(id)
        self._next = Graph()  # what the lines say of the evaluation that comes next
        for line in text.splitlines():
            self._line(line)
        self._close()
        self._take_ids()

    def _line(self, line: str) -> None:
        header = HEADER.search(line)
        if header:
            self._close()
            self._header(header)
        elif self._open is None or not self._body(line):
            self._other(line)

    def _header(self, found: re.Match[str]) -> None:
        self.n_headers += 1
        node = Node(
            found["name"],
            found["op"],
            tuple(map(int, found["ne"].split(", "))),
            sources=tuple(s.strip() for s in SOURCE.findall(found["sources"])),
        )
        graph = self.graphs[-1]
        key = (node.name, node.op)
        if not graph.nodes or (key in graph.seen and split_tap(f"{node.stem}-{node.layer}" if node.layer else node.stem)):
            graph, self._next = self._next, Graph()
            self.graphs.append(graph)
        graph.seen.add(key)
        graph.nodes.append(node)
        # A prefix differs in its digits only; a line in the middle of a record may come without it.
        prefix = re.sub(r"\d+", r"\\d+", re.escape(found["prefix"]))
        self._open = node, PrintedReader(), re.compile(rf"(?:{prefix})?\s*")

    def _body(self, line: str) -> bool:
        assert self._open is not None
        _, reader, prefix = self._open
        start = prefix.match(line)
        taken = start is not None and reader.line(line[start.end() :])
        if reader.done:
            self._close()
        return taken

    def _close(self) -> None:
        if self._open is None:
            return
        node, reader, _ = self._open
        self._open = None
        if reader.begun and 0 not in node.ne:
            node.values = reader.printed(node.ne)
            if node.values is None:
                self.warnings.append(f"the values of {node.name} are incomplete: it is left out.")

    def _other(self, line: str) -> None:
        if BEGUN.search(line):
            self.warnings.append(f"a node's line is damaged or cut short: {' '.join(line.split())[:60]!r}.")
            return
        self._token_line(line)
        if "llama_model_loader: loaded meta data" in line:
            self._next.anew = True
        if "warming up the model" in line:
            self._next.warm_up = True
        for fact, pattern in FACTS.items():
            if fact not in self.facts and (found := pattern.search(line)):
                self.facts[fact] = found[1]

    def _token_line(self, line: str) -> None:
        if self._ids is not None:
            if found := ONE_ID.search(line):
                self._ids.append(int(found[1]))
            if len(self._ids) == self._n_ids:
                self._take_ids()
        elif self._pieces:
            ids = tuple(int(i) for i in ID_IN_PIECES.findall(line))
            if len(ids) == self._pieces and self.graphs[-1].tokens is None:  # llama-debug prints them after the evaluation
                self.graphs[-1].tokens = ids
            self._pieces = 0
        elif found := N_TOKENS.search(line):
            self._ids, self._n_ids = [], int(found[1])
        elif found := DEBUG_IDS.search(line):
            self._pieces = int(found[1])

    def _take_ids(self) -> None:
        if self._ids is not None and len(self._ids) == self._n_ids:
            self._next.tokens, self._next.anew = tuple(self._ids), True
        self._ids = None
