"""Made-up studies with round numbers, for the tests of findings and reports."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from quantscope.findings import complete
from quantscope.logit_stats import all_pairs
from quantscope.results import (
    Generated,
    LayerRow,
    LogitStats,
    ModelInfo,
    NumericalFloor,
    OpRow,
    PlanInfo,
    PromptInfo,
    Study,
    TextInfo,
    Variant,
)

# name, file bytes, bpw, NMSE of layer 0, NMSE growth per layer, KL, KL's standard error, first token
PRESETS = (
    ("Q8_0", 8_500_000, 8.5, 1e-5, 1.1, 0.0004, 0.00002, " little"),
    ("Q6_K", 6_560_000, 6.56, 1e-4, 1.1, 0.0018, 0.0001, " little"),
    ("Q5_K_M", 5_700_000, 5.7, 4e-4, 1.2, 0.0071, 0.0003, " little"),
    ("Q4_K_M", 4_850_000, 4.85, 1.5e-3, 1.2, 0.031, 0.001, " little"),
    ("Q4_0", 4_550_000, 4.55, 4e-3, 1.3, 0.072, 0.002, " big\n"),
)
IDS = {" little": 396, " big\n": 512}


def rows(n_layer: int, growth: float = 1.5, offset: float = 0.0, error: tuple[float, float] | None = None) -> tuple[LayerRow, ...]:
    """Output RMS 0.1·growth^i, mean 1 % of it plus ``offset``, and an error (of layer 0, factor per layer) where given."""
    out = []
    for i in range(n_layer):
        r = 0.1 * growth**i
        nmse = None if error is None else error[0] * error[1] ** i
        out.append(
            LayerRow(
                layer=i,
                input_rms=r / growth,
                output_rms=r,
                mean=0.01 * r + offset,
                swiglu_rms=0.5 * r,
                swiglu_mean=0.004 * r,
                nmse=nmse,
                sqnr_db=None if nmse is None else -10 * math.log10(nmse),
                cos_sim=None if nmse is None else 1 - nmse / 2,
            )
        )
    return tuple(out)


def token(text: str, prob: float) -> Generated:
    original_rank = 1 if text == " little" else 3
    return Generated(text=text, id=IDS[text], logit=9.25, rank=1, rank_in_original=original_rank, prob=prob)


def original(n_layer: int = 10) -> Variant:
    return Variant(
        "F16",
        {"token_embd.weight": "F16", "output_norm.weight": "F32"},
        16_000_000,
        16.0,
        (token(" little", 0.31),),
        rows(n_layer),
        LogitStats(1275, ppl=12.5, ppl_se=0.4),
        path="demo-f16.gguf",
    )


def quantized(n_layer: int = 10) -> tuple[Variant, ...]:
    out = []
    for name, n_bytes, bpw, nmse, factor, kl, se, text in PRESETS:
        stats = LogitStats(
            n_positions=1275,
            kl_nats=kl,
            kl_nats_se=se,
            kl_nats_median=kl / 2,
            kl_nats_p99=kl * 9,
            kl_nats_max=kl * 40,
            top1_agree=1 - kl,
            top1_agree_se=0.004,
            rms_dp=kl / 3,
            ppl=12.5 * (1 + kl),
            ppl_se=0.4,
            ln_ppl_ratio=kl,
            ln_ppl_ratio_se=kl / 4,
        )
        layers = rows(n_layer, error=(nmse, factor))
        types = {"token_embd.weight": "Q6_K", "blk.0.attn_q.weight": name, "output_norm.weight": "F32"}
        out.append(Variant(name, types, n_bytes, bpw, (token(text, 0.3),), layers, stats))
    return tuple(out)


def ops(n_layer: int, nmse: float | None, n_massive: int = 0) -> tuple[OpRow, ...]:
    """Two taps a layer; ``ffn_out`` of layer 1 is the worst, and the stream of layer 2 has the massive activations."""
    out = []
    for i in range(n_layer):
        for tap, times in (("ffn_out", 5.0 if i == 1 else 2.0), ("l_out", 1.0)):
            massive = n_massive if (tap, i) == ("l_out", 2) else 0
            row = OpRow(tap, i, 1000, 0.01, 1.5, 1.4, -6.0, 7.0, 7.0, 3, 0, 17, outlier_share=0.02, n_chunks=5, rms_spread=0.03)
            error = (
                {} if nmse is None else {"nmse": nmse * times, "sqnr_db": -10 * math.log10(nmse * times), "cos_sim": 1 - nmse * times / 2}
            )
            place = {"n_massive": massive, "massive_max": 812.5, "massive_chunk": 3, "massive_position": 0, "massive_channel": 17}
            out.append(dataclasses.replace(row, **error, **(place if massive else {})))
    return tuple(out)


def long_study(n_layer: int = 10) -> Study:
    """``study`` with what a text gives besides: operations, pairs, plan, floor."""
    base = study(n_layer)
    nmse = {v.name: None if v.name == base.original else v.layers[0].nmse for v in base.variants}
    variants = tuple(dataclasses.replace(v, ops=ops(n_layer, nmse[v.name], 4 if v.name == "Q4_0" else 5)) for v in base.variants)
    noise = np.random.default_rng(1).normal(1, 0.1, (5, 255))
    noise /= noise.mean()
    kl = [np.full((5, 255), v.logits.kl_nats) * noise for v in base.quantized if v.logits and v.logits.kl_nats]
    return complete(
        dataclasses.replace(
            base,
            variants=variants,
            plan=PlanInfo(2, 3, 2, 500, 4096, 1_200_000_000, 4_000_000_000),
            floor=NumericalFloor(3e-13, 2e-12, 64),
            paired=all_pairs([v.name for v in base.quantized], kl),
            text=TextInfo("demo.txt", 12_000, 512, 5, 1275, n_chunks_given=20),
        )
    )


def study(n_layer: int = 10, **changes: object) -> Study:
    """The original and five presets; Q4_0 alone changes the token."""
    fields: dict[str, object] = {
        "version": 1,
        "original": "F16",
        "variants": (original(n_layer), *quantized(n_layer)),
        "provenance": {"quantscope": "0.1.0", "device": "cpu", "dtype": "float32", "model_sha256": "ab" * 32},
        "model": ModelInfo("demo", "llama", n_layer, 256, 4096, 8_000_000),
        "prompt": PromptInfo("Once upon a time", (1, 403, 407, 261, 378), "all", ("<s>", "▁Once", "▁upon", "▁a", "▁time")),
        "text": TextInfo("demo.txt", 2560, 512, 5, 1275),
    }
    return complete(Study(**{**fields, **changes}))  # type: ignore[arg-type]
