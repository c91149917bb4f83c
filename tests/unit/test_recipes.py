"""The presets: known facts of published models, fallbacks, overrides, refusals.  tests/oracle/test_recipes.py has llama.cpp's word."""

from __future__ import annotations

import pytest

from quantscope.errors import UnsupportedTypeError, UsageError
from quantscope.qtypes import QTYPES
from quantscope.recipes import (
    FALLBACK,
    PRESETS,
    RULES,
    ModelFacts,
    Options,
    Override,
    TensorShape,
    assign_types,
    facts_from_gguf,
    fallback,
    is_quantizable,
    parse_override,
    preset_name,
    unmatched_overrides,
)

# Llama-3-8B: 32 layers, 32 query heads on 8 key/value heads
LLAMA_8B = ModelFacts("llama", 32, 32, 8)
SHAPES = {
    "attn_q": (4096, 4096),
    "attn_k": (1024, 4096),
    "attn_v": (1024, 4096),
    "attn_output": (4096, 4096),
    "ffn_gate": (14336, 4096),
    "ffn_up": (14336, 4096),
    "ffn_down": (4096, 14336),
}


def llama(n_layer: int, *, tied: bool = False, row: int | None = None) -> list[TensorShape]:
    """Layers first and backwards: the order in the file must not matter."""
    tensors = [TensorShape(f"blk.{i}.{n}.weight", (s[0], row or s[1])) for i in reversed(range(n_layer)) for n, s in SHAPES.items()]
    tensors += [TensorShape(f"blk.{i}.attn_norm.weight", (4096,)) for i in range(n_layer)]
    tensors += [] if tied else [TensorShape("output.weight", (128256, row or 4096))]
    return [*tensors, TensorShape("token_embd.weight", (128256, row or 4096))]


def layers_with(types: dict[str, str], local: str, name: str) -> list[int]:
    return sorted(int(key.split(".")[1]) for key, t in types.items() if key.endswith(f".{local}.weight") and t == name)


def types_of(preset: str, tensors: list[TensorShape], facts: ModelFacts = LLAMA_8B, options: Options = Options()) -> dict[str, str]:  # noqa: B008
    return {name: str(t) for name, t in assign_types(preset, tensors, facts, options).items()}


