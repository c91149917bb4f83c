"""Prompt, ids and text become what walks; chunks are llama-perplexity's."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantscope.arch.read import read_config
from quantscope.errors import MissingFileError, PromptError, UsageError
from quantscope.inputs import Input, Inputs, decoded, read_inputs
from quantscope.results import PromptInfo, StudyOptions, TextInfo
from quantscope.sources.resolve import open_source
from tests.models import make_gguf

BOS = 1


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_gguf(tmp_path / "m.gguf", n_ctx=64)


def inputs(model: Path, **options: object) -> Inputs:
    source = open_source(model)
    return read_inputs(StudyOptions(models=(str(model),), **options), source, read_config(source))


def text_input(model: Path, tmp_path: Path, text: str, **options: object) -> Input:
    file = tmp_path / "text.txt"
    file.write_text(text)
    found = inputs(model, text=file, **options).text
    assert found is not None
    return found


def test_a_prompt_is_one_row_scored_everywhere(model: Path) -> None:
    given = inputs(model, prompt="abc")
    assert given.text is None
    assert given.prompt is not None
    info = given.prompt.info
    assert isinstance(info, PromptInfo)
    assert info.ids[0] == BOS
    assert given.prompt.ids.tolist() == [list(info.ids)]
    assert (given.prompt.first, given.prompt.last) == (0, len(info.ids))
    assert len(info.pieces) == len(info.ids)


def test_last_position_only(model: Path) -> None:
    given = inputs(model, tokens=(5, 6, 7), positions="last").prompt
    assert given is not None
    assert (given.first, given.last) == (2, 3)


def test_chunks_are_those_of_llama_perplexity(model: Path, tmp_path: Path) -> None:
    given = text_input(model, tmp_path, "x" * 100, n_ctx=16)
    info = given.info
    assert isinstance(info, TextInfo)
    assert given.ids.shape == (info.n_tokens // 16, 16)
    assert (given.ids[:, 0] == BOS).all()
    assert (given.first, given.last) == (8, 15)  # 16/2 − 1 = 7 scored tokens a chunk
    assert info.n_scored == 7 * info.n_chunks
    assert text_input(model, tmp_path, "x" * 100, n_ctx=16, n_chunks=2).ids.shape == (2, 16)


def test_text_alone_prompt_alone_or_both(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("y" * 60)
    alone = inputs(model, text=file, n_ctx=16)
    assert alone.prompt is None
    assert alone.text is not None
    both = inputs(model, text=file, n_ctx=16, prompt="a")
    assert both.prompt is not None
    assert both.text is not None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prompt": "a", "tokens": (1,)}, UsageError, "--tokens"),
        ({"prompt": ""}, PromptError, "empty"),
        ({"tokens": ()}, PromptError, "empty"),
        ({"tokens": (1, 288)}, PromptError, "288"),
        ({"tokens": (-1,)}, PromptError, "-1"),
        ({"tokens": (5,) * 65}, PromptError, "64"),
        ({"text": Path("no-such-file.txt")}, MissingFileError, "no-such-file"),
    ],
)
def test_bad_input(model: Path, options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        inputs(model, **options)


def test_bad_text(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="two chunks"):
        text_input(model, tmp_path, "short", n_ctx=16)
    with pytest.raises(UsageError, match="--ctx 128"):
        text_input(model, tmp_path, "x" * 400, n_ctx=128)
    with pytest.raises(UsageError, match="--chunks 0"):
        text_input(model, tmp_path, "x" * 400, n_ctx=16, n_chunks=0)
    with pytest.raises(PromptError, match=r"latin\.txt: byte 3"):
        decoded("caf\xe9 au lait".encode("latin-1"), "latin.txt")
