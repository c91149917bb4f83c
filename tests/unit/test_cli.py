"""The command line around a study: help, options, output files, exit codes.  The study itself is made up here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from quantscope import __version__
from quantscope.cli.main import main
from quantscope.cli.output import write_files
from quantscope.errors import PromptError, UsageError
from quantscope.monitor import Monitor
from quantscope.results import DEFAULT_TYPES, Study, StudyOptions
from tests.unit import studies

Capture = pytest.CaptureFixture[str]
Run = Callable[[StudyOptions, Monitor], Study]
Fake = Callable[[Run], list[StudyOptions]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    """Put another function in the place of ``run_study``, in an empty working folder; returns the list of options it is called with."""
    monkeypatch.chdir(tmp_path)
    calls: list[StudyOptions] = []

    def install(run: Run) -> list[StudyOptions]:
        def recording(options: StudyOptions, monitor: Monitor, folder: Path | None, *, replace_finished: bool) -> Study:
            assert (folder is not None) == (options.text is not None)
            calls.append(options)
            return run(options, monitor)

        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setitem(sys.modules, "quantscope.study", SimpleNamespace(run_study=recording))
        return calls

    return install


def good(options: StudyOptions, monitor: Monitor) -> Study:
    monitor.note("Plan: one batch.")
    monitor.begin("text", 2, 100)
    monitor.step("text", 1, "layer 1/1")
    return studies.study()


class TestHelp:
    def test_names_every_command_and_the_demo(self, capsys: Capture) -> None:
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in ("demo", "study", "inspect"))
        assert "quantscope demo" in text

    @pytest.mark.parametrize("arguments", [[], ["-h"]])
    def test_no_arguments_and_short_option(self, arguments: list[str], capsys: Capture) -> None:
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith("Usage: quantscope")

    def test_study_names_every_option_of_the_design(self, capsys: Capture) -> None:
        assert main(["study", "--help"]) == 0
        text = capsys.readouterr().out
        options = "--types --ref --prompt --tokens --text --ctx --chunks --scoring --until-ci --positions --memory --device --dtype --ray"
        options += " --out --json"
        assert [o for o in options.split() if f" {o} " not in text] == []

    def test_version(self, capsys: Capture) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"quantscope {__version__}\n"

    def test_help_imports_nothing_heavy(self) -> None:
        code = (
            "import sys; from quantscope.cli.main import main; main(['study', '--help'])\n"
            "heavy = {'torch', 'numpy', 'numba', 'transformers', 'gguf', 'rich', 'sentencepiece'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class TestStudyOptions:
    def parsed(self, fake: Fake, *arguments: str) -> StudyOptions:
        calls = fake(good)
        assert main(["study", *arguments]) == 0
        return calls[-1]

    def test_one_model_is_quantized_by_default(self, fake: Fake) -> None:
        assert self.parsed(fake, "m.gguf") == StudyOptions(models=("m.gguf",), types=DEFAULT_TYPES)

    def test_several_models_are_taken_as_they_are(self, fake: Fake) -> None:
        assert self.parsed(fake, "a.gguf", "b.gguf").types == ()
        options = self.parsed(fake, "a.gguf", "--ref", "o.gguf")
        assert (options.types, options.ref) == ((), "o.gguf")

    def test_all_options(self, fake: Fake) -> None:
        options = self.parsed(
            fake, "m.gguf", "--types", "q4_0, Q8_0,", "--tokens", "1, 403 ,407", "--text", "t.txt", "--ctx", "64", "--chunks", "3",
            "--positions", "last", "--device", "cuda", "--dtype", "float64", "--scoring", "all", "--until-ci", "5%", "--memory", "1.5G",
            "--ray", "local",
        )  # fmt: skip
        assert options == StudyOptions(
            models=("m.gguf",),
            types=("q4_0", "Q8_0"),
            tokens=(1, 403, 407),
            text=Path("t.txt"),
            n_ctx=64,
            n_chunks=3,
            positions="last",
            scoring="all",
            until_ci=0.05,
            memory_bytes=1_500_000_000,
            device="cuda",
            dtype="float64",
            ray="local",
        )

    @pytest.mark.parametrize(
        ("given", "n_bytes"), [("4G", 4 * 10**9), ("800M", 8 * 10**8), ("1.5GiB", 3 << 29), ("2gb", 2 * 10**9), ("123456", 123456)]
    )
    def test_amounts_of_memory(self, given: str, n_bytes: int, fake: Fake) -> None:
        assert self.parsed(fake, "m.gguf", "--memory", given).memory_bytes == n_bytes

    @pytest.mark.parametrize(("given", "share"), [("5%", 0.05), ("0.05", 0.05), (" 12.5 %", 0.125)])
    def test_shares(self, given: str, share: float, fake: Fake) -> None:
        assert self.parsed(fake, "m.gguf", "--text", "t.txt", "--until-ci", given).until_ci == share

    def test_an_empty_prompt_is_passed_on_as_empty(self, fake: Fake) -> None:
        assert self.parsed(fake, "m.gguf", "--prompt", "").prompt == ""
        assert self.parsed(fake, "m.gguf", "--tokens", "").tokens == ()


class TestOutput:
    def test_writes_its_files_and_says_where(self, fake: Fake, tmp_path: Path, capsys: Capture) -> None:
        fake(good)
        assert main(["study", "models/tiny.Q8.gguf"]) == 0
        out, err = capsys.readouterr()
        folder = tmp_path / "quantscope-tiny.Q8"
        assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.md", "study.json"]
        names = [str(Path("quantscope-tiny.Q8") / name) for name in ("report.html", "report.md", "study.json")]
        assert f"Wrote {names[0]}, {names[1]} and {names[2]}." in err
        assert "Layer by layer" in out
        assert "\x1b" not in out + err
        assert Study.from_json(json.loads((folder / "study.json").read_text("utf-8"))).original == "F16"
        assert (folder / "report.md").read_text("utf-8").startswith("# quantscope study of demo\n")

    def test_json_alone_on_stdout(self, fake: Fake, tmp_path: Path, capsys: Capture) -> None:
        fake(good)
        assert main(["study", "m.gguf", "--out", "deep/er", "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["version"] == 1
        assert out == (tmp_path / "deep/er/study.json").read_text("utf-8")
        assert "Layer by layer" in err

    def test_runs_again_over_its_own_results(self, fake: Fake, tmp_path: Path) -> None:
        fake(good)
        assert main(["study", "m.gguf"]) == main(["study", "m.gguf"]) == 0
        assert len(list((tmp_path / "quantscope-m").iterdir())) == 3

    def test_folder_model_names_the_output(self, fake: Fake, tmp_path: Path) -> None:
        fake(good)
        (tmp_path / "Qwen3-0.6B").mkdir()
        assert main(["study", "Qwen3-0.6B/"]) == 0
        assert (tmp_path / "quantscope-Qwen3-0.6B" / "study.json").exists()

    def test_new_files_are_readable_like_any_other(self, tmp_path: Path) -> None:
        (tmp_path / "plain").touch()
        (written,) = write_files(tmp_path / "new", {"a.txt": "ä\udc80"})
        assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode
        assert written.read_bytes() == "ä\\udc80".encode()

    def test_a_failed_write_changes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "a").write_text("before")

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        for folder in ("old", "new"):
            with pytest.raises(UsageError, match="No space left on device"):
                write_files(tmp_path / folder, {"a": "after", "b": "after"})
        assert [(p.name, p.read_text()) for p in (tmp_path / "old").iterdir()] == [("a", "before")]
        assert not (tmp_path / "new").exists()


class TestExitCodes:
    def failing(self, error: BaseException) -> Run:
        def run(options: StudyOptions, monitor: Monitor) -> Study:
            raise error

        return run

    def test_expected_error_is_one_paragraph(self, fake: Fake, tmp_path: Path, capsys: Capture) -> None:
        fake(self.failing(PromptError("word " * 60 + "\x1b[31m\n end.")))
        assert main(["study", "m.gguf"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert lines[0].startswith("PromptError: word word")
        assert len(lines) > 2
        assert max(map(len, lines)) <= 120
        assert "" not in lines
        assert "\x1b" not in err
        assert list(tmp_path.iterdir()) == []

    def test_internal_error_has_a_traceback_and_asks_for_a_report(self, fake: Fake, capsys: Capture) -> None:
        fake(self.failing(ZeroDivisionError("boom")))
        assert main(["study", "m.gguf"]) == 3
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert "ZeroDivisionError: boom" in err
        assert "Please report it" in " ".join(err.split())

    def test_interrupt(self, fake: Fake, tmp_path: Path, capsys: Capture) -> None:
        fake(self.failing(KeyboardInterrupt()))
        assert main(["study", "m.gguf"]) == 130
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert "give the same command again to go on" in " ".join(said.split())
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["stdy"], "No such command 'stdy'"),
            (["study"], "Missing argument 'MODEL'"),
            (["study", "m", "--typo"], "No such option: --typo"),
            (["study", "m", "--positions", "some"], "'some'"),
            (["study", "m", "--ctx", "x"], "'--ctx'"),
            (["study", "m", "--prompt", "a", "--tokens", "1"], "expected one of them"),
            (["study", "m", "n", "--types", "Q4_0"], "2 models were given"),
            (["study", "m", "--ref", "n", "--types", "Q4_0"], "Leave out --ref"),
            (["study", "m", "--ctx", "64"], "Add --text FILE"),
            (["study", "m", "--chunks", "4"], "Add --text FILE"),
            (["study", "m", "--until-ci", "5%"], "Add --text FILE"),
            (["study", "m", "--ray", "local"], "Add --text FILE"),
            (["study", "m", "--text", "t", "--until-ci", "x"], "--until-ci 'x': expected a part of the mean"),
            (["study", "m", "--text", "t", "--until-ci", "0%"], "expected a part of the mean"),
            (["study", "m", "--text", "t", "--until-ci", "nan"], "expected a part of the mean"),
            (["study", "m", "--memory", "lots"], "--memory 'lots' is no amount of memory"),
            (["study", "m", "--memory", "-4G"], "is no amount of memory"),
            (["study", "m", "--memory", "nan"], "is no amount of memory"),
            (["study", "m", "--scoring", "some"], "'some'"),
            (["study", "m", "--text", "t", "--chunks", "0"], "--chunks 0: expected at least 1"),
            (["study", "m", "--types", ","], "names no type"),
            (["study", "m", "--tokens", "1,x"], "'x' is no token id"),
            (["study", "m", "--tokens", "-1"], "'-1' is no token id"),
            (["study", "m", "--tokens", "1.5"], "'1.5' is no token id"),
        ],
    )
    def test_bad_usage(self, arguments: list[str], said: str, fake: Fake, tmp_path: Path, capsys: Capture) -> None:
        calls = fake(good)
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("UsageError: ")
        assert said in " ".join(err.split())
        assert calls == []
        assert list(tmp_path.iterdir()) == []

    def test_output_folder_that_is_a_file(self, fake: Fake, tmp_path: Path, capsys: Capture) -> None:
        calls = fake(good)
        (tmp_path / "taken").write_text("mine")
        for out in ("taken", "taken/below"):
            assert main(["study", "m.gguf", "--out", out]) == 2
        assert "is a file" in capsys.readouterr().err
        assert calls == []
        assert (tmp_path / "taken").read_text() == "mine"

    @pytest.mark.skipif(os.name != "posix", reason="closes the reading end of a pipe, as `| head` does")
    def test_closed_pipe_is_no_error(self) -> None:
        code = "import sys; from quantscope.cli.main import run; sys.argv = ['q', '--help']; run()"
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, "")
