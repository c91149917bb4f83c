"""Which activations change the token: found where they were planted, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantscope.diagnose.activation_rounding import TAP_OF, ExactAt, _several, activation_rounding, channels
from quantscope.images import Images, Requantized
from quantscope.metrics import first_argmax
from quantscope.model.forward import forward
from quantscope.model.ggml_arithmetic import ggml_arithmetic
from quantscope.model.taps import READ_BY, tap_names
from quantscope.qtypes import QTYPES
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.huge_channel import CASES, CHANNEL, TAP, make_huge_channel
from tests.models import LINEARS, make_gguf

Q8_0_TYPE = QTYPES["Q4_0"]  # a type whose activations are rounded to Q8_0


def quantized(path: Path, qtype: str) -> Requantized:
    """The matrices in one type, as a K preset has them."""
    w = Weights(open_source(path))
    matrices = [n for n in w.names() if len(w.shape(n)) == 2]
    return Requantized(Images(w), dict.fromkeys(matrices, QTYPES[qtype]))


def exact_at(weights: Requantized, ids: torch.Tensor, places: tuple[str, ...]) -> int:
    return int(first_argmax(forward(ids, weights, arithmetic=ExactAt("F16", places))[0, -1]))


def case(tmp_path: Path, seed: int, ids: tuple[int, ...], qtype: str = "Q4_K", times: float = 300.0) -> tuple[Requantized, torch.Tensor]:
    return quantized(make_huge_channel(tmp_path / "m.gguf", seed, times), qtype), torch.tensor([ids])


@pytest.mark.parametrize(("seed", "ids"), CASES)
def test_the_planted_channel_is_found(tmp_path: Path, seed: int, ids: tuple[int, ...]) -> None:
    weights, tokens = case(tmp_path, seed, ids)
    found = activation_rounding(weights, tokens)
    assert found is not None
    assert found.places == (TAP,)
    assert found.left < 0.05
    assert not found.near_tie
    (channel,) = found.channels
    assert (channel.tap, channel.index, channel.block) == (TAP, CHANNEL, 256)
    assert channel.share > 0.99
    assert channel.times_rms > 15
    # by definition: exact there and nowhere else restores the token, everything rounded does not
    exact, rounded = (
        int(first_argmax(forward(tokens, weights, arithmetic=m)[0, -1])) for m in (ExactAt("F16", ()), ggml_arithmetic("F16"))
    )
    assert exact == rounded == found.rounded_token
    assert exact_at(weights, tokens, (TAP,)) == found.exact_token == int(first_argmax(forward(tokens, weights)[0, -1]))
    assert found.gap_rounded < 0 < found.gap_exact


def test_of_several_places_the_one_that_makes_the_error_is_named(tmp_path: Path) -> None:
    """Near a tie other places restore the token as well, by chance; they leave the error."""
    weights = quantized(make_huge_channel(tmp_path / "m.gguf", 0), "Q4_K")
    prompts = [torch.tensor([[1, a, a + 7, a + 40]]) for a in range(5, 25)]
    several = [f for ids in prompts if (f := activation_rounding(weights, ids)) is not None and len(f.alone) > 1]
    assert several
    assert all(TAP in f.places for f in several)
    assert (TAP,) in {f.places for f in several}
    assert all(f.left < 0.5 for f in several)


def test_places_that_can_be_spared_are_left_out() -> None:
    needed = {"ffn_norm-0", "attn_norm-2"}
    ranked = ["attn_norm-2", "kqv_out-1", "ffn_norm-0", "ffn_swiglu-0"]
    assert _several(ranked, needed.issubset) == ("ffn_norm-0", "attn_norm-2")
    assert _several(ranked[:2], needed.issubset) == ()


def test_blocks_of_32_do_not_change_the_token(tmp_path: Path) -> None:
    """Q8_0 activations lose 32 channels beside the huge one, Q8_K 256: llama.cpp's issue 4755 in small."""
    seed, ids = CASES[0]
    assert activation_rounding(*case(tmp_path, seed, ids, "Q4_K")) is not None
    assert activation_rounding(*case(tmp_path, seed, ids, "Q8_0")) is None


@pytest.mark.parametrize(("seed", "ids"), CASES)
def test_without_the_huge_channel_nothing_is_found(tmp_path: Path, seed: int, ids: tuple[int, ...]) -> None:
    assert activation_rounding(*case(tmp_path, seed, ids, times=1.0)) is None


