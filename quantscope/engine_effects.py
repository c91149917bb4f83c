"""Other engines on the files of a study: what the engine changes, beside what the quantization and the engine's known arithmetic change.

    original, exact → (quantization) → file, exact → (engine) → engine on that file        predicted: file, exact → emulated arithmetic

Each engine runs in a process of its own on the study's prompt; one that fails or dies is a row that says so, and the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from quantscope.compare import compare
from quantscope.engines import ENGINES, Request, check
from quantscope.engines.isolated import run_isolated
from quantscope.engines.reference import trace
from quantscope.errors import EngineError, MissingExtraError, QuantscopeError, UsageError
from quantscope.explain import answer, rotation
from quantscope.language import ENGLISH, language
from quantscope.monitor import Monitor
from quantscope.results import EngineRow, EngineRun
from quantscope.three_way import LAYERS, three_way
from quantscope.trace import Trace
from quantscope.variants import Lineup

MOST_TOKENS = 64  # of a text that an engine is run on where there is no prompt
GGML = "llama.cpp"  # the engine whose arithmetic is emulated


def check_engines(engines: Sequence[str]) -> None:
    """UsageError for an engine that does not exist, or for the reference, which every study runs."""
    for name in engines:
        check(Request(name, "", ()))
        if name == "reference":
            others = ", ".join(n for n in ENGINES if n != "reference")
            raise UsageError(f"--engine reference: every study runs the reference, expected another engine: {others}.")


def engine_runs(lineup: Lineup, tokens: Sequence[int], engines: Sequence[str], monitor: Monitor) -> tuple[EngineRun, ...]:
    """Every engine on every file of the line-up, in the order of the tables."""
    ids = tuple(tokens)
    first = lineup.candidates[0]
    predict = GGML in engines
    original = trace(first.path, ids, predict=predict) if lineup.has_original and first.path else None
    runs: list[EngineRun] = []
    steps = len(lineup.candidates) * len(engines)
    monitor.begin("engines", steps, steps * len(ids))
    for c in lineup.candidates:
        assert c.path is not None  # the command refuses engines beside variants in memory
        exact = original if c is first and original is not None else trace(c.path, ids, predict=predict)
        for name in engines:
            monitor.step("engines", len(runs), f"{name} on {c.member.name}")
            runs.append(_run(name, c.member.name, c.path, exact, None if c is first else original))
    monitor.step("engines", steps, "")
    return tuple(runs)


def _run(engine: str, variant: str, path: str, exact: Trace, original: Trace | None) -> EngineRun:
    """One engine on one file; a failure is data."""
    assert exact.origin.tokens is not None
    request = Request(engine, path, exact.origin.tokens)
    try:
        with TemporaryDirectory(prefix="quantscope-engine-") as folder:
            theirs = run_isolated(request, Path(folder) / "t.safetensors")
        c = compare(exact, theirs)
        rows = three_way(exact, theirs, original=original, every=True)
    except MissingExtraError:
        raise  # the user's to install, and the same for every file
    except QuantscopeError as e:
        return EngineRun(variant, engine, failure=f"{'' if isinstance(e, EngineError) else type(e).__name__ + ': '}{e}")
    with language(ENGLISH):  # kept in study.json
        turned = rotation(exact, theirs, c)
        said = answer(c) + (f" RoPE: {turned}" if turned else "")
    split = tuple(EngineRow(r.tap, r.quantization, r.engine, r.predicted) for r in rows)
    layers = tuple(row for row in split if LAYERS.fullmatch(row.tap))
    return EngineRun(variant, engine, theirs.origin.engine_version, c.first_divergence is None, said, None, layers, split)
