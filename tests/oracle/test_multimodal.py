"""The language model of a folder that has a vision model, too, against Transformers' whole one on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantscope.metrics import nmse
from quantscope.model.forward import forward
from quantscope.sources.resolve import open_source
from quantscope.weights import Weights

TEXT: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16} | {
    "vocab_size": 288
}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": TEXT | {"num_hidden_layers": 7, "sliding_window": 8}, "vision_config": VISION, "mm_tokens_per_image": 4},
    "mistral3": {
        "text_config": TEXT | {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": None},
        "vision_config": VISION | {"model_type": "pixtral"},
        "tie_word_embeddings": False,
    },
}
IDS = torch.arange(3, 40)[None]


def made(folder: Path, kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[kind](**KINDS[kind])).float().eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("newer", [False, True], ids=["language_model.model.", "model.language_model."])
def test_logits_of_the_whole_model(kind: str, newer: bool, tmp_path: Path) -> None:
    model = made(tmp_path, kind)
    if newer:
        tensors = load_file(tmp_path / "model.safetensors")
        renamed = {
            name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head"): x
            for name, x in tensors.items()
        }
        assert renamed.keys() != tensors.keys()
        save_file(renamed, tmp_path / "model.safetensors")
    weights = Weights(open_source(tmp_path))
    assert all(name.startswith(("vision_tower.", "multi_modal_projector.")) for name in weights.unused)
    assert len(weights.unused) > 10
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits
    assert float(nmse(theirs.flatten(), forward(IDS, weights).flatten())) < 1e-11