def test_a_near_tie_is_called_that(tmp_path: Path) -> None:
    """Without a huge channel a token changes only where two are close, and then no channel stands out."""
    weights = quantized(make_huge_channel(tmp_path / "m.gguf", 0, 1.0), "Q4_K")
    prompts = (torch.tensor([[1, a, b]]) for a in range(5, 60) for b in (9, 77))
    found = next(f for ids in prompts if (f := activation_rounding(weights, ids)) is not None)
    assert found.near_tie
    assert max(c.times_rms for c in found.channels) < 12  # SwiGLU has 9.5; the planted channel has 20 and more


def test_several_places_when_no_single_one_is_enough(tmp_path: Path) -> None:
    """Two layers with a huge channel each: some token needs both, and neither of the two can be spared."""
    path = make_huge_channel(tmp_path / "a.gguf", 2)
    source = Weights(open_source(path))
    norm, gate, up = (source.get(f"blk.1.ffn_{x}.weight").numpy() for x in ("norm", "gate", "up"))
    edit = {"blk.0.ffn_norm.weight": norm, "blk.0.ffn_gate.weight": gate, "blk.0.ffn_up.weight": up}
    edit |= {f"blk.1.ffn_{x}.weight": v for x, v in (("norm", norm), ("gate", gate), ("up", up))}
    sizes = {"n_layer": 2, "n_embd": 256, "n_head": 4, "n_head_kv": 2, "n_ff": 256, "n_vocab": 288}
    weights = quantized(make_gguf(tmp_path / "b.gguf", seed=2, edit=edit, **sizes), "Q4_K")  # type: ignore[arg-type]
    prompts = [torch.tensor([[1, a, a + 7, a + 40]]) for a in range(5, 25)]
    both = [(ids, f) for ids in prompts if (f := activation_rounding(weights, ids)) is not None and len(f.places) == 2]
    assert both
    for ids, found in both:
        assert found.alone == ()
        assert exact_at(weights, ids, found.places) == found.exact_token
        for place in found.places:
            assert exact_at(weights, ids, tuple(p for p in found.places if p != place)) != found.exact_token


# ---- The parts ----------------------------------------------------------------------------------------------------------


def test_every_product_has_its_tap() -> None:
    of_others = {"attn_qkv", "attn_q_a", "attn_kv_a_mqa", "ffn_gate_inp", "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"}
    assert set(TAP_OF) == {*LINEARS, "output"} | of_others
    assert {f"{stem}-0" if stem != "result_norm" else stem for stem in READ_BY} <= set(tap_names(1))


def test_exact_everywhere_is_exact_but_for_the_cache(tmp_path: Path) -> None:
    weights, ids = case(tmp_path, *CASES[0])
    places = tuple(t for t in tap_names(2) if t.partition("-")[0] in READ_BY)
    exact = forward(ids, weights)
    assert torch.allclose(forward(ids, weights, arithmetic=ExactAt("F32", places)), exact, atol=1e-4)
    assert not torch.allclose(forward(ids, weights, arithmetic=ExactAt("F32", places[1:])), exact, atol=1e-4)
    assert torch.equal(forward(ids, weights, arithmetic=ExactAt("F16", ())), forward(ids, weights, arithmetic=ggml_arithmetic("F16")))


def test_the_share_of_a_channel_by_hand() -> None:
    """Two blocks of 32: the first has a peak of 127 and 31 values of 0.4, which round to 0; in the second all values are codes."""
    x = torch.zeros(1, 64)
    x[0, :32], x[0, 3] = 0.4, 127.0
    x[0, 32:], x[0, 40] = 2.0, 127.0
    (only,) = channels("attn_norm-0", x, [(Q8_0_TYPE, torch.ones(5, 64))])
    assert (only.index, only.block, only.share) == (3, 32, 1.0)
    assert only.times_rms == pytest.approx(127 / (x.square().mean().sqrt()))
    x[0, 32:39] = 2.4  # seven values that miss a code by 0.4, too
    first, second = channels("attn_norm-0", x, [(Q8_0_TYPE, torch.ones(5, 64))])
    assert (first.index, second.index) == (3, 40)
    assert first.share == pytest.approx(31 / 38, rel=1e-4)
    assert second.share == pytest.approx(7 / 38, rel=1e-4)
    silent = torch.ones(5, 64)
    silent[:, :32] = 0  # weights that do not read the first block: its error reaches no product
    (left,) = channels("attn_norm-0", x, [(Q8_0_TYPE, silent)])
    assert (left.index, left.share) == (40, 1.0)


def test_float_types_round_each_channel_by_itself() -> None:
    x = torch.tensor([[1.0, 1.0 + 2**-11, 2.0]])  # the second lies between two float16 values
    (only,) = channels("attn_norm-0", x, [(QTYPES["F16"], torch.ones(2, 3))])
    assert (only.index, only.block, only.share) == (1, 1, 1.0)
    assert channels("attn_norm-0", x, [(QTYPES["F32"], torch.ones(2, 3))]) == []
