"""How near the reference comes to llama.cpp and to Transformers in every architecture: ``python -m benchmarks.architectures``.

Writes docs/architectures.json, from which ``python -m tools.arch_table`` makes docs/architectures.md.  Small random models in F32 with an
F32 cache: those of llama.cpp's own ``test-llama-archs``, those of tests/arch_models.py (attention far from uniform), and Transformers'.
The largest NMSE of the logits over the models of an architecture counts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.llama_programs import arch_models
from quantscope.arch.table import ARCHS
from quantscope.engines.llama_session import LlamaSession
from quantscope.metrics import nmse
from quantscope.model.forward import forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests import arch_models as own
from tests import hf_arch_models as hf

FILE = Path(__file__).parent.parent / "docs" / "architectures.json"
N_TOKENS, SEED = 40, 1234
NO_GRAPH = ("refact-moe",)  # llama.cpp loads its experts and computes without them


def main() -> None:
    exact: dict[str, float] = {}
    emulated: dict[str, float] = {}
    transformers: dict[str, float] = {}
    n_models = 0
    with tempfile.TemporaryDirectory() as folder:
        for path in _models(Path(folder)):
            arch, errors = against_llama_cpp(path)
            n_models += 1
            exact[arch], emulated[arch] = max(exact.get(arch, 0.0), errors[0]), max(emulated.get(arch, 0.0), errors[1])
        for i, case in enumerate(hf.CASES):
            model_type = hf.CASES[case][0]
            error = against_transformers(Path(folder) / f"hf{i}", case)
            transformers[model_type] = max(transformers.get(model_type, 0.0), error)
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "llama.cpp": f"llama-cpp-python {version('llama-cpp-python')}",
        "transformers": version("transformers"),
        "models": n_models,
        "llama_cpp_exact": exact,
        "llama_cpp_emulated": emulated,
        "transformers_exact": transformers,
    }
    FILE.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _models(folder: Path) -> Iterator[Path]:
    """llama.cpp's own models of the architectures of the table, and ours."""
    for path in sorted(arch_models(folder / "theirs", SEED).glob("*.gguf")):
        if open_source(path).metadata["general.architecture"] in ARCHS and path.stem not in NO_GRAPH:
            yield path
    for i, case in enumerate(own.CASES):
        yield own.make_arch(folder / f"own{i}.gguf", case)


def against_llama_cpp(path: Path) -> tuple[str, tuple[float, float]]:
    """(architecture, NMSE of the logits in exact and in emulated arithmetic)."""
    weights = Weights(open_source(path))
    ids = np.random.default_rng(7).integers(0, weights.config.n_vocab, N_TOKENS).tolist()
    with LlamaSession(path, n_ctx=N_TOKENS) as llama:
        theirs = torch.from_numpy(llama.decode(ids)).flatten()
    x = torch.tensor([ids])
    exact, emulated = forward(x, weights), forward(x, weights, arithmetic=ggml_arithmetic("F32"))
    return weights.config.arch, (float(nmse(theirs, exact.flatten())), float(nmse(theirs, emulated.flatten())))


def against_transformers(folder: Path, case: str) -> float:
    model = hf.make_hf_arch(folder, case)
    ids = torch.from_numpy(np.random.default_rng(3).integers(0, 288, (1, N_TOKENS)))
    with torch.no_grad():
        theirs = model(ids).logits
    return float(nmse(theirs.flatten(), forward(ids, Weights(open_source(folder))).flatten()))


if __name__ == "__main__":
    main()
