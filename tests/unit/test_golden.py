"""Golden packs: every file against the model it came from, sizes, the checker in C, and traces with planted faults."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantscope.compare import EXACT_FLOOR
from quantscope.errors import (
    MissingFileError,
    PromptError,
    TraceContentError,
    TraceFormatError,
    TraceMismatchError,
    UsageError,
    VocabularyError,
)
from quantscope.fingerprint import fingerprint, fingerprint_trace
from quantscope.golden import pack as packing
from quantscope.golden.check import check, choose
from quantscope.golden.folder import Probe, check_target, read_pack, write_pack
from quantscope.golden.make import make_pack
from quantscope.golden.pack import LEVELS, Pack
from quantscope.golden.record import batch, step_by_step
from quantscope.metrics import nmse
from quantscope.model.taps import tap_names
from quantscope.quants import decode
from quantscope.sources.resolve import open_source
from quantscope.tokenizers import from_source
from quantscope.trace import Fingerprint, Full, Origin, Sample, Stats, Trace, full_trace
from quantscope.weights import Weights
from tests.models import STORIES, STORIES_PROMPT, make_gguf


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(open_source(STORIES))


@pytest.fixture(scope="module")
def made() -> Pack:
    return make_pack(str(STORIES), ggml=False)


@pytest.fixture(scope="module")
def folder(made: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "pack"
    write_pack(made, path)
    return path


@pytest.fixture(scope="module")
def manifest(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "manifest.json").read_text("utf-8"))
    return loaded


def probe(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    return next(p for p in manifest["probes"] if p["name"] == name)


def values(folder: Path, name: str) -> np.ndarray:
    return np.fromfile(folder / name, "<f4")


class TestContent:
    def test_probes_grow_from_one_token_to_decoding(self, folder: Path) -> None:
        ids = " ".join(map(str, STORIES_PROMPT))
        assert (folder / "probes.txt").read_text() == f"one: 1\ntwo: 1 403\nrepeated: 403 403 403 403\ntext: {ids}\ndecode: {ids}\n"

    @pytest.mark.parametrize("name", ["one", "two", "repeated", "text"])
    def test_every_tap_is_a_file_of_raw_floats(self, folder: Path, manifest: dict[str, Any], weights: Weights, name: str) -> None:
        p, n = probe(manifest, name), weights.config.n_layer
        taps = batch(weights, p["ids"])
        assert [t["tap"] for t in p["taps"]] == list(taps)
        assert set(taps) == {t for t in tap_names(n) if "normed" not in t}
        for t in p["taps"]:
            assert t["file"] == f"{name}/{t['tap']}.f32"
            assert t["positions"] == list(range(len(p["ids"])))
            found = values(folder, t["file"]).reshape(t["shape"])
            assert np.array_equal(found, taps[t["tap"]].numpy())
            assert t["rms"] == pytest.approx(math.sqrt((found.astype(np.float64) ** 2).mean()))

    def test_rows_of_a_repeated_token_are_equal_in_layer_0(self, folder: Path, manifest: dict[str, Any]) -> None:
        """What the README promises."""
        for tap in ("kqv_out-0", "l_out-0"):
            t = next(t for t in probe(manifest, "repeated")["taps"] if t["tap"] == tap)
            x = values(folder, t["file"]).reshape(t["shape"])
            np.testing.assert_allclose(x, np.broadcast_to(x[:1], x.shape), rtol=1e-5, atol=1e-6)

    def test_decoding_is_checked_against_the_files_of_the_text(self, manifest: dict[str, Any], weights: Weights) -> None:
        decode_taps = probe(manifest, "decode")["taps"]
        assert all(t["file"] == f"text/{t['tap']}.f32" and t["yours"] == f"decode/{t['tap']}.f32" for t in decode_taps)
        assert {t["tap"] for t in decode_taps} == {t["tap"] for t in probe(manifest, "text")["taps"] if "soft_max" not in t["tap"]}
        stepped, whole = step_by_step(weights, STORIES_PROMPT), batch(weights, STORIES_PROMPT)
        for t in decode_taps:
            error = nmse(whole[t["tap"]].flatten(), stepped[t["tap"]].flatten()).item()
            assert error <= t["tolerance"]
            assert t["tolerance"] < 2 * EXACT_FLOOR

    def test_first_rows_of_every_tensor(self, folder: Path, manifest: dict[str, Any], weights: Weights) -> None:
        assert [t["name"] for t in manifest["tensors"]] == list(weights.names())
        for t in manifest["tensors"]:
            raw = weights.stored(t["name"])
            whole = decode(weights.source.raw(raw.name), raw.qtype).reshape(raw.shape)
            found = values(folder, t["file"]).reshape(t["shape"])
            assert np.array_equal(found, whole[:2] if whole.ndim == 2 else whole)
            assert (t["type"], t["shape_in_model"]) == (raw.qtype.name, list(raw.shape))

    def test_top_logits(self, folder: Path, manifest: dict[str, Any]) -> None:
        for name in ("one", "two", "repeated", "text"):
            logits = values(folder, f"{name}/result_output.f32").reshape(len(probe(manifest, name)["ids"]), -1)[-1]
            lines = [line.split() for line in (folder / name / "top20.txt").read_text().splitlines()]
            assert [int(i) for i, _ in lines] == np.argsort(-logits, kind="stable")[:20].tolist()
            assert [np.float32(x) for _, x in lines] == np.sort(logits)[::-1][:20].tolist()
        assert probe(manifest, "text")["top"][0]["piece"] == ","

    def test_tokenizer_files(self, folder: Path, manifest: dict[str, Any]) -> None:
        tokenizer = from_source(open_source(STORIES))
        expected = dict(line.split(":") for line in (folder / "tokenizer" / "expected.txt").read_text().splitlines())
        assert len(expected) == len(manifest["tokenizer"]) > 25
        for case in manifest["tokenizer"]:
            text = (folder / case["file"]).read_bytes().decode("utf-8")
            assert text == case["text"]
            ids = tokenizer.encode(text, parse_special=case["name"].endswith("-as-token"))
            assert ids == case["ids"] == [int(i) for i in expected[case["name"]].split()]
        by_name = {case["name"]: case["ids"] for case in manifest["tokenizer"]}
        assert tokenizer.eos_id in by_name["eos-as-token"]
        assert tokenizer.eos_id not in by_name["eos-as-text"]

    def test_fingerprints_are_those_of_the_files(self, folder: Path) -> None:
        for p in read_pack(folder):
            assert list(p.expected.taps) == list(p.tolerance)
            for pieces in p.expected.taps.values():
                full, printed = pieces
                assert isinstance(full, Full)
                assert isinstance(printed, Fingerprint)
                torch.testing.assert_close(printed.sums, fingerprint(full.values).sums, rtol=0, atol=0)

    def test_index_names_every_float_file_with_its_size(self, folder: Path) -> None:
        lines = [line.split() for line in (folder / "index.txt").read_text().splitlines() if not line.startswith("#")]
        for file, _, n, tolerance in lines:
            assert (folder / file).stat().st_size == 4 * int(n)
            assert float(tolerance) > 0
        assert {file for file, *_ in lines} == {str(p.relative_to(folder)) for p in folder.rglob("*.f32")}
        stages = list(dict.fromkeys(yours.split("/")[0] for _, yours, *_ in lines))
        assert stages == ["tensors", "one", "two", "repeated", "text", "decode"]

    def test_readme_is_complete(self, folder: Path) -> None:
        text = (folder / "README.md").read_text("utf-8")
        assert "{{" not in text
        assert (folder / "check.c").read_text() in text
        assert STORIES.name in text
        assert "in layer 0 all values are equal" in text
        assert "To keep the pack small" not in text
        n = len([p for p in folder.rglob("*.f32") if p.parent.name != "tensors"])
        assert f"here: {n} files of taps" in text

    def test_tolerances_of_an_exact_pack_are_those_of_float32(self, manifest: dict[str, Any]) -> None:
        assert {t["tolerance"] for p in manifest["probes"] if p["name"] != "decode" for t in p["taps"]} == {EXACT_FLOOR}

    def test_tolerances_of_ggml_follow_its_rounding(self, tmp_path: Path) -> None:
        """8-bit activations before a product with Q8_0: the products are off by 1e-5 or so, the embeddings not at all."""
        model = make_gguf(tmp_path / "m.gguf", dtype="Q8_0")
        text = {t["tap"]: t["tolerance"] for t in make_pack(str(model), tokens=(1, 270, 265, 280)).manifest["probes"][3]["taps"]}
        assert text["embd"] == EXACT_FLOOR
        assert 1e-6 < text["Qcur_pre-0"] < 1e-3
        assert text["l_out-1"] > 10 * EXACT_FLOOR


class TestSize:
    def test_smaller_packs_leave_out_taps_by_level_and_say_so(self, made: Pack) -> None:
        floats = sum(len(content) for name, content in made.files.items() if name.endswith(".f32"))
        previous, seen = floats + 1, []
        limit = floats - 1
        while True:
            try:
                smaller = make_pack(str(STORIES), ggml=False, max_bytes=limit)
            except UsageError as e:
                refused = str(e)
                break
            size = sum(len(content) for name, content in smaller.files.items() if name.endswith(".f32"))
            assert size <= limit < previous
            seen.append(smaller)
            previous, limit = size, size - 1
        assert "--max-bytes" in refused
        assert [p.manifest["filed"] for p in seen] == [level.says for level in LEVELS[1:]]
        assert all("have a fingerprint only" in p.files["README.md"].decode() for p in seen)
        assert all(p.files["fingerprints.txt"] == made.files["fingerprints.txt"] for p in seen)

    def test_a_level_that_is_no_smaller_is_no_success(self) -> None:
        with pytest.raises(UsageError, match=r"smallest pack of this model needs .* kB"):
            make_pack(str(STORIES), ggml=False, max_bytes=10)

    def test_logits_of_a_large_vocabulary_are_those_of_the_last_position(self, monkeypatch: pytest.MonkeyPatch, made: Pack) -> None:
        monkeypatch.setattr(packing, "WHOLE_LOGITS", 511)
        small = make_pack(str(STORIES), ggml=False)
        t = next(t for t in small.manifest["probes"][3]["taps"] if t["tap"] == "result_output")
        assert (t["shape"], t["positions"]) == ([1, 512], [len(STORIES_PROMPT) - 1])
        assert small.files[t["file"]] == made.files[t["file"]][-4 * 512 :]
        assert "logits of the last position only" in small.files["README.md"].decode()


class TestInput:
    def test_ids_and_other_texts(self) -> None:
        ids = make_pack(str(STORIES), tokens=(5, 6, 7), ggml=False).manifest["probes"]
        assert [p["ids"] for p in ids] == [[5], [5, 6], [6] * 4, [5, 6, 7], [5, 6, 7]]
        other = make_pack(str(STORIES), prompt="Lily loved to play", ggml=False)
        assert "".join(other.manifest["probes"][3]["pieces"][1:]).strip() == "Lily loved to play"

    @pytest.mark.parametrize(("tokens", "says"), [((1, 2), "at least three"), ((), "empty"), ((1, 2, 99999), "99999"), ((1,) * 600, "600")])
    def test_unusable_ids(self, tokens: tuple[int, ...], says: str) -> None:
        with pytest.raises(PromptError, match=says):
            make_pack(str(STORIES), tokens=tokens, ggml=False)

    def test_without_a_vocabulary(self, tmp_path: Path) -> None:
        model = make_gguf(tmp_path / "m.gguf")
        key = b"tokenizer.ggml.model" + struct.pack("<IQ", 8, 5)  # a string of 5 bytes follows
        model.write_bytes(model.read_bytes().replace(key + b"llama", key + b"klngn"))
        with pytest.raises(VocabularyError):
            make_pack(str(model), ggml=False)
        made = make_pack(str(model), tokens=(1, 2, 3), ggml=False)
        assert not [name for name in made.files if name.startswith("tokenizer")]
        assert "has no vocabulary" in made.files["README.md"].decode()
        assert made.manifest["probes"][0]["top"][0]["piece"] is None


class TestFolder:
    def test_a_pack_replaces_a_pack_and_nothing_else(self, made: Pack, tmp_path: Path) -> None:
        target = tmp_path / "a" / "pack"
        write_pack(made, target)
        (target / "old.f32").write_bytes(b"")
        write_pack(made, target)
        assert not (target / "old.f32").exists()
        assert {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()} == set(made.files)
        assert [p.name for p in target.parent.iterdir()] == ["pack"]
        other = tmp_path / "other"
        other.mkdir()
        write_pack(made, other)  # empty
        mine = tmp_path / "mine"
        mine.mkdir()
        (mine / "thesis.txt").write_text("x")
        with pytest.raises(UsageError, match="holds other files"):
            write_pack(made, mine)
        assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
        with pytest.raises(UsageError, match="is a file"):
            check_target(mine / "thesis.txt" / "pack")

    def test_a_failed_write_leaves_nothing(self, made: Pack, tmp_path: Path) -> None:
        target = tmp_path / "pack"
        impossible = replace(made, files={**made.files, "README.md/x": b""})
        with pytest.raises(UsageError, match="could not be written"):
            write_pack(impossible, target)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("file", "change", "error"),
        [
            ("manifest.json", None, MissingFileError),
            ("manifest.json", lambda raw: raw[: len(raw) // 2], TraceFormatError),
            ("manifest.json", lambda raw: b"[1]", TraceFormatError),
            ("manifest.json", lambda raw: raw.replace(b'"quantscope.golden": 1', b'"quantscope.golden": 2'), TraceFormatError),
            ("text/l_out-0.f32", lambda raw: raw[:-4], TraceFormatError),
            ("text/l_out-0.f32", None, TraceFormatError),
            ("fingerprints.txt", lambda raw: raw.replace(b"qsfp1 embd", b"qsfp1 other"), TraceFormatError),
        ],
    )
    def test_damage_is_named(
        self, folder: Path, tmp_path: Path, file: str, change: Callable[[bytes], bytes] | None, error: type[Exception]
    ) -> None:
        copy = shutil.copytree(folder, tmp_path / "pack")
        if change is None:
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(change((copy / file).read_bytes()))
        with pytest.raises(error, match="golden"):
            read_pack(copy)


# ---- The checker in C ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: the checker cannot be compiled here")
    program = tmp_path_factory.mktemp("checker") / "check"
    command = ["gcc", "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, folder / "check.c", "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> Path:
    """An engine's own files: right ones."""
    copy = tmp_path / "mine"
    for part in ("tensors", "one", "two", "repeated", "text"):
        shutil.copytree(folder / part, copy / part)
    shutil.copytree(folder / "text", copy / "decode")
    return copy


