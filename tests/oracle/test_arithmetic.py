"""The emulated arithmetic against ggml itself: single products of every type, single operations of a model, whole models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
import torch

from quantscope.engines.llama_session import LlamaSession
from quantscope.model.forward import KVCache, forward
from quantscope.model.ggml_arithmetic import KVType, ggml_arithmetic
from quantscope.model.taps import Recorder, stem_of
from quantscope.qtypes import QTYPES, QuantType
from quantscope.quants import decode, encode
from quantscope.quants.activations import round_activations
from quantscope.quants.dots import product
from quantscope.quants.float_dots import float_product
from quantscope.quants.float_ops import softmax, swiglu
from quantscope.quants.integers import LAYOUTS
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.hf_models import make_hf
from tests.models import make_gguf
from tests.oracle import ggml
from tests.oracle.ggml_cpu import SAME_ORDER, mul_mat
from tests.oracle.llama_quant import quantized_types

DEMO = Path(__file__).resolve().parents[2] / "quantscope" / "data" / "demo-f16.gguf"
MAX_NMSE = 1e-9  # the order of summation and nothing else
OTHER_ORDER = ("NVFP4", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0")  # types whose sums ggml orders in a way of their own
SHAPES = ((1, 16), (2, 40), (3, 24), (5, 33), (9, 40), (33, 33), (34, 48))  # rows of activations, of weights
ROUND: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"F32": lambda x: x, "F16": torch.Tensor.half, "BF16": torch.Tensor.bfloat16}
PRESETS = ("F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")


def nmse(ref: np.ndarray, test: np.ndarray) -> float:
    ref, test = ref.astype(np.float64), test.astype(np.float64)
    assert ref.size > 0
    return float(((ref - test) ** 2).sum() / (ref**2).sum())


def activations(n_rows: int, K: int, seed: int = 0) -> np.ndarray:
    """Heavy tails, an outlier, and a row of zeros in front of the last."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((n_rows, K)) * np.exp(rng.standard_normal((n_rows, K)))).astype(np.float32)
    x[0, 7] = -90.0
    x[-2:-1] = 0
    return x


def quantized(n_out: int, K: int, qtype: QuantType, seed: int = 0) -> np.ndarray:
    """Rows of weights as ggml encodes them, with an importance matrix of ones where the type needs one: uint8 [O, bytes of a row]."""
    w = np.random.default_rng(seed + 1).standard_normal((n_out, K)).astype(np.float32)
    raw, ones = np.empty((n_out, qtype.row_bytes(K)), np.uint8), np.ones(K, np.float32)
    matrix = ones.ctypes.data if ggml.library().ggml_quantize_requires_imatrix(qtype.id) else None
    assert ggml.library().ggml_quantize_chunk(qtype.id, w.ctypes.data, raw.ctypes.data, 0, n_out, K, matrix) == raw.size
    return raw


def is_interleaved(name: str, n_out: int) -> bool:
    return SAME_ORDER and LAYOUTS[name].interleaved and n_out % 8 == 0


def same_bits_expected(name: str, n_rows: int, n_out: int) -> bool:
    """Where ggml's own order is followed."""
    if not SAME_ORDER or name in OTHER_ORDER:
        return False
    if LAYOUTS[name].activation == "Q8_K":
        return n_rows >= 8 or name not in ("Q2_K", "IQ1_S", "IQ1_M")
    return name not in ("IQ4_NL", "MXFP4") or is_interleaved(name, n_out)


def test_every_type_of_ggml_is_here() -> None:
    """The types whose activations are rounded to 8 bits, as ggml's table of them says."""
    floats = {"F32", "F16", "BF16"}
    intermediate = {"Q8_1", "Q8_K"}
    numbers = {"I8", "I16", "I32", "I64", "F64"}
    assert set(LAYOUTS) == set(QTYPES) - floats - intermediate - numbers


@pytest.mark.parametrize("name", LAYOUTS)
def test_products_of_every_type(name: str) -> None:
    qtype, same = QTYPES[name], 0
    for n_rows, n_out in SHAPES:
        x, raw = activations(n_rows, 512, n_rows), quantized(n_out, 512, qtype, n_rows)
        ours = product(x, raw, qtype)
        theirs = mul_mat(raw.reshape(-1), qtype, x, repack=is_interleaved(name, n_out))
        assert nmse(theirs, ours) <= MAX_NMSE, (name, n_rows, n_out)
        if same_bits_expected(name, n_rows, n_out):
            assert np.array_equal(theirs, ours), (name, n_rows, n_out, nmse(theirs, ours))
            same += 1
        unrounded = x @ decode(raw.reshape(-1), qtype).reshape(n_out, 512).T
        assert nmse(theirs, unrounded) > 100 * MAX_NMSE  # the bound tells rounded activations from exact ones
    assert same or not SAME_ORDER or name in OTHER_ORDER


