"""The text lines of fingerprints: the page's test vectors and code in every language that has a compiler here, damaged logs, runs."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantscope.errors import ImportFormatError
from quantscope.fingerprint import Run, fingerprint, parse_line, run_line, to_line
from quantscope.importers.fingerprints import read_fingerprints
from quantscope.trace import Fingerprint, Origin

PAGE = (Path(__file__).parents[2] / "docs" / "fingerprints.md").read_text("utf-8")
VECTORS = {
    "one": [1.0],
    "steps": [i + 1.0 for i in range(8)],
    "mixed": [((7919 * i) % 1000 - 500) / 256 for i in range(1000)],
}
NOT_A_NUMBER = [0.0, -0.5, math.nan, 3.0]


def tap_line(text: str) -> tuple[str, Fingerprint]:
    found = parse_line(text)
    assert found is not None
    assert not isinstance(found, Run)
    return found


def same(a: Fingerprint, b: Fingerprint) -> None:
    """Equal but for the rounding of the sums' order and of nine digits."""
    torch.testing.assert_close(a.sums, b.sums, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert (a.n, a.at, a.positions) == (b.n, b.at, b.positions)
    for x, y in ((a.rms, b.rms), (a.peak, b.peak)):
        assert x == pytest.approx(y, rel=1e-6, nan_ok=True)


class TestPage:
    @pytest.mark.parametrize("name", VECTORS)
    def test_vectors(self, name: str) -> None:
        (line,) = re.findall(rf"^    (qsfp1 {name} .*)$", PAGE, re.MULTILINE)
        same(tap_line(line)[1], fingerprint(torch.tensor(VECTORS[name])))

    @pytest.mark.parametrize("language", ["c", "rust", "javascript"])
    def test_code_gives_the_vectors(self, language: str, tmp_path: Path) -> None:
        """Compiled with the program the reader would write around it: three vectors, and one with a NaN."""
        (code,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
        lines = PROGRAMS[language](code, tmp_path).splitlines()
        assert len(lines) == 4
        for (name, values), line in zip((VECTORS | {"nan": NOT_A_NUMBER}).items(), lines, strict=True):
            tap, found = tap_line(line)
            assert tap == name
            same(found, fingerprint(torch.tensor(values)))


def run_c(code: str, folder: Path) -> str:
    main = """
    int main(void) {
        float one[] = {1}, steps[8], mixed[1000], bad[] = {0, -0.5f, NAN, 3};
        for (int i = 0; i < 8; i++) steps[i] = i + 1;
        for (int i = 0; i < 1000; i++) mixed[i] = (7919 * i % 1000 - 500) / 256.0f;
        qsfp(stdout, "one", one, 1); qsfp(stdout, "steps", steps, 8); qsfp(stdout, "mixed", mixed, 1000); qsfp(stdout, "nan", bad, 4);
    }"""
    (folder / "q.c").write_text(code + main)
    return compiled(folder, "gcc", "-std=c99", "-O2", "-Wall", "-Werror", "q.c", "-o", "q", "-lm")


def run_rust(code: str, folder: Path) -> str:
    main = """
    fn main() {
        let steps: Vec<f32> = (0..8).map(|i| i as f32 + 1.0).collect();
        let mixed: Vec<f32> = (0..1000).map(|i| (7919 * i % 1000 - 500) as f32 / 256.0).collect();
        println!("{}", qsfp("one", &[1.0])); println!("{}", qsfp("steps", &steps)); println!("{}", qsfp("mixed", &mixed));
        println!("{}", qsfp("nan", &[0.0, -0.5, f32::NAN, 3.0]));
    }"""
    (folder / "q.rs").write_text(code + main)
    return compiled(folder, "rustc", "q.rs", "-o", "q")


def run_javascript(code: str, folder: Path) -> str:
    main = """
    const steps = Float32Array.from({ length: 8 }, (_, i) => i + 1);
    const mixed = Float32Array.from({ length: 1000 }, (_, i) => (7919 * i % 1000 - 500) / 256);
    const bad = Float32Array.of(0, -0.5, NaN, 3);
    for (const [tap, x] of [["one", Float32Array.of(1)], ["steps", steps], ["mixed", mixed], ["nan", bad]]) console.log(qsfp(tap, x));
    """
    (folder / "q.js").write_text(code + main)
    return output(needed("node"), "q.js", folder=folder)


PROGRAMS: dict[str, Callable[[str, Path], str]] = {"c": run_c, "rust": run_rust, "javascript": run_javascript}


def needed(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed: its code in docs/fingerprints.md cannot be run here")
    return found


def compiled(folder: Path, compiler: str, *arguments: str) -> str:
    output(needed(compiler), *arguments, folder=folder)
    return output(str(folder / "q"), folder=folder)


def output(*command: str, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


class TestLine:
    @given(st.lists(floats, min_size=16, max_size=16), floats, floats, st.sampled_from([None, (0,), (0, 1, 2), (3, 5, 6, 9)]))
    def test_round_trip_is_exact(self, sums: list[float], rms: float, peak: float, positions: tuple[int, ...] | None) -> None:
        f = Fingerprint(torch.tensor(sums), 1000, rms, peak, 999, positions)
        tap, back = tap_line(to_line("l_out-3", f))
        assert tap == "l_out-3"
        torch.testing.assert_close(back.sums, f.sums, rtol=0, atol=0, equal_nan=True)
        assert (back.n, back.at, back.positions) == (f.n, f.at, f.positions)
        assert torch.tensor([back.rms, back.peak]).equal(torch.tensor([rms, peak])) or math.isnan(rms) or math.isnan(peak)

    def test_form(self) -> None:
        line = to_line("Qcur-0", Fingerprint(torch.arange(16) / 3, 64, 1.5, 2.0, 7, (0, 1, 2, 9)))
        assert line.startswith("qsfp1 Qcur-0 n=64 rms=1.5 peak=2 at=7 pos=0-2,9 s=0,0.333333343,0.666666687,1,")
        assert line.endswith(",5;")

    @pytest.mark.parametrize(
        "dress",
        [
            "{}",
            "2025-10-08T12:00:00Z DEBUG engine::layer: {}",
            "\x1b[32m[INFO]\x1b[0m {}\x1b[0m",
            "I/flutter (1234): {} trailing words 1 2 3",
            '{{"message": "{}"}}',
        ],
    )
    def test_anything_may_stand_around_it(self, dress: str) -> None:
        f = fingerprint(torch.arange(12.0))
        same(tap_line(dress.format(to_line("a", f)))[1], f)

    def test_sums_as_languages_print_arrays(self) -> None:
        f = fingerprint(torch.tensor(VECTORS["steps"]))
        head, sums = to_line("a", f).split("s=", 2)[0], [float(s) for s in f.sums]
        head = to_line("a", f)[: to_line("a", f).index(" s=")]
        for shown in (f"{sums}", " ".join(map(str, sums)), "[" + " ".join(f"{s:+.9E}" for s in sums) + " ]", f"[ {str(sums)[1:]}"):
            same(tap_line(f"{head} s={shown};")[1], f)

    @pytest.mark.parametrize("text", ["", "qsfp", "no qsfp1here", "🔍 [LAYER 0] Input: rms=0.1", "xqsfp1 a n=1", "qsfp: 1"])
    def test_other_lines_say_nothing(self, text: str) -> None:
        assert parse_line(text) is None

    def test_cut_anywhere_is_an_error_not_another_number(self) -> None:
        line = to_line("l_out-0", fingerprint(torch.randn(50, generator=torch.Generator().manual_seed(0))))
        for end in range(len("qsfp1"), len(line)):
            with pytest.raises(ImportFormatError, match="damaged or cut short"):
                parse_line(line[:end])

    @given(st.text(max_size=60), st.integers(0, 200), st.integers(0, 8))
    def test_damage_never_gives_a_traceback(self, noise: str, at: int, gone: int) -> None:
        line = to_line("l_out-0", fingerprint(torch.tensor(VECTORS["steps"])))
        damaged = line[:at] + noise + line[at + gone :]
        try:
            parse_line(damaged)
        except ImportFormatError as e:
            assert len(str(e)) > 60  # noqa: PT017

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            ("qsfp1 ", "qsfp2 ", "version 2"),
            ("at=7", "at=8", "contradicts itself"),
            ("at=7", "at=7 pos=5-3", "contradicts itself"),
            ("at=7", "at=7 pos=4,4", "contradicts itself"),
            ("at=7", "at=7 pos=0-8", "contradicts itself"),  # nine positions, eight values
            ("at=7", "at=7 pos=0-9999999", "contradicts itself"),
            ("n=8", "n=" + "9" * 5000, "damaged"),
            (";", ",1;", "damaged"),
            ("2.82842708,0", "2,82842708,0", "damaged"),  # a decimal comma makes seventeen sums
        ],
    )
    def test_nonsense_is_named(self, old: str, new: str, says: str) -> None:
        line = to_line("a", fingerprint(torch.tensor(VECTORS["steps"])))
        assert old in line
        with pytest.raises(ImportFormatError, match=says):
            parse_line(line.replace(old, new, 1))

    def test_run_line(self) -> None:
        origin = Origin("my engine", model="m.gguf", model_sha256="ab12", tokens=(1, 15043))
        assert run_line(origin) == "qsfp1-run tokens=1,15043 engine=my_engine model=m.gguf sha256=ab12"
        assert parse_line("[x] " + run_line(origin)) == Run((1, 15043), "my_engine", "m.gguf", "ab12")
        assert parse_line("qsfp1-run") == Run()
        with pytest.raises(ImportFormatError, match="without spaces"):
            parse_line("qsfp1-run tokens=[1,")


class TestLog:
    def lines(self, *taps: str, seed: int = 0, positions: tuple[int, ...] | None = None) -> str:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
        return "".join(to_line(tap, fingerprint(x, positions)) + "\n" for tap in taps)

    def test_one_run(self) -> None:
        log = "loading\nqsfp1-run tokens=1,2,3 engine=toy model=m.gguf sha256=ff\n" + self.lines("embd", "l_out-0") + "bye\n"
        (trace,) = read_fingerprints(log, "toy.log")
        assert trace.origin == Origin("toy", model="m.gguf", model_sha256="ff", tokens=(1, 2, 3))
        assert list(trace.taps) == ["embd", "l_out-0"]
        found = trace.find("embd", Fingerprint)
        assert found is not None
        same(found, fingerprint(torch.randn(3, 4, generator=torch.Generator().manual_seed(0))))

    def test_a_run_line_and_a_tap_that_comes_again_begin_another_run(self) -> None:
        log = (
            "qsfp1-run tokens=1\n"
            + self.lines("embd", "l_out-0")
            + "qsfp1-run tokens=2\n"
            + self.lines("embd")
            + self.lines("embd", seed=1)
        )
        traces = read_fingerprints(log, "x")
        assert [t.origin.tokens for t in traces] == [(1,), (2,), None]
        assert [list(t.taps) for t in traces] == [["embd", "l_out-0"], ["embd"], ["embd"]]
        assert "tokens=1,2,3" in traces[2].origin.notes[0]

    def test_steps_of_decoding_are_one_run(self) -> None:
        log = "qsfp1-run tokens=7,8,9,10\n" + "".join(self.lines("embd", "l_out-0", positions=p) for p in ((0, 1), (2,), (3,)))
        (trace,) = read_fingerprints(log, "x")
        assert [e.positions for e in trace.all_of("l_out-0", Fingerprint)] == [(0, 1), (2,), (3,)]

    def test_damage_names_file_and_line(self) -> None:
        with pytest.raises(ImportFormatError, match=r"run\.log, line 3: .*cut short"):
            read_fingerprints("a\n" + self.lines("embd") + "qsfp1 l_out-0 n=3 rms=", "run.log")

    @pytest.mark.parametrize("text", ["", "hello\n", "qsfp1-run tokens=1,2\n"])
    def test_no_fingerprint_is_an_error(self, text: str) -> None:
        with pytest.raises(ImportFormatError, match="found none"):
            read_fingerprints(text, "x.log")
