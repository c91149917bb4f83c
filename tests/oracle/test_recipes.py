"""The presets against llama.cpp: its schema snapshots of published models, its selection on random models, its quantizer on files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from quantscope.qtypes import QTYPES, QuantType, qtype
from quantscope.recipes import (
    KEPT,
    KEPT_BY_ARCH,
    KEPT_NAMES,
    PRESETS,
    Q8_BY_ARCH,
    ModelFacts,
    Options,
    Override,
    TensorShape,
    assign_types,
    facts_from_gguf,
    is_quantizable,
)
from quantscope.sources.gguf import open_gguf
from tests.oracle.llama_quant import quantized_types, selected_types
from tests.oracle.source_tree import llama_cpp_source

# ---------------------------------------------------------------- schema snapshots

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
FFN = ("ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Published:
    """What a snapshot does not say about its model: the architecture's name, and rows that are not n_embd long.

    layer: the matrices of every layer of a dense model; without it the names come from the snapshot's own MXFP4_MOE section, which lists
    every matrix that is no stack of experts, plus ``experts`` in each layer that has routed experts.
    """

    arch: str
    rows: Mapping[str, int] = field(default_factory=dict)  # local name → row length, from the model's published config.json
    layer: Sequence[str] = ()
    tied: bool = False
    experts: Sequence[str] = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


PUBLISHED = {
    "meta-llama-3.1-70b-instruct": Published("llama", {"ffn_down": 28672}, layer=(*ATTENTION, *FFN)),
    "qwen3-0.6b": Published("qwen3", {"attn_output": 2048, "ffn_down": 3072}, layer=(*ATTENTION, *FFN)),
    "qwen3-14b": Published("qwen3", {"ffn_down": 17408}, layer=(*ATTENTION, *FFN)),
    "gemma-3-4b-it": Published("gemma3", {"attn_output": 2048, "ffn_down": 10240}, layer=(*ATTENTION, *FFN), tied=True),
    "qwen3.6-27b": Published("qwen35", {"attn_output": 6144, "ssm_out": 6144, "ffn_down": 17408}),
    "qwen3.5-397b-a17b": Published(
        "qwen35moe", {"attn_output": 8192, "ssm_out": 8192, "ffn_down_exps": 1024, "ffn_down_shexp": 1024}
    ),
    "qwen3-coder-next": Published("qwen3next", {"attn_output": 4096, "ssm_out": 4096, "ffn_down_exps": 512, "ffn_down_shexp": 512}),
    "gpt-oss-120b": Published("gpt-oss", {"attn_output": 4096}),
    "glm-4.6v": Published(
        "glm4moe", {"attn_output": 12288, "ffn_down": 10944, "ffn_down_exps": 1408, "ffn_down_shexp": 1408}
    ),
    "step-3.5-flash": Published(
        "step35", {"attn_output": 8192, "ffn_down": 11264, "ffn_down_exps": 1280, "ffn_down_shexp": 1280}
    ),
    "nvidia-nemotron-3-nano-30b-a3b": Published(
        "nemotron_h_moe",
        {"attn_output": 4096, "ssm_out": 4096, "ffn_down_exps": 1856, "ffn_down_shexp": 3712},
        experts=("ffn_up_exps", "ffn_down_exps"),
    ),
    "deepseek-v3.1": Published(
        "deepseek2",
        {
            "attn_q_b": 1536, "attn_k_b": 128, "attn_v_b": 512, "attn_output": 16384,
            "ffn_down": 18432, "ffn_down_exps": 2048, "ffn_down_shexp": 2048,
        },
    ),
}  # fmt: skip
UNQUANTIZED = ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm", "ffn_gate_inp", "ssm_conv1d", "rope_freqs")


@dataclass(frozen=True)
class Snapshot:
    header: Mapping[str, int]
    sections: Mapping[str, tuple[QuantType, Mapping[str, QuantType]]]  # preset → (default, name → other type)


def read_snapshot(path: Path) -> Snapshot:
    lines = path.read_text("utf-8").splitlines()
    header = {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", lines[1])}
    sections: dict[str, tuple[QuantType, dict[str, QuantType]]] = {}
    for line in filter(None, lines[2:]):
        first, second = line.split()
        if first.startswith("["):
            sections[first.strip("[]")] = (qtype(second), current := {})
        else:
            current[first] = qtype(second)
    return Snapshot(header, sections)


def tensors_of(model: Published, snapshot: Snapshot) -> Iterator[TensorShape]:
    """The model's matrices, and a few tensors of every layer that stay as they are."""
    n_layer, n_expert = snapshot.header["n_layer"], snapshot.header.get("n_expert", 0)
    if model.layer:
        names = {f"blk.{i}.{local}.weight" for i in range(n_layer) for local in model.layer}
        names |= {"token_embd.weight"} | (set() if model.tied else {"output.weight"})
    else:
        names = {name for _, others in snapshot.sections.values() for name in others}
        with_experts = {int(m[1]) for name in names if (m := re.match(r"blk\.(\d+)\.ffn_down_exps", name))}
        names |= {f"blk.{i}.{local}.weight" for i in with_experts for local in model.experts}
        if model.arch == "deepseek2":
            names |= {f"blk.{i}.attn_{x}_b.weight" for i in range(n_layer) for x in "kv"}
    for name in sorted(names):
        local = name.split(".")[-2]
        stack = n_expert if local.endswith("_exps") else snapshot.header["n_head"] if local in ("attn_k_b", "attn_v_b") else 0
        yield TensorShape(name, (*((stack,) if stack else ()), 64, model.rows.get(local, snapshot.header["n_embd"])))
    for i in range(n_layer):
        yield from (TensorShape(f"blk.{i}.{local}.weight", (8, 512) if "norm" not in local else (512,)) for local in UNQUANTIZED[:-1])
    yield TensorShape("rope_freqs.weight", (64,))


