"""Files of log-probabilities: the format by its definition, files that are no such file, writing, and a study that compares with one."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import struct
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantscope import plan
from quantscope.cli.kld_base import kld_base as command
from quantscope.cli.study import study as study_command
from quantscope.errors import (
    CorruptFileError,
    MissingFileError,
    NonFiniteError,
    NotAModelError,
    QuantscopeError,
    StudyMismatchError,
    TruncatedFileError,
    UsageError,
)
from quantscope.kld_base import HEADER, KldBase, encode_rows, file_size, prepare_base, read_base, row_type, write_base
from quantscope.meters import join_batches, join_groups
from quantscope.model.forward import forward
from quantscope.report.markdown import markdown
from quantscope.results import Study, StudyOptions
from quantscope.stages import prepare, run_batch
from quantscope.study import run_study
from tests.models import make_gguf

CTX, V = 16, 289  # an odd vocabulary: the rows are padded
WORDS = "once upon a time there was a little girl she loved to play outside in the park with her red ball "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model so sure of itself that many tokens are more than 16 nats below, its text, and the base of six chunks."""
    made = tmp_path_factory.mktemp("base")
    head = np.random.default_rng(2).normal(0, 0.6, (V, 64)).astype(np.float32)
    make_gguf(made / "m.gguf", n_layer=1, n_vocab=V, seed=3, edit={"output.weight": head})
    (made / "text.txt").write_text(WORDS + WORDS.replace("girl", "boy"), "utf-8")
    write_base(made / "base.kld", prepare_base(options(made)))
    return made


def options(folder: Path, **changes: object) -> StudyOptions:
    given = StudyOptions((str(folder / "m.gguf"),), text=folder / "text.txt", n_ctx=CTX, n_chunks=6)
    return dataclasses.replace(given, **changes)  # type: ignore[arg-type]


def with_base(folder: Path, **changes: object) -> StudyOptions:
    return options(folder, **{"types": ("Q4_0", "Q8_0"), "base": folder / "base.kld", "n_chunks": None, **changes})


def log_softmax(x: NDArray[np.floating]) -> NDArray[np.float64]:
    moved = x.astype(np.float64) - x.max(-1, keepdims=True)
    return moved - np.log(np.exp(moved).sum(-1, keepdims=True))


def decoded(rows: NDArray[np.void], v: int) -> NDArray[np.float64]:
    return rows["scale"][:, None].astype(np.float64) * rows["codes"][:, :v] + rows["lowest"][:, None]


# ---- Rows ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(v=st.integers(1, 60), spread=st.sampled_from([0.0, 1e-3, 1.0, 5.0, 30.0]), offset=st.floats(-100, 100), seed=st.integers(0, 99))
def test_a_log_probability_is_off_by_half_a_step(v: int, spread: float, offset: float, seed: int) -> None:
    x = (np.random.default_rng(seed).normal(0, spread, (5, v)) + offset).astype(np.float32)
    rows, exact = encode_rows(x), log_softmax(x)
    kept = x >= x.max(-1, keepdims=True) - 16
    error = np.abs(decoded(rows, v) - exact)
    half = rows["scale"][:, None] / 2 + 1e-5 + 1e-6 * abs(offset)  # float32's own rounding
    assert (error <= half)[kept].all()
    assert (rows["scale"] <= 16.0001 / 65535).all()
    assert (rows["codes"][:, :v][~kept] == 0).all()
    assert (rows["codes"][:, v:] == 0).all()


def test_a_row_by_hand() -> None:
    """Logits 0, −8 and −40: the lowest is 16 below the largest, −8 is in the middle, halves go to the even code."""
    (row,) = encode_rows(np.array([[0.0, -8.0, -40.0]], np.float32))
    total = 1 + np.exp(-8) + np.exp(-40)
    assert row["scale"] == np.float32(16) / np.float32(65535)
    assert row["lowest"] == pytest.approx(-16 - np.log(total), abs=1e-6)
    assert row["codes"].tolist() == [65535, 32768, 0, 0]


