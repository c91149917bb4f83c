"""A study as a job: its stages and batches, what is stored and resumed, when it stops early, and what it refuses to continue."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from quantscope import plan, stages
from quantscope.cli.report import told_of
from quantscope.errors import ShapeError, StudyDiskError, StudyMismatchError, UsageError, VocabularyError
from quantscope.meters import Record, join_batches
from quantscope.monitor import Monitor
from quantscope.results import Interrupted, Study, StudyOptions
from quantscope.stages import Job, prepare, run_batch
from quantscope.store import StudyStore, read_sketch
from quantscope.study import run_study
from tests.models import make_gguf

CTX, CHUNKS = 64, 10
WORDS = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her red ball. "


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks a batch, so that a short text makes five batches."""
    monkeypatch.setattr(plan, "BATCH_TOKENS", 2 * CTX)
    monkeypatch.setattr(plan, "SLICE_TOKENS", 2 * CTX)


@pytest.fixture
def options(tmp_path: Path) -> StudyOptions:
    text = tmp_path / "text.txt"
    numbered = (WORDS.replace("Lily", name) for name in ("Lily", "Tom", "Mia", "Sue", "Ben", "Max", "Ann", "Bob") * 5)
    text.write_text("".join(numbered), "utf-8")
    model = make_gguf(tmp_path / "m.gguf", n_layer=2, seed=3)
    return StudyOptions(models=(str(model),), types=("Q4_0", "Q8_0"), text=text, n_ctx=CTX, n_chunks=CHUNKS)