@pytest.mark.parametrize("name", PUBLISHED)
def test_snapshots(name: str) -> None:
    snapshot = read_snapshot(llama_cpp_source() / "tests" / "snapshots" / f"{name}.schema")
    h = snapshot.header
    facts = ModelFacts(PUBLISHED[name].arch, h["n_layer"], h["n_head"], h["n_head_kv"], h.get("n_expert", 0))
    tensors = list(tensors_of(PUBLISHED[name], snapshot))
    matrices = [t for t in tensors if is_quantizable(t, facts.arch)]
    assert len(tensors) - len(matrices) == len(UNQUANTIZED[:-1]) * h["n_layer"] + 1
    assert set(snapshot.sections) == set(PRESETS)
    compared = 0
    for preset, (default, others) in snapshot.sections.items():
        assert PRESETS[preset].qtype == default
        got = assign_types(preset, tensors, facts)
        assert set(others) <= {t.name for t in matrices}
        wanted = {t.name: QTYPES["F32"] for t in tensors} | {t.name: others.get(t.name, default) for t in matrices}
        assert {n: str(t) for n, t in got.items()} == {n: str(t) for n, t in wanted.items()}, preset
        compared += len(matrices)
    assert compared >= 33 * 100


def test_every_snapshot_is_covered() -> None:
    found = {p.stem for p in (llama_cpp_source() / "tests" / "snapshots").glob("*.schema")}
    assert found == set(PUBLISHED)


# ---------------------------------------------------------------- llama.cpp's selection on random models

ARCHS = ("llama", "qwen2", "qwen3", "gemma3", "falcon", "glm5-next", "bailingmoe3", "rwkv7", "gemma3n", "bert", "lfm2")
ROWS = (32, 64, 96, 128, 172, 256, 512, 768, 2880)
LOCAL = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_kv_b", "attn_output", "attn_q_a", "attn_q_b", "attn_k_b", "attn_v_b", "attn_kv_a_mqa",
    "ffn_up", "ffn_gate", "ffn_down", "ffn_down_exps", "ffn_up_exps", "ffn_gate_exps", "ffn_gate_inp", "ffn_down_shexp", "ssm_in",
    "ssm_out", "ssm_conv1d", "ssm_beta", "time_mix_w1", "attn_rel_b", "nextn.eh_proj", "indexer.attn_k",
    "shortconv.conv", "laurel_l", "altup_proj",
)  # fmt: skip
GLOBAL = ("output", "per_layer_token_embd", "per_layer_model_proj", "position_embd", "token_types", "output_norm", "v.patch_embd", "mm.0")


def in_order(tensors: Sequence[TensorShape]) -> list[TensorShape]:
    """By layer, then by name: the order in which llama.cpp keeps its tensors."""
    return sorted(tensors, key=lambda t: (int(m[1]) if (m := re.match(r"blk\.(\d+)\.", t.name)) else -1, t.name))