def test_equal_logits_have_no_steps() -> None:
    (row,) = encode_rows(np.full((1, 4), 3.5, np.float32))
    assert row["scale"] == 0
    assert row["lowest"] == pytest.approx(-np.log(4))
    assert row["codes"].tolist() == [0, 0, 0, 0]


def test_impossible_tokens_have_the_lowest() -> None:
    (row,) = encode_rows(np.array([[1.0, -np.inf, 0.5]], np.float32))
    assert row["codes"][1] == 0
    assert np.isfinite(row["lowest"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="logits at 1 position of 2 are NaN or infinite"):
        encode_rows(np.array([[1.0, 2.0], [bad, 2.0]], np.float32))


# ---- Files ---------------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_models_log_probabilities(folder: Path) -> None:
    job, base = prepare_base(options(folder)), read_base(folder / "base.kld")
    assert (base.n_chunk, base.n_ctx, base.n_vocab) == (6, CTX, V)
    assert (folder / "base.kld").stat().st_size == job.size == file_size(CTX, V, 6)
    assert job.text.as_given is not None
    assert (base.tokens == job.text.as_given.numpy()).all()
    assert (base.tokens[1:, 0] != 1).all()  # BOS is what runs there, not what the file holds
    exact = forward(job.text.ids, job.member.weights).log_softmax(-1)[:, CTX // 2 : CTX - 1]
    chunk, position = np.indices(exact.shape[:2]).reshape(2, -1)
    for ids in (slice(0, V), slice(5, 40), slice(288, V)):
        found = base.log_probs(chunk, position, ids)
        expected = exact.reshape(-1, V)[:, ids]
        far = found == -torch.inf
        assert far.any()
        assert (expected[far] < -15.9).all()
        torch.testing.assert_close(found[~far], expected[~far], atol=1.3e-4, rtol=0)
    labels = job.text.ids[:, CTX // 2 + 1 :]
    found, wanted = base.log_p_of_labels(slice(2, 5)), exact.gather(-1, labels[..., None])[2:5, :, 0].numpy()
    near = wanted > exact[2:5].amax(-1).numpy() - 16
    np.testing.assert_allclose(found[near], wanted[near], atol=1.3e-4)
    assert not near.all()
    assert (found > wanted)[~near].all()


def test_memory_does_not_show_in_the_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one chunk, five positions and 100 ids at a time."""
    monkeypatch.setattr(plan, "BATCH_TOKENS", CTX)
    monkeypatch.setattr(plan, "SLICE_TOKENS", CTX)
    job = prepare_base(options(folder))
    assert job.plan.n_batches == 6
    job = dataclasses.replace(job, plan=dataclasses.replace(job.plan, positions_per_slice=5, ids_per_slice=100))
    steps: list[int] = []
    write_base(tmp_path / "b.kld", job, steps.append)
    assert steps == list(range(1, 6 * job.n_steps + 1))
    one, other = read_base(tmp_path / "b.kld"), read_base(folder / "base.kld")
    assert (one.tokens == other.tokens).all()
    assert np.abs(one.rows["codes"].astype(int) - other.rows["codes"]).max() <= 1
    np.testing.assert_allclose(one.rows["lowest"], other.rows["lowest"], atol=1e-5)


def test_the_file_is_complete_or_absent(folder: Path, tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "b.kld"
    out.write_text("what was there")
    with pytest.raises(KeyboardInterrupt):
        write_base(out, prepare_base(options(folder)), stop)
    assert [p.name for p in tmp_path.iterdir()] == ["b.kld"]
    assert out.read_text() == "what was there"


def test_a_full_disk_is_seen_beforehand(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(UsageError, match=r"the base takes 25\.\d kB, the disk has 1\.00 kB free"):
        write_base(tmp_path / "b.kld", prepare_base(options(folder)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["no such folder/b.kld", "."])
def test_where_no_file_can_be(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="expected a file in a folder that exists"):
        write_base(tmp_path / name, prepare_base(options(folder)))


def test_a_base_needs_a_text(folder: Path) -> None:
    with pytest.raises(UsageError, match="no text given"):
        prepare_base(options(folder, text=None))


def read_everything(path: Path) -> KldBase:
    base = read_base(path)
    chunk, position = np.indices(base.rows.shape).reshape(2, -1)
    base.log_probs(chunk, position, slice(0, base.n_vocab))
    base.log_p_of_labels(slice(0, base.n_chunk))
    return base


def small(n_ctx: int = 4, n_vocab: int = 3, n_chunk: int = 2) -> bytes:
    """A file of two chunks of four tokens."""
    tokens = np.arange(n_ctx * n_chunk, dtype="<i4") % n_vocab
    x = np.random.default_rng(1).normal(0, 3, (n_chunk * (n_ctx - 1 - n_ctx // 2), n_vocab)).astype(np.float32)
    return HEADER.pack(b"_logits_", n_ctx, n_vocab, n_chunk) + tokens.tobytes() + encode_rows(x).tobytes()


def written(folder: Path, content: bytes) -> Path:
    path = folder / "bad.kld"
    path.write_bytes(content)
    return path


def test_a_small_file_is_read(tmp_path: Path) -> None:
    assert read_everything(written(tmp_path, small())).tokens.tolist() == [[0, 1, 2, 0], [1, 2, 0, 1]]


BAD: dict[str, tuple[bytes, type[QuantscopeError], str]] = {
    "another file": (b"GGUF" + bytes(100), NotAModelError, "it starts with b'GGUF"),
    "empty": (b"", NotAModelError, "not a regular file or empty"),
    "magic only": (b"_logits_", CorruptFileError, "0 chunks of 0 tokens"),
    "stopped in the header": (small()[:15], CorruptFileError, "0 chunks of 4 tokens"),
    "stopped in the tokens": (small()[:30], TruncatedFileError, "take 84 bytes, the file has 30"),
    "stopped in the rows": (small()[:-1], TruncatedFileError, "take 84 bytes, the file has 83"),
    "longer": (small() + b"\0", CorruptFileError, "take 84 bytes, the file has 85"),
    "no chunk": (HEADER.pack(b"_logits_", 4, 3, 0), CorruptFileError, "0 chunks of 4 tokens"),
    "negative": (HEADER.pack(b"_logits_", 4, -3, -1), CorruptFileError, "-1 chunks of 4 tokens and a vocabulary of -3"),
    "no scored position": (HEADER.pack(b"_logits_", 2, 3, 1) + bytes(8), CorruptFileError, "1 chunks of 2 tokens"),
    "absurd": (HEADER.pack(b"_logits_", 2**32 - 1, 2**31 - 1, 2**31 - 1) + bytes(99), TruncatedFileError, "2,147,483,647 chunks"),
    "token": (small()[:20] + struct.pack("<i", 3) + small()[24:], CorruptFileError, "token 3 at position 0, expected ids of 0 to 2"),
    "nan": (small()[:52] + struct.pack("<f", float("nan")) + small()[56:], CorruptFileError, "chunk 0, scored position 0: step nan"),
    "large step": (small()[:52] + struct.pack("<f", 1.0) + small()[56:], CorruptFileError, "step 1 and lowest"),
    "probability 3": (small()[:56] + struct.pack("<f", 1.1) + small()[60:], CorruptFileError, "lowest ln p 1.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, tmp_path: Path) -> None:
    content, error, words = BAD[name]
    with pytest.raises(error) as caught:
        read_everything(written(tmp_path, content))
    assert words in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no such file, expected one of log-probabilities"):
        read_base(tmp_path / "none.kld")
    with pytest.raises(NotAModelError):
        read_base(tmp_path)


@settings(deadline=None, max_examples=300)
@given(
    content=st.binary(max_size=100)
    | st.integers(0, len(small())).map(lambda n: small()[:n])
    | st.tuples(st.integers(0, len(small()) - 1), st.integers(0, 255)).map(lambda c: small()[: c[0]] + bytes([c[1]]) + small()[c[0] + 1 :])
    | st.tuples(st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1), st.binary()).map(
        lambda c: HEADER.pack(b"_logits_", *c[:3]) + c[3]
    )
)
def test_whatever_the_file_holds_there_is_a_paragraph_or_a_base(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    with contextlib.suppress(QuantscopeError):
        read_everything(written(tmp_path_factory.getbasetemp(), content))


# ---- Studies -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(folder: Path) -> Study:
    return run_study(with_base(folder))


def test_a_study_of_a_base_is_one_of_the_model_within_its_rounding(folder: Path, compared: Study) -> None:
    exact = run_study(options(folder, types=("Q4_0", "Q8_0")))
    assert compared.original == "base.kld"
    assert [v.name for v in compared.variants] == ["base.kld", "m", "Q4_0", "Q8_0"]
    assert compared.base is not None
    half = compared.base.step_nats / 2
    assert compared.variant("m").logits.kl_nats == pytest.approx(0, abs=half)  # type: ignore[union-attr]
    for name in ("Q4_0", "Q8_0"):
        ours, theirs = exact.variant(name).logits, compared.variant(name).logits
        assert ours is not None
        assert theirs is not None
        for field in ("kl_nats", "kl_nats_max", "kl_nats_median", "rms_dp", "dp_mean", "top1_agree"):
            assert getattr(theirs, field) == pytest.approx(getattr(ours, field), abs=2 * half), field
        assert theirs.ppl == ours.ppl
    assert compared.variant("Q4_0").logits.kl_nats > 10 * half  # type: ignore[operator, union-attr]
    assert {(p.a, p.b) for p in compared.paired} == {("m", "Q4_0"), ("m", "Q8_0"), ("Q4_0", "Q8_0")}


def test_the_base_is_named_with_its_floor(folder: Path, compared: Study) -> None:
    base = compared.base
    assert base is not None
    assert base.path == str(folder / "base.kld")
    assert base.n_chunks == 6
    assert base.sha256 == read_base(folder / "base.kld").sha256 == compared.provenance["files"][base.path]
    assert 0 < base.step_nats <= 16 / 65535
    assert 0 < base.missing < 1e-3
    text = markdown(compared)
    assert f"SHA-256 {base.sha256[:12]}" in text
    assert "log-probabilities of 16 bits: each is off by" in text
    assert "The mean divergence of m is within that rounding" in text
    assert "in every difference, beside the weights'" in text
    assert all(row.nmse is None for v in compared.variants for row in v.layers)  # nothing is known of its layers
    assert Study.from_json(compared.to_json()).base == base


def test_batches_and_groups_of_variants_join(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BATCH_TOKENS", 2 * CTX)
    monkeypatch.setattr(plan, "SLICE_TOKENS", CTX)
    stage = prepare(with_base(folder)).stage("text")
    assert stage.n_batches == 3
    assert stage.base is not None
    once = run_batch(dataclasses.replace(stage, plan=dataclasses.replace(stage.plan, n_batches=1, chunks_per_batch=6)), 0)
    joined = join_batches([run_batch(stage, index) for index in range(3)])
    for key in ("kl", "log_p", "mass"):
        np.testing.assert_allclose(joined[key], once[key], rtol=1e-4, atol=1e-6)
    assert (once["log_p"][0] == stage.base.log_p_of_labels(slice(0, 6))).all()
    for index in range(3):
        whole = run_batch(stage, index)
        parts = [run_batch(stage.of_members(group), index) for group in ([0], [1, 2])]
        joined = join_groups(parts, has_reference=True)
        assert {k: v.tobytes() for k, v in joined.items()} == {k: v.tobytes() for k, v in whole.items()}
        assert whole["kl"].shape == (4, 2, CTX // 2 - 1)


def test_a_prompt_beside_the_text_has_no_original(folder: Path) -> None:
    done = run_study(with_base(folder, prompt="once upon", types=()))
    assert done.prompt is not None
    assert done.variant("m").generated
    assert done.variant("m").logits.kl_nats is not None  # type: ignore[union-attr]


def test_fewer_chunks_than_the_base_has(folder: Path) -> None:
    done = run_study(with_base(folder, n_chunks=2, types=("Q8_0",)))
    assert done.text is not None
    assert done.text.n_chunks == 2


def test_an_interrupted_study_goes_on_with_the_same_base_only(folder: Path, tmp_path: Path) -> None:
    run_study(with_base(folder), folder=tmp_path / "study")
    copy = tmp_path / "copy.kld"
    shutil.copy(folder / "base.kld", copy)
    run_study(with_base(folder, base=copy), folder=tmp_path / "study")
    content = bytearray(copy.read_bytes())
    content[-4] ^= 1
    copy.write_bytes(content)
    with pytest.raises(StudyMismatchError, match="the content of --kl-divergence-base has changed"):
        run_study(with_base(folder, base=copy), folder=tmp_path / "study")


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "an original besides": ({"ref": "m.gguf", "types": ()}, "`--kl-divergence-base` and `--ref` both say what"),
    "no text": ({"text": None}, "expected that text with `--text FILE`"),
    "all positions": ({"scoring": "all"}, "not `--scoring all`"),
    "other chunks": ({"n_ctx": 32}, "its chunks have 16 tokens, expected 32"),
    "too many chunks": ({"n_chunks": 10}, "it has 6 chunks, expected 10"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_go_with_a_base(name: str, folder: Path) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(UsageError) as caught:
        prepare(with_base(folder, **changes))
    assert words in str(caught.value)


def test_another_text_is_refused_with_the_first_difference(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text((folder / "text.txt").read_text("utf-8").replace("girl", "gorl"), "utf-8")
    with pytest.raises(UsageError, match=r"in chunk 2, position 7 it has token 268, expected 274, which the text has there"):
        prepare(with_base(folder, text=other))


def test_a_text_that_ends_early_is_refused(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text((folder / "text.txt").read_text("utf-8")[:60], "utf-8")
    with pytest.raises(UsageError, match=r"it has 6 chunks, the text \d"):
        prepare(with_base(folder, text=short))


def test_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    model = make_gguf(tmp_path / "other.gguf", n_layer=1, n_vocab=300)
    with pytest.raises(UsageError, match="it has a vocabulary of 289 tokens, expected the model's, 300"):
        prepare(with_base(folder, models=(str(model),)))


def test_the_first_token_of_a_chunk_does_not_matter_where_it_becomes_bos(folder: Path, tmp_path: Path) -> None:
    base = read_base(folder / "base.kld")
    content = bytearray((folder / "base.kld").read_bytes())
    content[HEADER.size + 4 * CTX : HEADER.size + 4 * CTX + 4] = struct.pack("<i", (int(base.tokens[1, 0]) + 1) % V)
    (tmp_path / "b.kld").write_bytes(content)
    prepare(with_base(folder, base=tmp_path / "b.kld"))


# ---- Commands ------------------------------------------------------------------------------------------------------------


def test_the_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.kld"
    command(str(folder / "m.gguf"), text=folder / "text.txt", out=out, ctx=CTX, chunks=6)
    said = capsys.readouterr()
    assert "b.kld will have 25.1 kB" in said.err.replace("\n", "")
    assert not said.out
    assert out.read_bytes() == (folder / "base.kld").read_bytes()
    study_command([str(folder / "m.gguf")], kl_divergence_base=out, text=folder / "text.txt", out=tmp_path / "study")
    assert "KL divergence from b.kld: m" in capsys.readouterr().out


def test_chunks_below_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--chunks 0: expected at least 1"):
        command(str(folder / "m.gguf"), text=folder / "text.txt", out=tmp_path / "b.kld", chunks=0)


def test_rows_have_no_padding() -> None:
    assert row_type(3).itemsize == 16
    assert row_type(4).itemsize == 16