def test_q4_k_m_of_llama_3_8b() -> None:
    types = types_of("Q4_K_M", llama(32))
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert layers_with(types, "attn_v", "Q6_K") == layers_with(types, "ffn_down", "Q6_K") == more
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == "Q4_K"
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert {t for n, t in types.items() if n.split(".")[-2] in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up")} == {"Q4_K"}


@pytest.mark.parametrize(
    ("preset", "attn_v", "ffn_down", "attn_output", "rest"),
    [
        ("Q2_K", {"Q4_K": 32}, {"Q3_K": 32}, {"Q3_K": 32}, "Q2_K"),
        ("Q3_K_S", {"Q3_K": 32}, {"Q3_K": 32}, {"Q3_K": 32}, "Q3_K"),
        ("Q3_K_M", {"Q5_K": 2, "Q4_K": 30}, {"Q5_K": 2, "Q4_K": 30}, {"Q4_K": 32}, "Q3_K"),
        ("Q3_K_L", {"Q5_K": 32}, {"Q5_K": 32}, {"Q5_K": 32}, "Q3_K"),
        ("Q4_K_S", {"Q5_K": 4, "Q4_K": 28}, {"Q5_K": 4, "Q4_K": 28}, {"Q4_K": 32}, "Q4_K"),
        ("Q5_K_M", {"Q6_K": 16, "Q5_K": 16}, {"Q6_K": 16, "Q5_K": 16}, {"Q5_K": 32}, "Q5_K"),
        ("Q6_K", {"Q6_K": 32}, {"Q6_K": 32}, {"Q6_K": 32}, "Q6_K"),
        ("Q4_0", {"Q4_0": 32}, {"Q4_0": 32}, {"Q4_0": 32}, "Q4_0"),
        ("Q8_0", {"Q8_0": 32}, {"Q8_0": 32}, {"Q8_0": 32}, "Q8_0"),
        ("F16", {"F16": 32}, {"F16": 32}, {"F16": 32}, "F16"),
    ],
)
def test_mixtures(preset: str, attn_v: dict[str, int], ffn_down: dict[str, int], attn_output: dict[str, int], rest: str) -> None:
    types = types_of(preset, llama(32))
    for local, wanted in (("attn_v", attn_v), ("ffn_down", ffn_down), ("attn_output", attn_output), ("ffn_up", {rest: 32})):
        assert {name: n for name in QTYPES if (n := len(layers_with(types, local, name)))} == wanted, local
    assert types["token_embd.weight"] == rest
    assert types["output.weight"] == {"Q8_0": "Q8_0", "F16": "F16"}.get(preset, "Q6_K")


def test_embeddings_that_are_the_head_get_its_type() -> None:
    assert types_of("Q4_K_M", llama(2, tied=True))["token_embd.weight"] == "Q6_K"
    assert types_of("Q8_0", llama(2, tied=True))["token_embd.weight"] == "Q8_0"


def test_rows_that_no_block_fills_fall_back() -> None:
    types = types_of("Q4_K_M", llama(1, row=64))  # 64 = 2 · 32
    assert (types["blk.0.attn_q.weight"], types["blk.0.attn_v.weight"], types["output.weight"]) == ("Q5_0", "Q8_0", "Q8_0")
    assert set(types_of("Q4_K_M", llama(1, row=172)).values()) == {"F16", "F32"}  # 172 = 5.375 · 32
    for name, smaller in FALLBACK.items():
        assert QTYPES[name].block_size == 256
        assert QTYPES[smaller].block_size == 32
        assert str(fallback(QTYPES[name], 512)) == name
        assert str(fallback(QTYPES[name], 96)) == smaller
        assert str(fallback(QTYPES[name], 100)) == "F16"


def test_70b_and_8_experts_get_more_bits_for_attn_v() -> None:
    assert types_of("Q3_K_S", llama(80), ModelFacts("llama", 80, 64, 8))["blk.40.attn_v.weight"] == "Q5_K"
    assert types_of("Q3_K_S", llama(80), ModelFacts("llama", 80, 64, 64))["blk.40.attn_v.weight"] == "Q3_K"
    mixtral = types_of("Q4_K_M", llama(32), ModelFacts("llama", 32, 32, 8, n_expert=8))
    assert (mixtral["blk.9.attn_v.weight"], mixtral["blk.9.attn_k.weight"], mixtral["blk.9.attn_output.weight"]) == ("Q8_0", "Q8_0", "Q5_K")


def test_only_matrices_named_weight_are_quantized() -> None:
    def touched(name: str, *shape: int) -> bool:
        return is_quantizable(TensorShape(name, shape), "llama")

    assert touched("blk.0.attn_q.weight", 8, 64)
    assert touched("blk.0.ffn_up_exps.weight", 4, 8, 64)
    assert not touched("blk.0.attn_q.bias", 8, 64)
    assert not touched("blk.0.attn_q.weight", 64)
    assert not touched("blk.0.attn_q.weight", 1, 1, 64)
    assert not touched("blk.0.ffn_gate_inp.weight", 8, 64)
    assert not touched("blk.0.attn_q_norm.weight", 8, 64)
    assert not touched("position_embd.weight", 8, 64)


def test_what_is_not_quantized_keeps_its_own_type() -> None:
    half = TensorShape("blk.0.attn_norm.weight", (64,), QTYPES["BF16"])
    assert types_of("Q4_0", [half]) == {"blk.0.attn_norm.weight": "BF16"}


def test_overrides() -> None:
    overrides = (parse_override(r"blk\.(0|1)\.FFN=q8_0"), parse_override("ffn_down=F16"))
    types = types_of("Q4_K_M", llama(8), options=Options(overrides=overrides))
    assert types["blk.0.ffn_down.weight"] == types["blk.1.ffn_up.weight"] == "Q8_0"  # the first that matches wins
    assert types["blk.2.ffn_down.weight"] == "F16"
    assert types["blk.2.ffn_up.weight"] == "Q4_K"
    assert (
        types_of("Q4_K_M", llama(1, row=64), options=Options(overrides=(Override("attn_q", QTYPES["Q4_K"]),)))["blk.0.attn_q.weight"]
        == "Q5_0"
    )


def test_output_and_embedding_types_win_over_overrides() -> None:
    everything = (Override(".", QTYPES["Q4_0"]),)
    options = Options(everything, output_type=QTYPES["Q8_0"], embedding_type=QTYPES["F16"])
    types = types_of("Q4_K_M", llama(1), options=options)
    assert (types["output.weight"], types["token_embd.weight"], types["blk.0.attn_v.weight"]) == ("Q8_0", "F16", "Q4_0")
    assert types_of("Q4_K_M", llama(1, tied=True), options=Options(output_type=QTYPES["Q8_0"]))["token_embd.weight"] == "Q8_0"


def test_pure_and_leave_output() -> None:
    pure = types_of("Q4_K_M", llama(8), options=Options(pure=True))
    assert set(pure.values()) == {"Q4_K", "F32"}
    left = types_of("Q4_K_M", llama(8), options=Options(leave_output=True))
    assert (left["output.weight"], left["token_embd.weight"]) == ("F32", "Q4_K")


def test_names_of_presets() -> None:
    assert [preset_name(x) for x in ("q4_k", "Q4_K_M", "q8_0", "Q3_K")] == ["Q4_K_M", "Q4_K_M", "Q8_0", "Q3_K_M"]
    with pytest.raises(UsageError, match="unknown quantization 'Q4_K_XL', expected one of F32, F16, "):
        preset_name("Q4_K_XL")
    assert len({p.file_type for p in PRESETS.values()}) == len(PRESETS) == 33


def test_refused_overrides() -> None:
    for text in ("attn_v", "=Q4_0", "attn_v="):
        with pytest.raises(UsageError, match="expected regex=type"):
            parse_override(text)
    with pytest.raises(UsageError, match="no regular expression"):
        parse_override("attn(v=Q4_0")
    with pytest.raises(UnsupportedTypeError, match="Q9_9"):
        parse_override("attn_v=Q9_9")
    with pytest.raises(UsageError, match="quantized presets only"):
        assign_types("F16", llama(1), LLAMA_8B, Options(overrides=(Override("attn_v", QTYPES["Q8_0"]),)))


def test_overrides_without_a_tensor_are_found() -> None:
    names = ["blk.0.attn_v.weight", "output.weight"]
    misspelt, good = Override("attn_vv", QTYPES["Q8_0"]), Override(r"attn_v\.", QTYPES["Q8_0"])
    assert unmatched_overrides([misspelt, good], iter(names)) == [misspelt]


def test_facts_from_a_header() -> None:
    header = {"general.architecture": "x", "x.block_count": 4, "x.attention.head_count": [8, 0], "x.expert_count": 8}
    assert facts_from_gguf(header) == ModelFacts("x", 4, 8, 8, 8)
    assert facts_from_gguf({**header, "x.attention.head_count_kv": [0, 2]}).n_group == 0
    assert facts_from_gguf({}) == ModelFacts("", 0, 0, 0, 0)


def test_every_rule_names_known_presets_and_types() -> None:
    for rule in RULES:
        assert set(rule.presets.split()) <= set(PRESETS)
        assert rule.qtype is None or rule.qtype in QTYPES
