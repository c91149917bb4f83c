"""Folders of models that see or hear, too: their language model as a folder of its own.

    language_model(folder)     config.json's text_config as the config, model.language_model.X as model.X

The other tensors stay under their own names: a report says that they are not used.  Source: the checkpoints of Gemma 3 and Mistral 3, and
what Transformers calls their modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from quantscope.sources.base import Bytes, RawTensor, Source, missing_tensor

CONFIG = "text_config"
SHARED = ("tie_word_embeddings", "quantization_config")  # keys that count where they are said of the whole
# how a name in the folder begins → how it does in the folder of a language model
PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}


class LanguageModel:
    """The language model of a folder that has more than one; see ``sources.base.Source``."""

    format: Literal["gguf", "safetensors"] = "safetensors"

    def __init__(self, whole: Source) -> None:
        self.whole, self.path, self.file_bytes, self.packing = whole, whole.path, whole.file_bytes, whole.packing
        self._own = {_renamed(name): name for name in whole.tensors}
        tensors = {name: RawTensor(name, whole.tensors[own].qtype, whole.tensors[own].shape) for name, own in self._own.items()}
        self.tensors: Mapping[str, RawTensor] = MappingProxyType(tensors)
        shared = {key: whole.metadata[key] for key in SHARED if key in whole.metadata}
        self.metadata: Mapping[str, Any] = MappingProxyType(whole.metadata[CONFIG] | shared)

    @property
    def truncated(self) -> tuple[str, ...]:
        return tuple(_renamed(name) for name in self.whole.truncated)

    def _stored(self, name: str) -> str:
        if name not in self._own:
            raise missing_tensor(self.path, name, self.tensors)
        return self._own[name]

    def raw(self, name: str) -> Bytes:
        return self.whole.raw(self._stored(name))

    def entries(self, name: str, which: slice) -> Bytes:
        return self.whole.entries(self._stored(name), which)

    def will_need(self, name: str) -> None:
        self.whole.will_need(self._stored(name))

    def let_go(self, name: str) -> None:
        self.whole.let_go(self._stored(name))

    def sha256(self) -> str:
        return self.whole.sha256()

    def close(self) -> None:
        self.whole.close()


def _renamed(name: str) -> str:
    found = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
    return name if found is None else PREFIXES[found] + name.removeprefix(found)


def language_model(folder: Source) -> Source:
    """The folder itself, or its language model where config.json describes one inside."""
    inside = folder.metadata.get(CONFIG)
    return LanguageModel(folder) if isinstance(inside, dict) and "model_type" in inside else folder
