"""examples/study.ipynb, from the cells below, executed: ``python -m tools.notebook``; a test runs the cells again."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "examples" / "study.ipynb"
CELLS = (
    """# A study and a diagnosis in a notebook

On the model that comes with quantscope: a Llama of 10 layers, trained on English books. Run it in the repository's folder:
`pip install 'quantscope[pandas]' jupyterlab`.""",
    """import quantscope

MODEL, TEXT = "quantscope/data/demo-f16.gguf", "quantscope/data/demo.txt"
model = quantscope.open(MODEL)
model""",
    "What does each quantization change? The types are made in memory; everything below is run with exact arithmetic.",
    """study = quantscope.study(MODEL, types=["Q4_0", "Q4_K_M", "Q8_0"], prompt="It was a dark and stormy", text=TEXT, ctx=128, chunks=4)
study""",
    "The same numbers as pandas frames: `variants`, `types`, `layers`, `ops`, `logits`, `generated`, `paired`, `engines`.",
    """frames = study.to_pandas()
frames["logits"][["variant", "n_positions", "kl_nats", "kl_nats_se", "top1_agree", "ppl"]].round(5)""",
    """frames["layers"].pivot(index="layer", columns="variant", values="nmse").drop(columns="demo-f16")""",
    """Now an engine with a bug: a small one in plain numpy (`benchmarks/numpy_engine.py`), told to rotate with the RoPE base 500,000.
Such a bug keeps the RMS of the layers where a quantization would leave it ([why](../docs/why-rms-cannot-convict.md)).""",
    """from pathlib import Path

from benchmarks.numpy_engine import run
from benchmarks.planted import Planted

ids = model.tokenizer.encode("It was a dark and stormy night")
broken = run(Path(MODEL), ids, [Planted("rope-theta", ("Qcur", "Kcur"), detail="500000")])""",
    """diagnosis = quantscope.diagnose(MODEL, broken)
diagnosis""",
    "Every piece of evidence, with its floor:",
    """diagnosis.to_pandas()["evidence"][["id", "conclusion", "value", "floor"]]""",
    "model.close()",
)


def notebook() -> nbformat.NotebookNode:
    """The cells without outputs.  Code is what begins like code; ids are numbers, so that the file is the same each time."""
    made = new_notebook()
    for i, text in enumerate(CELLS):
        code = text.startswith(("import ", "from ", "frames", "study", "diagnosis", "model"))
        made.cells.append(new_code_cell(text, id=f"cell-{i}") if code else new_markdown_cell(text, id=f"cell-{i}"))
    made.metadata = nbformat.from_dict({"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    return made


def executed() -> nbformat.NotebookNode:
    """With outputs; raises CellExecutionError when a cell fails."""
    made = notebook()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    NotebookClient(made, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # times of day
    return made


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    nbformat.write(executed(), FILE)
