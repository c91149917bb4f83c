"""What to record next, when the evidence is too weak to convict an operation: which taps, how many bytes, and how in this engine.

    1. with every trace     ids, hash of the file, positions, backend, batch
    2. cheap and wide       fingerprints of embd, every l_out, result_norm and the logits, on two prompts: 64 bytes a tap, blind to nothing
    3. dear and narrow      every tap of the first bad layer, whole, on 8 tokens:       bytes = 4·T·Σ channels + 4·H·T² for the map

Step 2 finds the layer, step 3 the operation in it by replay.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from quantscope.arch.config import ModelConfig
from quantscope.arch.table import ARCHS
from quantscope.compare import Kind
from quantscope.language import mark, say
from quantscope.model.taps import EMBD, HEAD_TAPS, USUAL_TAPS
from quantscope.model.wiring import layer_wiring, tap_width
from quantscope.phrases import between, count, joined, listed, paragraph, size

N_TOKENS = 8  # of a layer recorded whole: attention needs a few keys, replay needs no more
FINGERPRINT_BYTES = 64
FLOAT_BYTES = 4
MAP = "kq_soft_max"
SHOWS_DIRECTION: tuple[Kind, ...] = ("values", "fingerprint")
SKELETON = r"^(embd|l_out-\d+|result_norm|result_output)$"


@dataclass(frozen=True)
class Wanted:
    """What is to be recorded: taps in the order of the graph, a regular expression for them, whole or as fingerprints."""

    taps: tuple[str, ...]
    pattern: str
    fingerprint: bool


def what_to_record(
    engine: str | None,
    kinds_present: Collection[Kind],
    taps_present: Collection[str],
    first_bad_layer: int | None,
    config: ModelConfig | None = None,
    model: str = "MODEL",
) -> list[str]:
    """Sentences, in the order in which to do it; none where whole tensors of the bad layer are there.

    engine: as a trace names it.  kinds_present: kinds of evidence in the trace.  taps_present: its taps.  first_bad_layer: where it parts
    from the reference, if that is known.  config: for the number of layers and the sizes.
    """
    wide = _skeleton(kinds_present, taps_present, config)
    narrow = _layer(kinds_present, taps_present, first_bad_layer, config)
    if wide is None and narrow is None:
        return []
    how = _way(engine)
    sentences = [] if set(kinds_present) & set(SHOWS_DIRECTION) else [say(ALWAYS)]
    both = wide is not None and narrow is not None
    if wide is not None:
        sentences += [_wide(FIRST_WIDE if both else WIDE, wide, config), *how(wide, model)]
    if narrow is not None:
        sentences += [_narrow(narrow, first_bad_layer, config, then=both), *how(narrow, model)]
    return sentences


ALWAYS = mark(
    "With every trace note the token ids, the sha256 of the file, the positions, the backend (CPU, Metal, CUDA) and the batch size: "
    "without them a difference proves nothing."
)


# ---- Which taps --------------------------------------------------------------------------------------------------------------


USUAL = tuple(tap for tap in USUAL_TAPS if not tap.endswith("_normed"))


def skeleton_taps(config: ModelConfig | None) -> tuple[str, ...]:
    """embd, every l_out, result_norm, result_output."""
    layers = ("l_out-i",) if config is None else tuple(f"l_out-{i}" for i in range(config.n_layer))
    return (EMBD, *layers, *HEAD_TAPS)


def layer_taps(layer: int, config: ModelConfig | None) -> tuple[str, ...]:
    """The input of a layer and all its taps in the order of the graph; after the last layer (layer = n_layer) those of the head."""
    if config is not None and layer >= config.n_layer:
        return (f"l_out-{config.n_layer - 1}", *HEAD_TAPS)
    before = EMBD if layer == 0 else f"l_out-{layer - 1}"
    stems = USUAL if config is None else layer_wiring(config, layer, _tensors(config))
    return (before, *(f"{tap}-{layer}" for tap in stems))


def _tensors(config: ModelConfig) -> set[str]:
    """Local names of the tensors that a layer of this architecture always has."""
    return {row.name for row in ARCHS[config.arch].layer if row.needed and row.exists(config, None)}


def layer_bytes(taps: Sequence[str], config: ModelConfig, n_tokens: int = N_TOKENS) -> int:
    """Bytes of these taps, whole, in float32."""
    stems = [tap.rpartition("-")[0] or tap for tap in taps]
    channels = sum(tap_width(config, tap) for tap, stem in zip(taps, stems, strict=True) if stem != MAP)
    return FLOAT_BYTES * n_tokens * (channels + stems.count(MAP) * config.n_head * n_tokens)


def _skeleton(kinds: Collection[Kind], present: Collection[str], config: ModelConfig | None) -> Wanted | None:
    """The skeleton where nothing shows directions, else what is missing of it."""
    taps = skeleton_taps(config)
    if set(kinds) & set(SHOWS_DIRECTION):
        taps = tuple(tap for tap in taps if tap not in present) if config is not None else ()
    return Wanted(taps, SKELETON, True) if taps else None


def _layer(kinds: Collection[Kind], present: Collection[str], layer: int | None, config: ModelConfig | None) -> Wanted | None:
    """The first bad layer, unless it is there in whole tensors; of an unknown one only where nothing shows directions."""
    if layer is None:
        return None if set(kinds) & set(SHOWS_DIRECTION) else Wanted((), r"^l_out-|-I$", False)
    taps = layer_taps(layer, config)
    missing = taps if "values" not in kinds else tuple(tap for tap in taps if tap not in present)
    before = f"{taps[0]}|" if taps[0] != f"l_out-{layer}" else ""
    pattern = rf"^({before}.*-{layer})$" if taps[1] != HEAD_TAPS[0] else f"^({'|'.join(taps)})$"
    return Wanted(missing, pattern, False) if missing else None


# ---- Sentences ---------------------------------------------------------------------------------------------------------------


WIDE = mark(
    "Record fingerprints of {taps} on two prompts, at all positions: {cost}. They show every kind of difference and find the first "
    "bad layer."
)
FIRST_WIDE = mark(
    "First record fingerprints of {taps} on two prompts, at all positions: {cost}. They show every kind of difference and find the first "
    "bad layer."
)


def _wide(template: str, wanted: Wanted, config: ModelConfig | None) -> str:
    if config is None:
        cost = say("{n} bytes a tap", n=FINGERPRINT_BYTES)
    else:
        cost = say("{n} bytes a tap, {size} a prompt", n=FINGERPRINT_BYTES, size=size(FINGERPRINT_BYTES * len(wanted.taps)))
    return say(template, taps=listed(_shortened(wanted.taps)), cost=cost)


def _shortened(taps: Sequence[str]) -> list[str]:
    """Runs of layers as their ends: `l_out-0` to `l_out-21`."""
    layers = [tap for tap in taps if tap.startswith("l_out-")]
    if len(layers) < 4:
        return [f"`{tap}`" for tap in taps]
    numbers = [int(tap.partition("-")[2]) for tap in layers]
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        return [f"`{tap}`" for tap in taps]
    run = between(f"`{layers[0]}`", f"`{layers[-1]}`")
    first = taps.index(layers[0])
    return [*(f"`{t}`" for t in taps[:first]), run, *(f"`{t}`" for t in taps[first + len(layers) :])]


def _narrow(wanted: Wanted, layer: int | None, config: ModelConfig | None, *, then: bool) -> str:
    """``Record layer 3 in full on 8 tokens ...``; then: after the fingerprints."""
    if not wanted.taps:
        tokens = _on_tokens(None if config is None else say("{size} a layer", size=size(layer_bytes(layer_taps(0, config), config))))
        if then:
            return say(
                "Then record the first layer whose `l_out` differs in full, its input and all its taps, on {tokens} (I: its number).",
                tokens=tokens,
            )
        return say(
            "Record the first layer whose `l_out` differs in full, its input and all its taps, on {tokens} (I: its number).", tokens=tokens
        )
    cost = [count(len(wanted.taps), "tap"), *([] if config is None else [size(layer_bytes(wanted.taps, config))])]
    facts = {
        "what": say("layer {layer}", layer=layer) if layer is not None and wanted.taps[-1] not in HEAD_TAPS else say("the head"),
        "tokens": count(N_TOKENS, "token"),
        "cost": joined(cost),
        "taps": joined(f"`{tap}`" for tap in wanted.taps),
    }
    if then:
        return say("Then record {what} in full on {tokens} ({cost}), in this order: {taps}. Replay then convicts the operation.", **facts)
    return say("Record {what} in full on {tokens} ({cost}), in this order: {taps}. Replay then convicts the operation.", **facts)


def _on_tokens(cost: str | None) -> str:
    tokens = count(N_TOKENS, "token")
    return tokens if cost is None else joined([tokens, cost])


# ---- How, by engine ----------------------------------------------------------------------------------------------------------

Way = Callable[[Wanted, str], list[str]]


def _traced(engine: str, wanted: Wanted, model: str) -> str:
    flags = "--fingerprint --prompt TEXT" if wanted.fingerprint else "--tokens IDS"
    return f"`quantscope trace {shlex.quote(model)} --engine {engine} --taps {shlex.quote(wanted.pattern)} {flags}`"


def _llama_cpp(wanted: Wanted, model: str) -> list[str]:
    logged = f"`llama-eval-callback -m {shlex.quote(model)} -p TEXT -fa off > run.log 2>&1`"
    own = say(
        "A build of your own: {log}, then `quantscope import run.log`; it prints samples and sums of every tap.",
        log=logged,
    )
    return [say("For llama.cpp: {command}.", command=_traced("llama.cpp", wanted, model)), *([own] if wanted.fingerprint else [])]


def _transformers(wanted: Wanted, model: str) -> list[str]:
    return [say("For Transformers: {command}.", command=_traced("transformers", wanted, model))]


def _rustorch(wanted: Wanted, model: str) -> list[str]:
    if not wanted.fingerprint:
        arrays = say("For RusTorch: write them under these names with the crate safetensors, float32, positions first.")
        return [paragraph([arrays, say(READ_ARRAYS)])]
    printing = say(
        "For RusTorch: copy the Rust function `qsfp` of docs/fingerprints.md and print its line for each of these taps, as in `{code}`.",
        code='eprintln!("{}", qsfp(&format!("l_out-{}", layer), &hidden))',
    )
    log = say(
        "Of its debug log the lines `[INPUT TOKENS]`, `[POSITION]`, `[GET_EMB]`, `[LAYER i] Input`, `[LAYER i] First 10 values`, "
        "`[LAYER i] After FFN Residual (Layer Output)`, `[FINAL NORM]` and `[LOGITS STEP 0]` count; statistics alone cannot show that "
        "signals agree."
    )
    return [paragraph([printing, say(READ_LINES)]), log]


def _any(wanted: Wanted, model: str) -> list[str]:
    if wanted.fingerprint:
        lines = say(
            "Copy the function `qsfp` of docs/fingerprints.md (C, Rust, Swift, JavaScript) and print its line for each of these taps."
        )
        return [paragraph([lines, say(READ_LINES)])]
    arrays = say("Write them as float32 arrays, positions first, under these names to a safetensors or npz file.")
    return [paragraph([arrays, say(READ_ARRAYS)])]


READ_LINES = mark("Read the log with `quantscope import LOG -o T.safetensors`.")
READ_ARRAYS = mark("Read them with `quantscope import FILE --model MODEL --tokens IDS -o T.safetensors` (docs/importing.md).")
WAYS: dict[str, Way] = {"llama.cpp": _llama_cpp, "transformers": _transformers, "rustorch": _rustorch}


def _way(engine: str | None) -> Way:
    return WAYS.get((engine or "").lower(), _any)
