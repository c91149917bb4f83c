"""A GGUF file that lacks a metadata key, as older converters wrote them, means what llama.cpp takes it to mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantscope.engines.llama_session import LlamaSession
from quantscope.errors import EngineError, MissingTensorError, QuantscopeError
from quantscope.metrics import nmse
from quantscope.model.forward import forward
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights
from tests.arch_models import CASES, header_keys, make_arch

IDS = [3, 17, 200, 41, 9, 88, 150, 7, 33, 250, 101, 64, 5, 77, 180, 21, 90, 11, 47, 230]
# sizes, which every file has; llama.cpp aborts without the numbers of experts and groups
ALWAYS = ("embedding_length", "block_count", "feed_forward_length", "expert_count", "expert_used_count", "expert_group_used_count")
OTHERWISE = {
    ("minicpm", "logit_scale"),  # llama.cpp divides by the number that the model multiplies by
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_missing_key_means_what_llama_cpp_takes(case: str, tmp_path: Path) -> None:
    """Or it is refused: never another model in silence."""
    compared = 0
    for key in header_keys(case):
        if key in ALWAYS or (case, key) in OTHERWISE:
            continue
        path = make_arch(tmp_path / "m.gguf", case, keys={key: None})
        try:
            ours = forward(torch.tensor([IDS]), Weights(open_source(path)))
            with LlamaSession(path, n_ctx=64) as llama:
                theirs = torch.from_numpy(llama.decode(IDS))
        except (QuantscopeError, EngineError):
            continue
        assert float(nmse(theirs.flatten(), ours.flatten())) < 1e-6, key
        compared += 1
    assert compared > 1


@pytest.mark.parametrize("case", ["minicpm3", "deepseek2"])
def test_matrices_of_a_rank_that_the_header_lacks(case: str, tmp_path: Path) -> None:
    path = make_arch(tmp_path / "m.gguf", case, keys={"attention.q_lora_rank": None})
    with pytest.raises(
        MissingTensorError, match=r"no tensor 'blk\.0\.attn_q\.weight'\. The closest names are .*'blk\.0\.attn_q_a\.weight'"
    ):
        Weights(open_source(path))
