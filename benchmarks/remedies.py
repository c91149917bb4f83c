"""Corrected quantizations beside llama-quantize's, judged by the real llama.cpp on a text that no correction has seen.

    python -m benchmarks.remedies --text CALIBRATION --held-out OTHER [--model FILE ...] [--presets Q4_K_M,Q4_0,Q3_K_M | all]
                                  [--correct rounding | equalize,rounding,norms,bias ...] [--chunks 80] [--json FILE]

For each model, preset and set of corrections three files: llama-quantize's bytes, those with an importance matrix of the calibration text
(llama-quantize --imatrix's bytes), and the corrected ones, which have the same types (and size, but for biases).  KL(original ‖ file) is
the mean over the second half of every held-out chunk, as llama-perplexity scores, both from llama.cpp's own logits; beside it the same by
exact arithmetic.  ratio = Σ corrected / Σ imatrix over the chunks, with the 95 % interval of a ratio of paired chunk means (delta method,
Student's t); "worse" where that interval is above 1.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import machine
from quantscope.cli.demo import MODEL, bundled
from quantscope.engines.llama_session import LlamaSession
from quantscope.errors import UsageError
from quantscope.metrics import kl_nats
from quantscope.model.forward import forward
from quantscope.quants.codes import LAYOUTS
from quantscope.recipes import PRESETS, preset_name
from quantscope.remedy.calibration import calibration
from quantscope.remedy.correct import HEAD, correct
from quantscope.remedy.export import export
from quantscope.remedy.original import original
from quantscope.remedy.recipe_file import Recipe
from quantscope.remedy.types import choose_types
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import from_source
from quantscope.weights import Weights

HEADER = ("model", "preset", "corrections", "measured by", "bytes", "plain", "imatrix", "corrected", "corrected / imatrix (95 %)", "target")
TARGETS = {"Q4_K_M": 0.75, "Q4_0": 0.70, "Q3_K_M": 0.70}  # of the ratio


def held_out(model: Path, path: Path, n_ctx: int, n_chunks: int) -> Tensor:
    """ids [C,T], each chunk beginning with BOS."""
    source = open_source(model)
    tokenizer = from_source(source)
    ids = tokenizer.encode(path.read_text("utf-8"))[: n_ctx * n_chunks]
    rows = torch.tensor(ids[: len(ids) // n_ctx * n_ctx]).reshape(-1, n_ctx)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        rows[:, 0] = tokenizer.bos_id
    return rows


def engine_logits(model: Path, ids: Tensor) -> list[Tensor]:
    """Of the second half of each chunk, by llama.cpp."""
    n = ids.shape[1]
    with LlamaSession(model, n_ctx=n, kv="F16", n_threads=2) as llama:
        return [torch.from_numpy(llama.decode(chunk.tolist()))[n // 2 : -1] for chunk in ids]


@torch.no_grad()
def exact_logits(model: Path, ids: Tensor) -> list[Tensor]:
    weights, n = Weights(open_source(model), keep=True), ids.shape[1]
    return [forward(chunk[None], weights)[0, n // 2 : -1] for chunk in ids]


def kls(base: Sequence[Tensor], test: Sequence[Tensor]) -> np.ndarray:
    """Mean KL [nats] of each chunk."""
    return np.array([float(kl_nats(a, b).mean()) for a, b in zip(base, test, strict=True)])


def ratio(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Σa/Σb and its 95 % interval: SE = √(Σ(a_c − r·b_c)²/(n(n−1)))/b̄."""
    from scipy.stats import t

    n, r = len(a), float(a.sum() / b.sum())
    se = math.sqrt(float(np.square(a - r * b).sum()) / (n * (n - 1))) / float(b.mean())
    half = float(t.ppf(0.975, n - 1)) * se
    return r, r - half, r + half


def every_preset() -> list[str]:
    """Those whose types can all be corrected or stay floating-point, each file once."""
    return [name for name, preset in PRESETS.items() if preset.qtype.name in LAYOUTS and name == preset_name(name)]


