"""Split GGUF models: written by the gguf package, run by llama.cpp, and the same as the whole file everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from typer.testing import CliRunner

from quantscope.cli.main import app
from quantscope.engines import Request, run
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import from_source
from tests.models import STORIES

PROMPT = (1, 403, 407, 261, 378)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """STORIES in parts of at most twenty tensors."""
    folder, reader = tmp_path_factory.mktemp("split"), GGUFReader(STORIES)
    writer = GGUFWriter(folder / "stories.gguf", "llama", split_max_tensors=20)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = sorted(folder.glob("stories-*-of-*.gguf"))
    assert len(found) == 3
    return found


def test_a_split_model_holds_what_the_whole_file_does(parts: list[Path]) -> None:
    split, whole = open_source(parts[1]), open_source(STORIES)
    assert dict(split.tensors) == dict(whole.tensors)
    assert set(split.metadata) == set(whole.metadata)
    assert all(split.raw(name).tobytes() == whole.raw(name).tobytes() for name in whole.tensors)
    assert from_source(split).encode("Once upon a time") == from_source(whole).encode("Once upon a time")


@pytest.mark.parametrize("engine", ["reference", "llama.cpp"])
def test_engines_run_it_from_any_part(engine: str, parts: list[Path]) -> None:
    split, whole = (run(Request(engine, str(model), PROMPT, kv="F32")) for model in (parts[2], STORIES))
    assert set(split.taps) == set(whole.taps)
    assert all(torch.equal(split.taps[tap][0].values, whole.taps[tap][0].values) for tap in whole.taps)


def test_the_quantized_file_is_that_of_the_whole(parts: list[Path], tmp_path: Path) -> None:
    written = []
    for i, model in enumerate((parts[0], STORIES)):
        out = tmp_path / str(i) / "out.gguf"
        out.parent.mkdir()
        done = CliRunner().invoke(app, ["quantize", str(model), str(out), "--type", "Q8_0"])
        assert done.exit_code == 0, done.output
        written.append(open_source(out))
    assert dict(written[0].tensors) == dict(written[1].tensors)
    assert all(written[0].raw(name).tobytes() == written[1].raw(name).tobytes() for name in written[1].tensors)
    assert not any(key.startswith("split.") for key in written[0].metadata)
