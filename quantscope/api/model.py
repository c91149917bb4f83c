"""A model file to look at: what the header says, its tensors, and its tokenizer."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantscope.arch.config import ModelConfig
from quantscope.arch.read import read_config
from quantscope.frames import Frame, table
from quantscope.report.inspect import headline
from quantscope.report.notebook import tables_html
from quantscope.report.table import Table
from quantscope.sources.base import Source
from quantscope.sources.summary import Summary, TensorRow, TypeTotal, summarize
from quantscope.table_files import to_pandas
from quantscope.tokenizers import Tokenizer, from_source
from quantscope.weights import Weights
from quantscope.wording import count, fixed

if TYPE_CHECKING:
    import pandas


class Model:
    """One GGUF file or Hugging Face folder.  What needs more than the header is read when it is asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.summary: Summary = summarize(source)

    @property
    def path(self) -> Path:
        return self._source.path

    @property
    def metadata(self) -> dict[str, Any]:
        """GGUF's key-value pairs, or the content of config.json; arrays whole."""
        return dict(self._source.metadata)

    @property
    def tensors(self) -> tuple[TensorRow, ...]:
        """Name, type, shape [rows, columns] and bytes of each stored tensor, in the order of the file."""
        return self.summary.tensors

    @cached_property
    def config(self) -> ModelConfig:
        """Sizes, norm and RoPE under GGUF's names.  Raises UnsupportedArchitectureError, UnsupportedFeatureError, CorruptFileError."""
        return read_config(self._source)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text ↔ ids: ``encode``, ``decode``, ``piece``.  Raises VocabularyError where the file has none that is known."""
        return from_source(self._source)

    @cached_property
    def _weights(self) -> Weights:
        return Weights(self._source)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The values of a tensor by its canonical (GGUF) name, decoded: float32 [out, in] of a matrix.  Raises MissingTensorError."""
        values: NDArray[np.float32] = self._weights.get(name).numpy()
        return values

    def frames(self) -> dict[str, Frame]:
        """tensors, types."""
        shapes = [("×".join(map(str, t.shape)),) for t in self.tensors]
        bpw = [(t.bpw,) for t in self.summary.types]
        return {
            "tensors": table(TensorRow, self.tensors, {"shape": "str"}, shapes),
            "types": table(TypeTotal, self.summary.types, {"bpw": "float"}, bpw),
        }

    def to_pandas(self) -> dict[str, pandas.DataFrame]:
        """The frames as pandas.DataFrames.  Raises MissingExtraError where pandas is not installed."""
        return to_pandas(self.frames())

    def close(self) -> None:
        """Give the file back; tensors that were read stay valid."""
        self._source.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Model {headline(self.summary)}>"

    def _repr_html_(self) -> str:
        s = self.summary
        rows = tuple((t.type, f"{t.n_tensors:,}", f"{t.n_elements:,}", f"{t.n_bytes:,}", fixed(t.bpw, 3)) for t in s.types)
        types = Table(("type", "tensors", "weights", "bytes", "bits per weight"), rows)
        each = tuple((t.name, t.type, " × ".join(f"{n:,}" for n in t.shape), f"{t.n_bytes:,}") for t in s.tensors)
        tensors = Table(("tensor", "type", "shape", "bytes"), each, f"{count(len(each), 'tensor')}", text_columns=frozenset({0, 1, 2}))
        return tables_html(headline(self.summary), [types, tensors])