@st.composite
def random_models(draw: st.DrawFn) -> tuple[ModelFacts, list[TensorShape]]:
    arch = draw(st.sampled_from(ARCHS))
    n_layer = draw(st.integers(1, 40) | st.sampled_from([48, 80] if arch == "llama" else [48, 81]))
    n_head_kv = draw(st.sampled_from([0, 1, 2, 4, 8]))
    facts = ModelFacts(arch, n_layer, draw(st.sampled_from([8, 16, 32])), n_head_kv, draw(st.sampled_from([0, 0, 2, 4, 8, 8, 64])))
    row = st.sampled_from(ROWS)
    tensors = [TensorShape(f"{g}.weight", (16, draw(row))) for g in draw(st.sets(st.sampled_from(GLOBAL)))]
    tensors.append(TensorShape("token_embd.weight", (16, draw(row))))
    layer = [(name, draw(row), draw(st.sampled_from([None, 1, 4]))) for name in sorted(draw(st.sets(st.sampled_from(LOCAL), min_size=1)))]
    for i in range(n_layer):
        keep = draw(st.integers(0, len(layer))) if draw(st.integers(0, 5)) == 0 else len(layer)
        for name, n, stack in layer[:keep]:
            tensors.append(TensorShape(f"blk.{i}.{name}.weight", (*((stack,) if stack else ()), 16, n)))
    return facts, in_order(tensors)


TYPES = st.sampled_from([QTYPES[n] for n in ("Q4_0", "Q5_K", "Q8_0", "F16", "IQ4_XS", "Q6_K", "MXFP4")])
PATTERNS = st.sampled_from(["attn_v", "ffn_.*", r"blk\.(0|1|2)\.", "output", "token_embd", "per_layer", r"\d\d", "exps?"])
OPTIONS = st.builds(
    Options,
    overrides=st.lists(st.builds(Override, PATTERNS, TYPES), max_size=2).map(tuple),
    output_type=st.none() | TYPES,
    embedding_type=st.none() | TYPES,
    pure=st.booleans(),
)  # not leave_output: this entry to llama.cpp does not see tensors it must not quantize, and takes the model for one with a tied head
QUANTIZED = [name for name, preset in PRESETS.items() if preset.qtype.is_quantized]
MIXTRAL = ModelFacts("llama", 32, 32, 8, 8)
MIXTRAL_TENSORS = in_order(
    [TensorShape(f"blk.{i}.{n}.weight", (4, 16, 256) if "exps" in n else (16, 256)) for i in range(32) for n in LOCAL[:15]]
    + [TensorShape("output.weight", (16, 256)), TensorShape("token_embd.weight", (16, 256))]
)


@example((MIXTRAL, MIXTRAL_TENSORS))
@example((ModelFacts("falcon", 32, 32, 8), MIXTRAL_TENSORS))
@example((ModelFacts("llama", 80, 64, 8), MIXTRAL_TENSORS))
@example((ModelFacts("llama", 80, 64, 64), MIXTRAL_TENSORS))
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(random_models())
def test_selection_of_every_preset(model: tuple[ModelFacts, list[TensorShape]]) -> None:
    facts, tensors = model
    wanted = selected_types(list(PRESETS), tensors, facts)
    for preset in PRESETS:
        assert assign_types(preset, tensors[::-1], facts) == wanted[preset], preset
    assert len(wanted) == 33


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(random_models(), OPTIONS, st.sampled_from(QUANTIZED))
def test_selection_with_options(model: tuple[ModelFacts, list[TensorShape]], options: Options, preset: str) -> None:
    facts, tensors = model
    assert assign_types(preset, tensors, facts, options) == selected_types([preset], tensors, facts, options)[preset]


@pytest.mark.parametrize("arch", ["llama", "glm5-next", "bert"])
def test_which_tensors_are_quantized_at_all(arch: str) -> None:
    parts = {*KEPT, *KEPT_NAMES, *KEPT_BY_ARCH["glm5-next"], *Q8_BY_ARCH["glm5-next"], *LOCAL}
    names = {*parts, *(f"blk.0.{p.strip('.')}" for p in parts), *(f"v.blk.0.{p.strip('.')}.1" for p in parts)}
    shapes = [(64,), (1, 64), (2, 64), (1, 1, 64), (2, 1, 64), (1, 2, 64), (64, 1)]
    tensors = [TensorShape(n if n.endswith("weight") else f"{n}.weight", (4, 64)) for n in sorted(names)]
    tensors += [TensorShape(f"blk.1.shape{i}.weight", shape) for i, shape in enumerate(shapes)]
    tensors += [TensorShape("blk.1.attn_q.bias", (4, 64)), TensorShape("blk.1.weights", (4, 64))]
    facts = ModelFacts(arch, 2, 8, 8)
    tensors = in_order(list(dict.fromkeys(tensors)))
    wanted = selected_types(["Q5_1"], tensors, facts)["Q5_1"]
    kept = {name for name, t in wanted.items() if t == QTYPES["F32"]}
    assert 30 < len(kept) < len(wanted) - 30
    assert {t.name for t in tensors if not is_quantizable(t, arch)} == kept
    assert assign_types("Q5_1", tensors, facts) == wanted


# ---------------------------------------------------------------- llama_model_quantize on files


