"""The log of RusTorch, a Rust engine, → traces, one a forward call.

    🔍 [INPUT TOKENS] [1, 15043]
    🔍 [LAYER 0] Input: rms=0.009276, min=-0.045676, max=0.052344, mean=-0.000012

Statistics of a layer are over all tokens of the call; "last token", the final norm and the logits are of the last one; the "first 10
values" of a layer's line are the first channels of the call's first token.  Copies of such lines without emoji and brackets are read, too:
``Layer 0: RMS=0.011214, Mean=0.000046`` is a layer's output.  Lines that are none of these, among them statistics of weights, are passed
over.  Source: the eprintln! lines of the engine's model code, October 2025.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from quantscope.errors import ImportFormatError
from quantscope.importers.axes import AXIS
from quantscope.importers.base import AT_LAST, NUMBER, Imported, decimals, input_tap, number
from quantscope.importers.rustorch_calls import FIRST, Call, runs_of, sample
from quantscope.trace import Positions, Stats

# What a layer's line says it shows → tap without its layer; "" is a line with nothing but numbers.
SHOWN = {
    "": "l_out",
    "output": "l_out",
    "layer output": "l_out",
    "after ffn residual": "l_out",
    "after ffn residual (layer output)": "l_out",
    "after attn rmsnorm": "attn_norm",
    "q before reshape": "Qcur_pre",
    "k before reshape": "Kcur_pre",
    "v before reshape": "Vcur",
    "q after rope": "Qcur",
    "k after rope": "Kcur",
    "attn_output stats (before o_proj)": "kqv_out",
    "attention output": "attn_out",
    "after attn residual": "ffn_inp",
    "after ffn rmsnorm": "ffn_norm",
    "gate projection": "ffn_gate",
    "gate": "ffn_gate",
    "up projection": "ffn_up",
    "up": "ffn_up",
    "swiglu output": "ffn_swiglu",
    "swiglu": "ffn_swiglu",
    "ffn output": "ffn_out",
}
INPUT = "input"

LAYER = re.compile(r"\blayer\s+(\d{1,4})(?:\s+OUTPUT(?=\]))?\b\]?(?P<rest>.*)", re.IGNORECASE)
STAT = re.compile(rf"\b(rms|min|max|mean)\s*=\s*({NUMBER})(?![\w.])", re.IGNORECASE)
VALUES = re.compile(r"\bfirst[ _]\d+(?: values)?\s*[=:]\s*\[(?P<values>[^\[\]]*)\]", re.IGNORECASE)
SHAPE = re.compile(r"\bshape\s*=\s*\[\s*\d+\s*,\s*(\d+)\s*\]")
LAST_TOKEN = re.compile(r"last token\s*(?:\(pos=(\d+)\))?", re.IGNORECASE)
LOGIT = re.compile(
    rf"^\s*(?:#?(?P<rank>\d+)[.:]\s+)?"
    rf"(?:token(?:_id)?=(?P<a>\d+)\s+(?:\(.*\)\s+)?logit=|Token (?P<b>\d+):\s+|logits\[(?P<c>\d+)\] = )(?P<logit>{NUMBER})(?![\w.])"
)


def read_rustorch(text: str, name: str) -> Imported:
    """The forward calls of a log.  name: of the file, for errors.  Raises ImportFormatError where no line is known."""
    calls, warnings = read_calls(text)
    runs = tuple(r for r in runs_of(calls) if r.trace.taps)  # a call may have nothing but embeddings that cannot be placed
    if not runs:
        raise ImportFormatError(
            f"{name}: expected lines of RusTorch's log such as `[LAYER 0] Input: rms=0.009276, ...`, found none with a number. The log is "
            f"of another kind, or was written without its debug lines: see docs/importing.md."
        )
    return Imported("rustorch", runs, warnings=tuple(f"{name}: {w}" for w in warnings))


def read_calls(text: str) -> tuple[list[Call], list[str]]:
    """The calls of a log with their positions still open, and what was wrong with the text."""
    lines, warnings = _without_a_cut_end(text)
    reader = _Reader()
    for line in lines:
        reader.line(line)
    for call in reader.calls:
        call.widths = {**reader.widths, **call.widths}
    return [c for c in reader.calls if c.taps or c.logits or c.embedded], warnings


# ---- Lines → calls ------------------------------------------------------------------------------------------------------


class _Reader:
    """One pass over the lines; ``calls[-1]`` is the one that is being read."""

    def __init__(self) -> None:
        self.calls = [Call()]
        self.widths: dict[str, int] = {}
        self._last_of_layer: str | None = None  # the tap whose last token the next "Stats:" line describes
        self._in_logits = False
        self._tagged: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], None]], ...] = (
            (re.compile(r"\[FORWARD START\].*start_position=(?P<start>\d+)"), self._start),
            (re.compile(r"\[INPUT TOKENS\]\s*\[(?P<ids>[\d,\s]*)\]"), self._tokens),
            (re.compile(r"\[POSITION\] Forward call \d+: seq_len=(?P<n>\d+), current_position=(?P<start>\d+)"), self._position),
            (re.compile(r"\[GET_EMB\] token=(?P<id>\d+) embedding\[0\.\.10\]=\[(?P<values>[^\]]*)\]"), self._embedding),
            (re.compile(r"\[FINAL NORM\](?P<rest>.*)"), self._final_norm),
            (re.compile(r"\[LOGITS(?: STEP \d+)?\](?P<rest>.*)"), self._logits),
            (re.compile(r"\[STEP \d+\] Selected token (?P<id>\d+)"), self._selected),
            (re.compile(r"hidden_size=(?P<E>\d+), vocab_size=(?P<V>\d+)"), self._sizes),
            (LAYER, self._layer),
        )

    @property
    def call(self) -> Call:
        return self.calls[-1]

    def line(self, text: str) -> None:
        if self._in_logits and (found := LOGIT.search(text)):
            token = int(found["a"] or found["b"] or found["c"])
            self.call.logits[token] = found["logit"]
            if found["rank"]:
                self.call.ranks[token] = int(found["rank"])
            return
        of_last, self._last_of_layer = self._last_of_layer, None
        for pattern, take in self._tagged:
            if found := pattern.search(text):
                self._in_logits = False
                take(found)
                return
        if of_last and re.search(r"\bStats:", text):
            self._stats(of_last, text, AT_LAST)

    def _open(self, kind: str) -> None:
        """An opening line: the call goes on until one of its kind was seen or a layer was computed."""
        if self.call.computed or (kind in self.call.begun and kind != "embedding"):
            self.calls.append(Call())
        self.call.begun.add(kind)

    def _start(self, found: re.Match[str]) -> None:
        self._open("start")
        self.call.start = int(found["start"])

    def _tokens(self, found: re.Match[str]) -> None:
        self._open("tokens")
        self.call.tokens = tuple(int(i) for i in found["ids"].split(",") if i.strip()) or None

    def _position(self, found: re.Match[str]) -> None:
        self._open("position")
        self.call.n, self.call.start = int(found["n"]), int(found["start"])

    def _embedding(self, found: re.Match[str]) -> None:
        self._open("embedding")
        self.call.embedded.append((int(found["id"]), _listed(found["values"])))

    def _layer(self, found: re.Match[str]) -> None:
        layer, rest = int(found[1]), found["rest"]
        values, numbers = VALUES.search(rest), STAT.search(rest)
        shown = rest[: min(m.start() for m in (values, numbers) if m)] if values or numbers else None
        if shown is None:
            return
        label = shown.strip(" \t:：,*`").lower()
        last = LAST_TOKEN.search(label)
        stem = "l_out" if last else SHOWN.get(label)
        tap = input_tap(layer) if label == INPUT else None if stem is None else f"{stem}-{layer}"
        if tap is None:
            return
        kind = label if numbers else f"{label} values"
        if (kind, tap) in self.call.labels:
            self.calls.append(Call())
        self.call.labels.add((kind, tap))
        if last:
            self._last_of_layer = tap
        if numbers:
            self._stats(tap, rest, AT_LAST if last else None)
        if width := SHAPE.search(rest):
            self.call.widths[tap.partition("-")[0]] = int(width[1])
        if values:
            self._sample(tap, _listed(values["values"]), AT_LAST if last else FIRST)

    def _final_norm(self, found: re.Match[str]) -> None:
        self._label("final norm", "result_norm", found["rest"])
        self._stats("result_norm", found["rest"], AT_LAST)
        if values := VALUES.search(found["rest"]):
            self._sample("result_norm", _listed(values["values"]), AT_LAST)

    def _logits(self, found: re.Match[str]) -> None:
        self._in_logits = True
        if STAT.search(found["rest"]):
            self._label("logits", "result_output", found["rest"])
            self._stats("result_output", found["rest"], AT_LAST)

    def _label(self, what: str, tap: str, rest: str) -> None:
        label = (what if STAT.search(rest) else f"{what} values", tap)
        if label in self.call.labels:
            self.calls.append(Call())
        self.call.labels.add(label)

    def _selected(self, found: re.Match[str]) -> None:
        self.call.selected = int(found["id"])

    def _sizes(self, found: re.Match[str]) -> None:
        self.widths |= {stem: int(found[letter]) for stem, letter in AXIS.items() if letter in "EV"}

    def _stats(self, tap: str, text: str, positions: Positions) -> None:
        found = {key.lower(): value for key, value in STAT.findall(text)}
        if found:
            digits = {key: d for key, value in found.items() if (d := decimals(value)) is not None}
            self.call.add(tap, Stats({key: number(value) for key, value in found.items()}, positions, digits))

    def _sample(self, tap: str, texts: list[str], positions: Positions) -> None:
        if texts:
            self.call.add(tap, sample(texts, range(len(texts)), len(texts), positions))


def _listed(text: str) -> list[str]:
    """The numbers of a list; nothing where one of them is no number."""
    texts = [t.strip() for t in text.split(",")]
    return texts if all(re.fullmatch(NUMBER, t, re.IGNORECASE) for t in texts) else []


def _without_a_cut_end(text: str) -> tuple[list[str], list[str]]:
    """The lines, the last one dropped where it ends without a line break and its last number has fewer digits than its like."""
    lines = text.splitlines()
    if not lines or text[-1] in "\r\n":
        return lines, []
    last = lines[-1]
    numbers = re.findall(NUMBER, last)
    alike = [line for line in lines[:-1] if re.sub(NUMBER, "#", line) == re.sub(NUMBER, "#", last)]
    usual = re.findall(NUMBER, alike[-1])[-1:] if alike else [n for n in numbers if "." in n][:1]
    short = bool(numbers and usual) and len(numbers[-1].partition(".")[2]) < len(usual[0].partition(".")[2])
    known = LAYER.search(last) or re.search(r"\[(INPUT TOKENS|FINAL NORM|LOGITS|POSITION|GET_EMB)|token", last)
    if known and (short or last.count("[") != last.count("]") or re.search(r"[=:,]\s*-?$", last)):
        return lines[:-1], [f"the last line is cut short and left out: {' '.join(last.split())[:60]!r}."]
    return lines, []