@pytest.mark.parametrize("name", ROUND)
def test_products_of_float_types(name: str) -> None:
    qtype = QTYPES[name]
    for n_rows, n_out in ((1, 16), (5, 12), (33, 40)):
        x, raw = activations(n_rows, 256, n_rows), encode(activations(n_out, 256, 9), qtype, 256)
        rounded, w = ROUND[name](torch.from_numpy(x)).float().numpy(), decode(raw, qtype).reshape(n_out, 256)
        ours, theirs = float_product(rounded, w, by_rows=n_rows == 1), mul_mat(raw, qtype, x)
        assert nmse(theirs, ours) <= MAX_NMSE
        if SAME_ORDER and (name, n_rows) != ("BF16", 1):
            assert np.array_equal(theirs, ours), (name, n_rows, nmse(theirs, ours))


@pytest.mark.parametrize(("kind", "weights"), [("Q8_0", "Q8_0"), ("Q8_1", "Q4_1"), ("Q8_K", "Q6_K")])
def test_activations_are_rounded_to_the_same_codes(kind: str, weights: str) -> None:
    """A matrix that selects one activation after the other shows ggml's codes times its scales."""
    K = 256
    x = activations(12, K, 3)
    a = round_activations(x, kind)
    values = (a.codes.reshape(len(a.codes), a.scales.shape[1], -1) * a.scales[..., None]).reshape(-1, K)[:12]
    identity = encode(np.eye(K, dtype=np.float32) * 127, QTYPES[weights], K)
    steps = decode(identity, QTYPES[weights]).reshape(K, K)
    assert np.count_nonzero(steps) == K  # one weight in each row
    theirs = mul_mat(identity, QTYPES[weights], x) / steps.diagonal()
    assert nmse(theirs, values) <= 1e-13
    assert nmse(theirs, x) > 1e-7


def test_ties_between_codes_go_to_even() -> None:
    """127 is the greatest of the block, so that x itself is the code before rounding."""
    x = np.zeros((2, 32), np.float32)
    x[0, :8] = 127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5
    x[1] = -x[0]
    identity = encode(np.eye(32, dtype=np.float32) * 127, QTYPES["Q8_0"], 32)
    assert np.array_equal(mul_mat(identity, QTYPES["Q8_0"], x)[0, :8] / 127, [127, 0, 2, 2, 0, -2, -2, 126])
    assert np.array_equal(round_activations(x, "Q8_0").codes[:2, :8], [[127, 0, 2, 2, 0, -2, -2, 126], [-127, 0, -2, -2, 0, 2, 2, -126]])


