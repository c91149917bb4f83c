"""docs/architectures.md, from the table of architectures: ``python -m tools.arch_table`` writes it, a test sees that it is fresh.

The figures are those of docs/architectures.json, a run of ``python -m benchmarks.architectures``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantscope.arch.names import HF_TYPES
from quantscope.arch.spec import ArchSpec
from quantscope.arch.table import ARCHS

FILE = Path(__file__).parent.parent / "docs" / "architectures.md"
FIGURES = FILE.with_suffix(".json")
HEAD = """# Architectures

{n} architectures of GGUF files and {n_types} model types of Hugging Face folders, all with every tap. Each is a row of data
(`quantscope/arch/table.py`, `quantscope/arch/names.py`) and no code of its own; "beside Llama" is what its row says. Made by `python -m
tools.arch_table`.

Figures: the largest NMSE of the logits against {llama_cpp} and Transformers {transformers}, over {models} small random models in F32 with
an F32 cache, those of llama.cpp's own `test-llama-archs` among them (`python -m benchmarks.architectures`, {date}). "Exact" is the
reference in float32; "emulated" has the roundings of ggml's CPU code (`--arithmetic ggml`), whose GELU is a table of float16: that is why
exact GELU differs by 1e−8 to 1e−7.

| `general.architecture` | beside Llama | exact | emulated | `model_type` | Transformers |
|---|---|---|---|---|---|
"""
FOOT = """
A file of another architecture is refused, and so is one of these with a metadata key or tensor that its row cannot express; the error
names it. `quantscope sensitivity`, `recipe` and `quantize --correct` take models without latent attention.

`--engine transformers` observes every model type of this table at the taps of the reference, found by the names of its tensors
([why](decisions/0065-transformers-taps.md)): NMSE ≤ 1e−12 at every tap of small random models. One module computes the experts, so that
`ffn_moe_gate`, `ffn_moe_up`, `ffn_moe_swiglu` and `ffn_moe_down` are not shown, nor are the router's `ffn_moe_probs` and Qwen2-MoE's
`ffn_shexp_out`, nor the products q and k of a model that clamps them (OLMo, MPT); a trace says in its notes which it lacks. In bfloat16 its
roundings are emulated to the bit for Llama, Mistral, Qwen2, Qwen3, SmolLM3, Seed-OSS, Hunyuan (dense), GLM-4 and Phi-3.
"""
ROUTER, LEAD = "ffn_gate_inp.weight", "leading_dense_block_count"
ACTIVATIONS = {"gelu": "GELU", "relu2": "ReLU²", "swiglu_oai": "clamped SwiGLU"}
PARTS = {  # what a tensor says
    ROUTER: "experts",
    "ffn_gate_shexp.weight": "shared experts",
    "exp_probs_b.bias": "biased routing",
    "attn_sinks.weight": "sinks",
    "attn_kv_a_norm.weight": "latent attention",
    "position_embd.weight": "learned positions",
    "token_embd_norm.weight": "normed embedding",
}
KEYS = {  # what a metadata key says
    "attention.sliding_window": "window",
    "attn_logit_softcapping": "soft-capped scores",
    "final_logit_softcapping": "soft-capped logits",
    "attention.clamp_kqv": "clamped q, k and v",
    "attention.max_alibi_bias": "ALiBi",
    "embedding_scale": "scales",
    "logit_scale": "scaled logits",
    "attention.temperature_scale": "temperature by position",
    "use_parallel_residual": "attention and FFN side by side or in turn",
}


def table() -> str:
    """The whole file."""
    found = json.loads(FIGURES.read_text("utf-8"))
    facts = {key: found[key] for key in ("transformers", "models", "date")}
    head = HEAD.format(n=len(ARCHS), n_types=len(HF_TYPES), llama_cpp=found["llama.cpp"], **facts)
    return f"{head}{chr(10).join(_row(spec, found) for spec in ARCHS.values())}\n{FOOT}"


def _row(spec: ArchSpec, found: Mapping[str, Any]) -> str:
    types = [t for t, names in HF_TYPES.items() if names.arch == spec.name]
    errors = [found["transformers_exact"][t] for t in types]
    cells = (
        f"`{spec.name}`",
        ", ".join(dict.fromkeys(features(spec))),
        _sig(found["llama_cpp_exact"][spec.name]),
        _sig(found["llama_cpp_emulated"][spec.name]),
        ", ".join(f"`{t}`" for t in types),
        _sig(max(errors)) if errors else "",
    )
    return f"| {' | '.join(cells)} |"


def features(spec: ArchSpec) -> Iterator[str]:
    """What an architecture has that Llama does not, in words."""
    b, rows = spec.block, (*spec.top, *spec.layer)
    tensors, needed = {row.name for row in rows}, {row.name for row in rows if row.needed}
    if b.norm == "layer":
        yield "LayerNorm"
    if b.parallel:
        yield "attention and FFN side by side"
    if b.attn_post_norm:
        yield "norms after" if b.attn_norm else "norms only after"
    if "attn_q_norm.weight" in tensors:
        yield "q and k normed" + (" after RoPE" if b.qk_norm == "after" else "") + (" over all heads" if b.qk_norm_over == "all" else "")
    if "ffn_gate.weight" not in tensors and not b.fused and "ffn_gate_exps.weight" not in tensors:
        yield "FFN without gate"
    if b.activation != "silu":
        yield ACTIVATIONS[b.activation]
    if {"attn_q.bias", "attn_output.bias"} & needed:
        yield "biases"
    if b.fused:
        yield "gate and up in one matrix"
    either = "ffn_down.weight" in tensors and LEAD not in spec.reads  # a file without experts is one of these too
    yield from (f"{words}, if any" if either and name == ROUTER else words for name, words in PARTS.items() if name in tensors)
    yield from (words for key, words in KEYS.items() if key in spec.reads)
    if spec.rope is None:
        yield "no RoPE" if "position_embd.weight" in tensors else "ALiBi"
    if spec.mrope:
        yield "multi-section RoPE"


def _sig(x: float) -> str:
    return f"{x:.0e}".replace("e-", "e−").replace("e−0", "e−")


if __name__ == "__main__":
    FILE.write_text(table(), encoding="utf-8")