class TestCheckerInC:
    def run(self, checker: Path, folder: Path, mine: Path, *only: str) -> tuple[int, list[str]]:
        done = subprocess.run([checker, folder, mine, *only], capture_output=True, text=True, timeout=60)
        return done.returncode, (done.stdout + done.stderr).splitlines()

    def change(self, path: Path, f: Callable[[np.ndarray], np.ndarray]) -> None:
        f(np.fromfile(path, "<f4")).astype("<f4").tofile(path)

    def test_right_files_pass(self, checker: Path, folder: Path, mine: Path) -> None:
        code, lines = self.run(checker, folder, mine)
        n = len((folder / "index.txt").read_text().splitlines()) - 1
        assert code == 0
        assert lines[-1].startswith(f"{n} within tolerance, 0 not, 0 files")
        assert len(lines) == n + 1

    def test_rounding_passes_and_a_fault_does_not(self, checker: Path, folder: Path, mine: Path) -> None:
        noise = np.random.default_rng(0)
        self.change(mine / "two" / "l_out-0.f32", lambda x: x * (1 + 1e-6 * noise.standard_normal(x.size)))
        assert self.run(checker, folder, mine)[0] == 0
        self.change(mine / "two" / "Qcur-1.f32", lambda x: -x)
        self.change(mine / "text" / "embd.f32", lambda x: x[::-1])
        code, lines = self.run(checker, folder, mine)
        assert code == 1
        assert lines[-1].startswith("first failure: two/Qcur-1.f32 ")
        (bad,) = [line for line in lines if line.startswith("FAIL two/")]
        assert "NMSE 4 of 1e-09" in bad
        assert self.run(checker, folder, mine, "one/")[0] == 0
        assert self.run(checker, folder, mine, "decode/")[0] == 0

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_no_numbers_fail(self, checker: Path, folder: Path, mine: Path, bad: float) -> None:
        self.change(mine / "one" / "embd.f32", lambda x: np.where(np.arange(x.size) == 5, bad, x))
        code, lines = self.run(checker, folder, mine)
        assert code == 1
        assert "value 5: expected" in lines[next(i for i, line in enumerate(lines) if line.startswith("FAIL"))]

    def test_another_size_fails(self, checker: Path, folder: Path, mine: Path) -> None:
        self.change(mine / "one" / "embd.f32", lambda x: x[:-1])
        code, lines = self.run(checker, folder, mine)
        assert code == 1
        assert any(re.fullmatch(r"FAIL one/embd.f32 +63 values, expected 64", line) for line in lines)

    def test_missing_files_are_counted_and_nothing_at_all_is_an_error(self, checker: Path, folder: Path, mine: Path) -> None:
        shutil.rmtree(mine / "decode")
        code, lines = self.run(checker, folder, mine)
        assert code == 0
        assert not lines[-1].endswith("0 files of the pack not found in " + str(mine))
        assert self.run(checker, folder, mine, "three/")[0] == 2
        assert self.run(checker, folder, mine / "nowhere")[0] == 2
        assert self.run(checker, mine, mine)[0] == 2

    def test_is_short(self, folder: Path) -> None:
        assert len((folder / "check.c").read_text().splitlines()) <= 65