def traces(
    path: Path, ids: list[int], kv: KVType, missing: tuple[str, ...] = ()
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Taps of llama.cpp, of the emulation and of the exact forward, flat.  missing: taps that llama.cpp need not have."""
    with LlamaSession(path, kv=kv) as llama:
        theirs, logits = llama.taps(ids)
        assert np.array_equal(llama.decode(ids), logits)  # observing every node changes nothing
    weights, ours, exact = Weights(open_source(path)), Recorder(), Recorder()
    forward(torch.tensor([ids]), weights, ours, arithmetic=ggml_arithmetic(kv))
    forward(torch.tensor([ids]), weights, exact)
    assert set(ours.taps) == set(exact.taps)
    assert {stem_of(name) for name in set(theirs) ^ set(ours.taps)} <= set(missing)
    flat = [{name: np.asarray(taps[name]).reshape(-1) for name in theirs} for taps in (theirs, ours.taps, exact.taps)]
    return flat[0], flat[1], flat[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def make(preset: str) -> Path:
        path = folder / f"{preset}.gguf"
        if not path.exists():
            assert quantized_types(DEMO, path, preset) is not None
        return path

    return make


def ids_of(n: int) -> list[int]:
    return np.random.default_rng(7).integers(0, 4096, n).tolist()


@pytest.mark.parametrize("kv", ["F16", "F32"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_whole_model(preset: str, kv: KVType, model: Callable[[str], Path]) -> None:
    """Bit for bit where the order of summation is the same; elsewhere flipped roundings add up, to less than exact arithmetic misses."""
    theirs, ours, exact = traces(model(preset), ids_of(40), kv)
    if SAME_ORDER:
        assert [name for name in theirs if not np.array_equal(theirs[name], ours[name])] == []
    if (preset, kv) != ("F32", "F32"):
        near, far = (10, 1) if SAME_ORDER else (4, 2)  # 16-bit activations fall otherwise as often as they fall alike, some layers later
        assert nmse(theirs["l_out-0"], ours["l_out-0"]) < nmse(theirs["l_out-0"], exact["l_out-0"]) / near
        assert nmse(theirs["result_output"], ours["result_output"]) < nmse(theirs["result_output"], exact["result_output"]) * far
    assert nmse(theirs["Qcur_pre-0"], ours["Qcur_pre-0"]) <= MAX_NMSE


@pytest.mark.parametrize("n_tokens", [1, 2, 5])
@pytest.mark.parametrize("preset", ["F16", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K"])
def test_short_prompts(preset: str, n_tokens: int, model: Callable[[str], Path]) -> None:
    theirs, ours, exact = traces(model(preset), ids_of(n_tokens), "F16")
    if SAME_ORDER:
        assert [name for name in theirs if not np.array_equal(theirs[name], ours[name])] == []
    assert nmse(theirs["l_out-0"], ours["l_out-0"]) < nmse(theirs["l_out-0"], exact["l_out-0"]) / 10


@pytest.mark.parametrize("preset", ["F16", "Q4_K_M"])
def test_decoding_step_by_step(preset: str, model: Callable[[str], Path]) -> None:
    """A prompt, then one token after the other over the F16 cache, as both programs do it."""
    path, ids = model(preset), ids_of(14)
    with LlamaSession(path, kv="F16") as llama:
        theirs = [llama.decode(ids[:10]), *(next_logits(llama, ids[t], t) for t in range(10, 14))]
    weights, cache, arithmetic = Weights(open_source(path)), KVCache(), ggml_arithmetic("F16")
    parts = [ids[:10], *([token] for token in ids[10:])]
    ours = [forward(torch.tensor([part]), weights, cache=cache, arithmetic=arithmetic)[0].numpy() for part in parts]
    for a, b in zip(theirs, ours, strict=True):
        if SAME_ORDER:
            assert np.array_equal(a, b)
        assert nmse(a, b) < 1e-3


def next_logits(llama: LlamaSession, token: int, position: int) -> np.ndarray:
    """Logits of one more token after those in the cache, [1,V]."""
    batch = llama_cpp.llama_batch_init(1, 0, 1)
    batch.n_tokens, batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, token, position, 1, 0, True
    assert llama_cpp.llama_decode(llama._context, batch) == 0
    llama_cpp.llama_batch_free(batch)
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama._model))
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits(llama._context), (1, n_vocab)).copy()


def test_a_full_context(model: Callable[[str], Path]) -> None:
    theirs, ours, exact = traces(model("Q4_K_M"), ids_of(512), "F16")
    if SAME_ORDER:
        assert [name for name in theirs if not np.array_equal(theirs[name], ours[name])] == []
    assert nmse(theirs["Kcur-0"], ours["Kcur-0"]) <= MAX_NMSE < nmse(theirs["Kcur-0"], exact["Kcur-0"])


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 0.0, 1e-11), (torch.bfloat16, 1e-7, 1e-4)])
def test_a_hugging_face_folder(dtype: torch.dtype, least: float, most: float, tmp_path: Path) -> None:
    """Its q and k rows are in another order than a GGUF file's; there is no block type in it."""
    make_hf(tmp_path).to(dtype).save_pretrained(tmp_path)
    weights, ids = Weights(open_source(tmp_path)), torch.tensor([[1, 5, 9, 200, 31, 7, 8, 100, 2]])
    exact, ours = forward(ids, weights), forward(ids, weights, arithmetic=ggml_arithmetic("F32"))
    assert least < nmse(exact.numpy(), ours.numpy()) < most


CASES = {
    "half-split RoPE, biases": {"arch": "qwen2"},
    "q and k norms": {"arch": "qwen3"},
    "tied": {"tied": True},
    "one kv head, wide": {"n_head_kv": 1, "head_dim": 32},
    "scales, rope_freqs": {"scales": ("attn_q", "attn_output", "ffn_down"), "rope_freqs": (1, 1, 1, 1.5, 2.5, 4, 8, 8)},
    "linear": {"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}},
    "yarn": {"metadata": {f"llama.rope.scaling.{k}": v for k, v in (("type", "yarn"), ("factor", 4.0), ("original_context_length", 32))}},
}


@pytest.mark.parametrize("case", CASES)
def test_other_architectures(case: str, tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", dtype="Q8_0", **CASES[case])
    theirs, ours, exact = traces(path, np.random.default_rng(3).integers(0, 288, 40).tolist(), "F16")
    for name in ("Qcur-0", "Kcur-0", "kq_soft_max-0", "kqv_out-0"):
        assert nmse(theirs[name], ours[name]) <= MAX_NMSE, (name, nmse(theirs[name], ours[name]))
    assert nmse(theirs["result_output"], ours["result_output"]) < nmse(theirs["result_output"], exact["result_output"]) / 2


def test_operations_on_the_same_inputs(model: Callable[[str], Path]) -> None:
    """Softmax and SwiGLU from llama.cpp's own scores, gate and up."""
    n = 40
    with LlamaSession(model("Q6_K"), kv="F16") as llama:
        nodes, _ = llama.nodes(ids_of(n))
    values = {node.name: node.values for node in nodes}
    ours = swiglu(np.ascontiguousarray(values["ffn_gate-3"]), np.ascontiguousarray(values["ffn_up-3"]))
    assert nmse(values["ffn_swiglu-3"], ours) <= MAX_NMSE
    scores = np.ascontiguousarray(values["kq-3"][:, :, :48])
    softmax(scores, 32**-0.5, 0)
    assert nmse(values["kq_soft_max-3"][:, :, :48], scores) <= MAX_NMSE
    if SAME_ORDER:
        assert np.array_equal(values["ffn_swiglu-3"], ours)
        assert np.array_equal(values["kq_soft_max-3"][:, :, :48], scores)