def files(
    model: Path, preset: str, methods: Sequence[str], text: Path, folder: Path, n_ctx: int
) -> tuple[dict[str, Path], Mapping[str, Any]]:
    """The three files, and what the correction did."""
    source = open_source(model)
    whole, weights = original(source), Weights(source, keep=True)
    ids, elsewhere = calibration(source, weights.config, text, n_ctx)
    start = time.perf_counter()
    types = choose_types(whole, Recipe(preset), [], imatrix=True)
    wanted = {name: qtype for name, qtype in types.types.items() if qtype.name in LAYOUTS}
    done = correct(weights, wanted, ids, elsewhere, methods=methods)
    seconds = time.perf_counter() - start

    def importance(name: str) -> np.ndarray | None:
        """That of the calibration text; llama-imatrix leaves out the head."""
        found = None if name == HEAD else done.importance.get(name)
        return None if found is None else found.numpy()

    paths = {kind: folder / f"{preset}-{kind}.gguf" for kind in ("plain", "imatrix", "corrected")}
    try:
        plain_types = choose_types(whole, Recipe(preset), [], imatrix=False)
        export(whole, paths["plain"], plain_types.types, plain_types.file_type)
    except UsageError:  # llama-quantize refuses such few bits without an importance matrix, too
        del paths["plain"]
    export(whole, paths["imatrix"], types.types, types.file_type, importance=importance)
    export(whole, paths["corrected"], types.types, types.file_type, importance=importance, **done.arrays())
    kept = {method: [row.kept for row in done.rows if row.correction == method] for method in methods}
    facts = {"kept": {method: f"{sum(rows)}/{len(rows)}" for method, rows in kept.items()}, "seconds": seconds}
    return paths, facts | {"calibration_tokens": ids.numel()}


def measured(given: argparse.Namespace, model: Path, preset: str, methods: str, folder: Path, held: Held) -> list[dict[str, Any]]:
    """Two rows, by llama.cpp and by exact arithmetic."""
    paths, facts = files(model, preset, methods.split(","), given.text, folder, given.ctx)
    rows = []
    for who, (logits, base) in held.by.items():
        kl = {kind: kls(base, logits(path, held.ids)) for kind, path in paths.items()}
        means, sizes = {kind: float(k.mean()) for kind, k in kl.items()}, {kind: path.stat().st_size for kind, path in paths.items()}
        row = {"model": model.stem, "preset": preset, "correct": methods, "by": who, "kl": means, "bytes": sizes}
        rows.append(row | {"ratio": ratio(kl["corrected"], kl["imatrix"])} | facts)
    return rows


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    r, low, high = row["ratio"]
    target = f"≤ {TARGETS[row['preset']]:.2f}" if row["by"] == "llama.cpp" and row["preset"] in TARGETS else ""
    cells = [row["model"], row["preset"], row["correct"], row["by"], f"{row['bytes']['corrected']:,}"]
    cells += [f"{row['kl'][kind]:.3g}" if kind in row["kl"] else "–" for kind in ("plain", "imatrix", "corrected")]
    return f"| {' | '.join([*cells, f'{r:.3f} ({low:.3f} … {high:.3f})' + (' worse' if low > 1 else ''), target])} |"


class Held:
    """The held-out text, and the original's logits on it by each way of running."""

    def __init__(self, model: Path, path: Path, n_ctx: int, n_chunks: int) -> None:
        self.ids = held_out(model, path, n_ctx, n_chunks)
        self.by = {who: (run, run(model, self.ids)) for who, run in (("llama.cpp", engine_logits), ("exact", exact_logits))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", help="a floating-point file; may be repeated")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--presets", default="Q4_K_M,Q4_0,Q3_K_M")
    parser.add_argument("--correct", action="append", help="may be repeated")
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=80)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{machine()}; {given.chunks} held-out chunks of {given.ctx} tokens\n\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for model in given.model or [bundled(MODEL)]:
        held = Held(model, given.held_out, given.ctx, given.chunks)
        for preset in every_preset() if given.presets == "all" else given.presets.split(","):
            for methods in given.correct or ["rounding"]:
                with tempfile.TemporaryDirectory(prefix="quantscope-remedies-") as folder:
                    new = measured(given, model, preset, methods, Path(folder), held)
                rows += new
                print("\n".join(line(row) for row in new), flush=True)
                if given.json:
                    given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