# ---- Traces -------------------------------------------------------------------------------------------------------------

TEXT = tuple(STORIES_PROMPT)


@pytest.fixture(scope="module")
def probes(folder: Path) -> list[Probe]:
    return read_pack(folder)


@pytest.fixture
def taps(weights: Weights) -> dict[str, Tensor]:
    """An engine's taps on the text: right up to rounding."""
    g = torch.Generator().manual_seed(1)
    return {name: x * (1 + 3e-7 * torch.randn(x.shape, generator=g)) for name, x in batch(weights, TEXT).items()}


ENGINE = Origin("toy", tokens=TEXT)


def verdicts(probes: list[Probe], trace: Trace, name: str | None = None) -> dict[str, str]:
    return {row.tap: row.verdict for row in check(choose(probes, trace, name), trace).rows}


class TestTraces:
    def test_right_values_are_within(self, probes: list[Probe], taps: dict[str, Tensor]) -> None:
        found = check(choose(probes, full_trace(ENGINE, taps)), full_trace(ENGINE, taps))
        assert found.first_divergence is None
        assert [row.tap for row in found.rows] == list(taps)
        assert {row.verdict for row in found.rows} == {"within"}
        assert {row.floor for row in found.rows} == {EXACT_FLOOR}

    @pytest.mark.parametrize("form", [lambda t: t, fingerprint_trace])
    def test_first_failure(self, probes: list[Probe], taps: dict[str, Tensor], form: Callable[[Trace], Trace]) -> None:
        for tap in ("kqv_out-1", "attn_out-1", "l_out-1"):
            taps[tap] = taps[tap].roll(1, -1)
        trace = form(full_trace(ENGINE, taps))
        found = check(choose(probes, trace), trace)
        assert found.first_divergence is not None
        assert found.first_divergence.tap == "kqv_out-1"
        assert sum(row.verdict == "differs" for row in found.rows) == 3

    def test_steps_of_decoding_are_all_looked_at(self, probes: list[Probe], taps: dict[str, Tensor]) -> None:
        """One fingerprint a step; a cache that is wrong at the third one only."""
        pieces = tuple(fingerprint(taps["l_out-2"][i : i + 1], (i,)) for i in range(len(TEXT)))
        assert verdicts(probes, Trace(ENGINE, {"l_out-2": pieces}), "decode") == {"l_out-2": "within"}
        wrong = fingerprint(taps["l_out-2"][2:3].roll(1, 1), (2,))
        assert verdicts(probes, Trace(ENGINE, {"l_out-2": (*pieces[:2], wrong, *pieces[3:])}), "decode") == {"l_out-2": "differs"}

    def test_samples_statistics_and_single_positions(self, probes: list[Probe], taps: dict[str, Tensor]) -> None:
        x = taps["l_out-0"]
        index = torch.tensor([0, 1, 63, 64, 200])
        pieces = {
            "within": (Sample(x.flatten()[index], index, tuple(x.shape)), Full(x[-1:], (len(TEXT) - 1,))),
            "differs": (
                Sample(-x.flatten()[index], index, tuple(x.shape)),
                Full(x[:1], (1,)),
                Stats({"rms": 2 * x.square().mean().sqrt().item()}),
            ),
            "not shown": (Stats({"rms": x.square().mean().sqrt().item()}),),
        }
        for verdict, ones in pieces.items():
            for piece in ones:
                assert verdicts(probes, Trace(ENGINE, {"l_out-0": (piece,)})) == {"l_out-0": verdict}

    def test_taps_without_a_file_are_compared_by_their_fingerprint(self, taps: dict[str, Tensor], tmp_path: Path) -> None:
        write_pack(make_pack(str(STORIES), ggml=False, max_bytes=200_000), tmp_path / "pack")
        small = read_pack(tmp_path / "pack")
        taps["ffn_up-3"] = -taps["ffn_up-3"]
        found = check(choose(small, full_trace(ENGINE, taps)), full_trace(ENGINE, taps))
        kinds = {row.tap: row.kind for row in found.rows}
        assert (kinds["l_out-0"], kinds["ffn_up-3"]) == ("values", "fingerprint")
        assert [row.tap for row in found.rows if row.verdict == "differs"] == ["ffn_up-3"]

    def test_what_cannot_be_compared_is_refused(self, probes: list[Probe], taps: dict[str, Tensor]) -> None:
        for origin, error, says in (
            (replace(ENGINE, tokens=(1, 2, 3)), TraceMismatchError, r"ran 3 token ids .*text: 1,403"),
            (replace(ENGINE, tokens=None), UsageError, "--probe"),
            (replace(ENGINE, model_sha256="0" * 64, model="other.gguf"), TraceMismatchError, "same model file"),
        ):
            with pytest.raises(error, match=says):
                verdicts(probes, full_trace(origin, taps))
        with pytest.raises(TraceContentError, match="nothing to compare"):
            verdicts(probes, full_trace(ENGINE, {"my_layer": taps["embd"]}))
        with pytest.raises(UsageError, match="one, two, repeated, text and decode"):
            verdicts(probes, full_trace(ENGINE, taps), "three")
        with pytest.raises(TraceMismatchError, match="same token ids"):
            verdicts(probes, full_trace(ENGINE, taps), "one")
        assert verdicts(probes, full_trace(replace(ENGINE, tokens=None), {"embd": taps["embd"]}), "text") == {"embd": "within"}
