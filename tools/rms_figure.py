"""The figure of docs/why-rms-cannot-convict.md, and its table: planted bugs beside quantizations, on the demo model.

    python -m tools.rms_figure

An engine of plain numpy runs the F16 file with one bug at a time (``benchmarks.numpy_engine``); the reference runs quantizations of the
file.  Of every run: the RMS of each layer's output against the original's, and the NMSE of each layer's output.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import quantscope
from benchmarks.numpy_engine import run as run_numpy
from benchmarks.planted import Planted
from quantscope.cli.demo import MODEL, TEXT, bundled
from quantscope.cli.main import main as command
from quantscope.diagnose.convictions import replayed
from quantscope.metrics import kl_nats, nmse, rms
from quantscope.trace import Full, Trace
from quantscope.wording import percent, sci, sig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "why-rms-cannot-convict.md"
FIGURE = PAGE.parent / "figures" / "rms.svg"
BEGIN, END = "<!-- made by python -m tools.rms_figure -->\n", "\n<!-- end -->"
N_TOKENS = 64
USUAL = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")  # whose RMS makes the band
PRESETS = (*USUAL, "Q2_K")
BUGS = {
    "RoPE base 20,000 for 10,000": Planted("rope-theta", ("Qcur", "Kcur"), detail="20000"),
    "RoPE base 500,000 for 10,000": Planted("rope-theta", ("Qcur", "Kcur"), detail="500000"),
    "positions of q one too high": Planted("rope-offset-q", ("Qcur",)),
    "RoPE pairs the wrong channels": Planted("rope-layout", ("Qcur", "Kcur")),
    "GELU for SiLU": Planted("act-gelu-tanh", ("ffn_swiglu",)),
    "attn_output transposed": Planted("weight-transposed", ("attn_out",), detail="attn_output"),
}
COLOURS = ("#d62728", "#e377c2", "#9467bd", "#8c564b", "#ff7f0e", "#1f77b4")


@dataclass(frozen=True)
class Run:
    """rms: of each layer's output, over the original's; nmse: of each layer's output; kl [nats]: mean over the positions; convicted:
    operations that local replay convicts, None for a run of the reference."""

    name: str
    rms: tuple[float, ...]
    nmse: tuple[float, ...]
    kl: float
    convicted: tuple[str, ...] | None = None


def measure() -> tuple[list[Run], list[Run]]:
    """The quantizations and the bugs."""
    model = str(bundled(MODEL))
    with quantscope.open(model) as m:
        ids = m.tokenizer.encode(bundled(TEXT).read_text("utf-8")[:2000])[:N_TOKENS]
        layers = m.config.n_layer
    original = quantscope.trace(model, tokens=ids)
    clean = []
    with tempfile.TemporaryDirectory() as folder:
        for preset in PRESETS:
            file = f"{folder}/{preset}.gguf"
            if command(["quantize", model, file, "--type", preset]):
                raise RuntimeError(f"{preset} could not be written")
            clean.append(_run(preset, original, quantscope.trace(file, tokens=ids), layers))
    bugs = []
    for name, bug in BUGS.items():
        trace = run_numpy(Path(model), ids, (bug,))
        convicted = tuple(dict.fromkeys(row.tap.rpartition("-")[0] or row.tap for row in replayed(trace, model).those("convicted")))
        bugs.append(_run(name, original, trace, layers, convicted))
    return clean, bugs


def _run(name: str, original: Trace, trace: Trace, layers: int, convicted: tuple[str, ...] | None = None) -> Run:
    pairs = [(_values(original, f"l_out-{i}"), _values(trace, f"l_out-{i}")) for i in range(layers)]
    ratios = tuple((rms(b.flatten()) / rms(a.flatten())).item() for a, b in pairs)
    errors = tuple(nmse(a.flatten(), b.flatten()).item() for a, b in pairs)
    logits = (_values(t, "result_output") for t in (original, trace))
    return Run(name, ratios, errors, kl_nats(*logits).mean().item(), convicted)


def _values(trace: Trace, tap: str) -> Tensor:
    found = trace.find(tap, Full)
    assert found is not None, tap
    return found.values.double()


def band(clean: list[Run]) -> tuple[float, float]:
    """The smallest and the largest RMS ratio of any layer of the usual quantizations."""
    ratios = [r for run in clean if run.name in USUAL for r in run.rms]
    return min(ratios), max(ratios)


def table(clean: list[Run], bugs: list[Run]) -> str:
    """A Markdown table of all runs."""
    low, high = band(clean)
    lines = [
        "| run | RMS of the layers' outputs, change | RMS within the band | NMSE, last layer | KL [nats] | convicted by local replay |"
    ]
    lines.append("|---|---|---|---:|---:|---|")
    for run in (*clean, *bugs):
        inside = "–" if run.convicted is None else "**yes**" if all(low <= r <= high for r in run.rms) else "no"
        named = "–" if run.convicted is None else ", ".join(f"`{tap}`" for tap in run.convicted)
        spread = f"{percent(min(run.rms) - 1, 2)} … {percent(max(run.rms) - 1, 2)}"
        lines.append(f"| {run.name} | {spread} | {inside} | {sci(run.nmse[-1], 2)} | {sig(run.kl, 3)} | {named} |")
    return "\n".join(lines)


def draw(clean: list[Run], bugs: list[Run], path: Path) -> None:
    """RMS on the left, where nothing tells the kinds apart; NMSE on the right."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update(
        {"svg.hashsalt": "quantscope", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    low, high = band(clean)
    layers = range(len(clean[0].rms))
    left.axhspan(100 * (low - 1), 100 * (high - 1), color="0.88", label=f"{USUAL[0]} … {USUAL[-1]}, all layers")
    colours = dict(zip((b.name for b in bugs), COLOURS, strict=True))
    for run in clean:
        left.plot(layers, [100 * (r - 1) for r in run.rms], color="0.55", linewidth=1)
        right.semilogy(layers, run.nmse, color="0.55", linewidth=1)
        right.annotate(run.name, (layers[-1], run.nmse[-1]), xytext=(4, -3), textcoords="offset points", color="0.35", fontsize=8)
    for run in bugs:
        for axes, y in ((left, [100 * (r - 1) for r in run.rms]), (right, run.nmse)):
            axes.plot(layers, y, color=colours[run.name], linewidth=1.6, marker="o", markersize=3, label=run.name)
    left.set(title="RMS of each layer's output", xlabel="layer", ylabel="change against the original")
    left.set_yscale("symlog", linthresh=1)
    right.set(title="Error of each layer's output", xlabel="layer", ylabel="NMSE")
    ticks = (-10, -1, 0, 1, 10)
    left.set_yticks(ticks, [f"{t}%".replace("-", "−") for t in ticks])
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    figure.savefig(path, metadata={"Date": None})


def written(text: str, made: str) -> str:
    """The page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{made}{END}{rest.partition(END)[2]}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    clean, bugs = measure()
    draw(clean, bugs, FIGURE)
    PAGE.write_text(written(PAGE.read_text("utf-8"), table(clean, bugs)), "utf-8")


if __name__ == "__main__":
    main()