def write_model(
    path: Path, arch: str, n_layer: int, n_embd: int, n_ff: int, *, tied: bool, heads: tuple[int, int], n_expert: int = 0
) -> Path:
    """A model of few rows: the quantizer checks no shapes, only the rows' length matters to it."""
    rng = np.random.default_rng(n_layer * n_embd)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(heads[0])
    writer.add_head_count_kv(heads[1])
    writer.add_key_length(32)
    writer.add_value_length(32)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    if n_expert:
        writer.add_expert_count(n_expert)
        writer.add_expert_used_count(2)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))

    for name in ("token_embd.weight",) if tied else ("output.weight", "token_embd.weight"):
        add(name, 4, n_embd)
    add("output_norm.weight", n_embd)
    for i in reversed(range(n_layer)):  # not in the order in which the rules count
        for local in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{local}.weight", n_embd)
        for local in (*ATTENTION, "ffn_gate", "ffn_up"):
            stack = (n_expert,) if n_expert and local.startswith("ffn") else ()
            add(f"blk.{i}.{local}{'_exps' if stack else ''}.weight", *stack, 2, n_embd)
        add(f"blk.{i}.ffn_down{'_exps' if n_expert else ''}.weight", *((n_expert,) if n_expert else ()), 2, n_ff)
        if arch == "qwen2":
            add(f"blk.{i}.attn_q.bias", 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FILES = {
    "llama-1": {"arch": "llama", "n_layer": 1, "n_embd": 256, "n_ff": 512, "tied": False, "heads": (8, 8)},
    "llama-5-tied": {"arch": "llama", "n_layer": 5, "n_embd": 64, "n_ff": 172, "tied": True, "heads": (8, 4)},
    "qwen2-8-tied": {"arch": "qwen2", "n_layer": 8, "n_embd": 256, "n_ff": 96, "tied": True, "heads": (8, 2)},
    "qwen3-10": {"arch": "qwen3", "n_layer": 10, "n_embd": 512, "n_ff": 256, "tied": False, "heads": (8, 1)},
    "llama-22": {"arch": "llama", "n_layer": 22, "n_embd": 256, "n_ff": 160, "tied": False, "heads": (8, 2)},
    "llama-33": {"arch": "llama", "n_layer": 33, "n_embd": 256, "n_ff": 256, "tied": False, "heads": (32, 8)},
    "llama-80": {"arch": "llama", "n_layer": 80, "n_embd": 256, "n_ff": 256, "tied": False, "heads": (64, 8)},
    "llama-80-no-gqa": {"arch": "llama", "n_layer": 80, "n_embd": 256, "n_ff": 256, "tied": False, "heads": (8, 8)},
    "qwen2-80": {"arch": "qwen2", "n_layer": 80, "n_embd": 256, "n_ff": 256, "tied": False, "heads": (64, 8)},
    "mixtral": {"arch": "llama", "n_layer": 16, "n_embd": 256, "n_ff": 256, "tied": False, "heads": (8, 2), "n_expert": 8},
}
NEEDS_MATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}  # when K-quants fit the rows


@pytest.mark.parametrize(("name", "imatrix"), [*((n, False) for n in FILES), *((n, True) for n in FILES)])
def test_files_quantized_by_llama_cpp(tmp_path: Path, name: str, imatrix: bool) -> None:
    path = write_model(tmp_path / "model.gguf", **FILES[name])
    source = open_gguf(path)
    facts = facts_from_gguf(source.metadata)
    tensors = [TensorShape(t.name, t.shape, t.qtype) for t in source.tensors.values()]
    compared = 0
    for preset in PRESETS:
        options = Options(imatrix=imatrix)
        wanted = quantized_types(path, tmp_path / "out.gguf", preset, options)
        if wanted is None:
            assert not imatrix, preset
            assert preset in NEEDS_MATRIX
            continue
        got = assign_types(preset, tensors, facts, options)
        assert got == wanted, preset
        compared += 1
    assert compared >= (33 if imatrix else 33 - len(NEEDS_MATRIX))


def test_files_with_options(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", **FILES["qwen3-10"])
    source = open_gguf(path)
    tensors = [TensorShape(t.name, t.shape, t.qtype) for t in source.tensors.values()]
    overrides = (Override(r"blk\.(0|9)\.attn_v", QTYPES["Q8_0"]), Override("attn_v|ffn_up", QTYPES["Q5_K"]))
    tried = [
        Options(overrides=overrides),
        Options(pure=True),
        Options(leave_output=True),
        Options(output_type=QTYPES["Q8_0"], overrides=overrides),
    ]
    for options in (*tried, Options(embedding_type=QTYPES["F16"])):
        wanted = quantized_types(path, tmp_path / "out.gguf", "Q4_K_M", options)
        assert wanted is not None
        assert assign_types("Q4_K_M", tensors, facts_from_gguf(source.metadata), options) == wanted