class Watched(Monitor):
    """Remembers everything it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: dict[str, list[int]] = {}
        self.totals: dict[str, int] = {}
        self.kl: list[Mapping[str, float]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, stage: str, n_steps: int, n_tokens: int) -> None:
        self.totals[stage], self.steps[stage] = n_steps, []

    def step(self, stage: str, done: int, what: str) -> None:
        self.steps[stage].append(done)

    def scores(self, kl_nats: Mapping[str, float]) -> None:
        self.kl.append(kl_nats)


def numbers(done: Study) -> Study:
    """All that must be the same, bit for bit: everything but the date and the paths."""
    variants = tuple(dataclasses.replace(v, path=None) for v in done.variants)
    text = done.text and dataclasses.replace(done.text, path="")
    return dataclasses.replace(done, provenance={}, variants=variants, text=text)


def counted(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[tuple[str, int]]:
    """(stage, number) of every batch that is computed from now on; the one numbered ``fail_at`` is interrupted."""
    done: list[tuple[str, int]] = []

    def computed(stage: stages.Stage, index: int, step: Callable[[int], None]) -> Record:
        if len(done) == fail_at:
            raise KeyboardInterrupt
        done.append((stage.name, index))
        return run_batch(stage, index, step)

    monkeypatch.setattr(sys.modules[run_study.__module__], "run_batch", computed)
    return done


class TestStages:
    def names(self, job: Job) -> list[str]:
        return [s.name for s in job.stages]

    def test_what_there_is_to_run(self, options: StudyOptions) -> None:
        assert self.names(prepare(options)) == ["floor", "text"]
        assert self.names(prepare(dataclasses.replace(options, prompt="Once"))) == ["floor", "prompt", "text"]
        assert self.names(prepare(dataclasses.replace(options, text=None))) == ["floor", "prompt"]
        assert self.names(prepare(dataclasses.replace(options, dtype="float64"))) == ["text"]

    @pytest.mark.parametrize(("scoring", "first"), [("llama.cpp", CTX // 2), ("all", 0)])
    def test_scored_positions(self, options: StudyOptions, scoring: str, first: int) -> None:
        stage = prepare(dataclasses.replace(options, scoring=scoring)).stage("text")
        assert (stage.first, stage.last) == (first, CTX - 1)
        record = run_batch(stage, 1)
        assert record["kl"].shape == record["log_p"].shape == (3, 2, CTX - 1 - first)

    def test_batches_are_the_text_in_order_and_depend_on_nothing_but_their_number(self, options: StudyOptions) -> None:
        stage = prepare(options).stage("text")
        assert stage.n_batches == 5
        assert np.concatenate([stage.batch(i) for i in range(5)]).tolist() == stage.ids.tolist()
        late, early = run_batch(stage, 3), run_batch(stage, 0)
        assert all(np.array_equal(late[key], run_batch(stage, 3)[key]) for key in late)
        assert "last" in early
        assert "last" not in late

    def test_the_size_of_the_batches_changes_rounding_only(self, options: StudyOptions, monkeypatch: pytest.MonkeyPatch) -> None:
        small = prepare(options).stage("text")
        monkeypatch.setattr(plan, "BATCH_TOKENS", 100 * CTX)
        large = prepare(options).stage("text")
        assert large.n_batches == 1
        joined, whole = join_batches([run_batch(small, i) for i in range(5)]), run_batch(large, 0)
        np.testing.assert_allclose(joined["kl"], whole["kl"], rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(joined["log_p"], whole["log_p"], rtol=1e-5, atol=1e-5)


class TestResuming:
    def test_the_same_bits_with_and_without_a_folder(self, options: StudyOptions, tmp_path: Path) -> None:
        assert numbers(run_study(options, folder=tmp_path / "a")) == numbers(run_study(options))

    @pytest.mark.parametrize("n_done", [0, 1, 3, 5])
    def test_an_interrupted_study_goes_on(
        self, options: StudyOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_done: int
    ) -> None:
        whole = numbers(run_study(options))
        with monkeypatch.context() as patched:
            first = counted(patched, fail_at=n_done)
            with pytest.raises(KeyboardInterrupt):
                run_study(options, folder=tmp_path / "s")
        second, watched = counted(monkeypatch), Watched()
        assert numbers(run_study(options, watched, tmp_path / "s")) == whole
        assert first + second == [("floor", 0), *(("text", i) for i in range(5))]
        assert len(second) == 6 - n_done
        assert any("Stored already" in note for note in watched.notes) == (n_done > 1)

    @pytest.mark.parametrize(("n_done", "where"), [(2, ("prompt", 1, 1)), (4, ("text", 2, 5))])
    def test_an_interrupted_study_has_a_report(
        self, options: StudyOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_done: int, where: tuple[str, int, int]
    ) -> None:
        """Its figures are those of a study of as much text."""
        both = dataclasses.replace(options, prompt="Once upon a time")
        with monkeypatch.context() as patched:
            counted(patched, fail_at=n_done)
            with pytest.raises(KeyboardInterrupt):
                run_study(both, folder=tmp_path / "s")
        told = told_of(tmp_path / "s")
        assert told.interrupted == Interrupted(*where)
        shorter = dataclasses.replace(both, n_chunks=4) if where[0] == "text" else dataclasses.replace(both, text=None)
        expected = run_study(shorter)
        assert [v.logits for v in told.variants] == [v.logits for v in expected.variants]
        assert [v.layers for v in told.variants] == [v.layers for v in expected.variants]
        assert (told.text is None) == (where[0] == "prompt")
        run_study(both, folder=tmp_path / "s")
        assert read_sketch(tmp_path / "s") is None  # the results are in study.json then

    def test_a_finished_study_is_not_computed_again(self, options: StudyOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        done = run_study(options, folder=tmp_path)
        computed = counted(monkeypatch)
        assert numbers(run_study(options, folder=tmp_path)) == numbers(done)
        assert computed == []

    def test_a_full_disk(self, options: StudyOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        put = StudyStore.put

        def full(store: StudyStore, stage: str, index: int, record: Record) -> None:
            if (stage, index) == ("text", 2):
                raise StudyDiskError("no space is left")
            put(store, stage, index, record)

        with monkeypatch.context() as patched:
            patched.setattr(StudyStore, "put", full)
            with pytest.raises(StudyDiskError):
                run_study(options, folder=tmp_path)
        computed = counted(monkeypatch)
        assert numbers(run_study(options, folder=tmp_path)) == numbers(run_study(options))
        assert computed[:3] == [("text", 2), ("text", 3), ("text", 4)]

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"types": ("Q4_0",)}, "--types: Q4_0,Q8_0 → Q4_0"),
            ({"n_chunks": 8}, "--chunks: 10 → 8"),
            ({"scoring": "all"}, "--scoring: llama.cpp → all"),
            ({"prompt": "Once"}, "--prompt: none → Once"),
            ({"n_ctx": 32, "n_chunks": 20}, "--ctx: 64 → 32"),
        ],
    )
    def test_another_option_is_refused(self, options: StudyOptions, tmp_path: Path, changes: dict[str, object], said: str) -> None:
        run_study(options, folder=tmp_path)
        with pytest.raises(StudyMismatchError, match=said):
            run_study(dataclasses.replace(options, **changes), folder=tmp_path)

    def test_another_text_or_model_under_the_same_name_is_refused(self, options: StudyOptions, tmp_path: Path) -> None:
        model = Path(options.models[0])
        run_study(options, folder=tmp_path / "s")
        assert options.text is not None
        words = options.text.read_text("utf-8")
        options.text.write_text(words.replace("red", "big"), "utf-8")
        with pytest.raises(StudyMismatchError, match="the content of --text has changed"):
            run_study(options, folder=tmp_path / "s")
        options.text.write_text(words, "utf-8")
        content = bytearray(model.read_bytes())
        content[-3] ^= 1  # one bit of a weight
        model.write_bytes(content)
        with pytest.raises(StudyMismatchError, match=r"the content of .*m\.gguf has changed"):
            run_study(options, folder=tmp_path / "s")

    def test_a_finished_study_makes_room_where_it_may(self, options: StudyOptions, tmp_path: Path) -> None:
        run_study(options, folder=tmp_path)
        other = dataclasses.replace(options, types=("Q5_1",))
        assert numbers(run_study(other, folder=tmp_path, replace_finished=True)) == numbers(run_study(other))


class TestStoppingEarly:
    @pytest.fixture(autouse=True)
    def few_chunks_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("quantscope.logit_stats.MIN_CHUNKS", 4)

    def test_stops_when_every_mean_is_known(self, options: StudyOptions) -> None:
        done = run_study(dataclasses.replace(options, until_ci=0.9))
        assert done.text is not None
        assert (done.text.n_chunks, done.text.n_chunks_given) == (4, 10)
        for v in done.quantized:
            s = v.logits
            assert s is not None
            assert s.kl_nats is not None
            assert s.kl_nats_high is not None
            assert (s.kl_nats_high - s.kl_nats) / s.kl_nats <= 0.9

    def test_a_closer_bound_goes_on_from_there(self, options: StudyOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run_study(dataclasses.replace(options, until_ci=0.9), folder=tmp_path)
        computed = counted(monkeypatch)
        assert numbers(run_study(options, folder=tmp_path)) == numbers(run_study(options))
        assert computed[:3] == [("text", 2), ("text", 3), ("text", 4)]


def test_the_monitor_is_told(options: StudyOptions) -> None:
    watched = Watched()
    run_study(options, watched)
    assert any(note.startswith("Plan: 5 batches of 2 chunks of 64 tokens") for note in watched.notes)
    assert watched.totals == {"floor": 4, "text": 20}  # 2 layers, the embedding and the head, each batch
    assert watched.steps["text"][-1] == 20
    assert watched.steps["text"] == sorted(watched.steps["text"])
    assert len(watched.kl) == 5
    assert set(watched.kl[0]) == {"Q4_0", "Q8_0"}
    assert watched.kl[-1]["Q4_0"] > watched.kl[-1]["Q8_0"] > 0


class TestRefused:
    def test_a_bound_too_small_for_one_layer_says_what_would_do(self, options: StudyOptions) -> None:
        with pytest.raises(UsageError, match=r"--memory 100 MB: one layer .* Give `--memory 0\.6G`"):
            run_study(dataclasses.replace(options, memory_bytes=10**8))

    def test_another_shape_and_another_vocabulary(self, tmp_path: Path, options: StudyOptions) -> None:
        first = make_gguf(tmp_path / "a.gguf")
        narrow = make_gguf(tmp_path / "b.gguf", n_embd=32)
        renamed = tmp_path / "c.gguf"
        renamed.write_bytes(first.read_bytes().replace(b"<0x41>", b"<0x4F>"))
        prompt = {"types": (), "text": None, "n_chunks": None, "tokens": (1, 2, 3)}
        with pytest.raises(ShapeError, match="n_embd is 32, expected 64"):
            run_study(dataclasses.replace(options, models=(str(first), str(narrow)), **prompt))
        with pytest.raises(VocabularyError, match=r"token 68 is '<0x4F>', expected '<0x41>'"):
            run_study(dataclasses.replace(options, models=(str(first), str(renamed)), **prompt))
