"""The pure parts of the benchmarks: a benchmark that reads or adds up its figures wrongly is worse than none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks import llama_programs, measure
from benchmarks.measure import Usage
from benchmarks.profile_groups import OTHER, group_seconds
from benchmarks.scaling import TYPES, cells_wanted, line
from benchmarks.shaped_model import BLOCK, DEMO_TEXT, SHAPES, Shape, make_text, pieces, write_model
from benchmarks.study import Setting, llama_round, quantscope_command
from benchmarks.study_report import Comparison, Report, Step, markdown, parse_perplexity, parse_study, validity
from quantscope.recipes import PRESETS
from quantscope.results import LogitStats, Study, Variant
from quantscope.sources.gguf import open_gguf
from quantscope.tokenizers import from_source

SMALL = Shape(n_layer=2, n_embd=64, n_head=4, n_head_kv=2, n_ff=96, n_vocab=6000)

# what llama-perplexity of llama-cpp-python 0.3.36 printed; only RMS Δp, which was 0.000, is another number
PRINTED = """
====== Perplexity statistics ======
Mean PPL(Q)                   : 12810.374262 ± 127.610770
Mean PPL(base)                : 12803.746595 ± 128.799257
Cor(ln(PPL(Q)), ln(PPL(base))):  98.61%
Mean ln(PPL(Q)/PPL(base))     :   0.000518 ±   0.001671
Mean PPL(Q)/PPL(base)         :   1.000518 ±   0.001672
Mean PPL(Q)-PPL(base)         :   6.627667 ±  21.394815

====== KL divergence statistics ======
Mean    KLD:   0.001439 ±   0.000008
Maximum KLD:   0.002864
99.9%   KLD:   0.002425
99.0%   KLD:   0.002015
95.0%   KLD:   0.001838
90.0%   KLD:   0.001761
Median  KLD:   0.001431
10.0%   KLD:   0.001133
 5.0%   KLD:   0.001047
 1.0%   KLD:   0.000932
 0.1%   KLD:   0.000901
Minimum KLD:   0.000885

====== Token probability statistics ======
Mean    Δp: -0.000 ± 0.000 %
Maximum Δp:  0.002%
99.9%   Δp:  0.002%
99.0%   Δp:  0.001%
95.0%   Δp:  0.001%
90.0%   Δp:  0.001%
75.0%   Δp:  0.000%
Median  Δp: -0.000%
25.0%   Δp: -0.000%
10.0%   Δp: -0.001%
 5.0%   Δp: -0.001%
 1.0%   Δp: -0.001%
 0.1%   Δp: -0.001%
Minimum Δp: -0.002%
RMS Δp    :  0.125 ± 0.010 %
Same top p: 68.431 ± 1.456 %
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shaped") / "small.gguf"
    assert write_model(path, SMALL)
    return path


@pytest.mark.parametrize(("name", "n_parameters"), [("tinyllama", 1_100_048_384), ("7b", 6_738_415_616)])
def test_shapes_have_the_published_number_of_parameters(name: str, n_parameters: int) -> None:
    assert sum(int(np.prod(dims)) for _, dims in SHAPES[name].tensors()) == n_parameters


def test_model_looks_trained_and_no_two_parts_are_equal(model: Path) -> None:
    tensors = {t.name: t.data for t in gguf.GGUFReader(model).tensors}
    assert list(tensors) == [name for name, _ in SMALL.tensors()]
    assert {name: t.shape for name, t in tensors.items()} == dict(SMALL.tensors())
    assert all((t == 1).all() if t.ndim == 1 else t.dtype == np.float16 for t in tensors.values())
    q, down = (np.stack([tensors[f"blk.{i}.{name}.weight"].astype(np.float32) for i in range(2)]) for name in ("attn_q", "ffn_down"))
    assert q.std() == pytest.approx(0.02, rel=0.05)
    assert down.std() == pytest.approx(0.02 / 2, rel=0.05)  # √(2 · 2 layers)
    assert not (q[0] == q[1]).any(axis=1).all()
    assert len(np.unique(tensors["output.weight"], axis=0)) == SMALL.n_vocab
    assert all(BLOCK % k for k in range(2, 4097))  # a prime below 2²⁴


def test_model_is_kept_when_complete_and_written_again_when_not(model: Path, tmp_path: Path) -> None:
    before = model.stat().st_mtime_ns
    assert not write_model(model, SMALL)
    assert model.stat().st_mtime_ns == before
    assert [p.name for p in model.parent.iterdir()] == ["small.gguf"]
    short = tmp_path / "short.gguf"
    short.write_bytes(model.read_bytes()[:-32])
    assert write_model(short, SMALL)
    assert short.read_bytes() == model.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["short.gguf"]


def test_float32_model_is_twice_as_large(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "f32.gguf"
    write_model(path, SMALL, "F32")
    matrices = sum(2 * int(np.prod(dims)) for _, dims in SMALL.tensors() if len(dims) == 2)
    assert path.stat().st_size - model.stat().st_size == matrices
    assert open_gguf(path).tensors["output.weight"].qtype.name == "F32"


@pytest.mark.parametrize("n", [16, 1000, 20_000])  # 20,000: more than two rounds of the demo text
def test_text_has_enough_tokens_and_few_more(model: Path, n: int) -> None:
    ids = from_source(open_gguf(model)).encode(make_text(n))
    assert n <= len(ids) < 2 * n + 10


def test_rounds_of_a_long_text_differ() -> None:
    own = [line for line in DEMO_TEXT.read_text("utf-8").splitlines() if line.strip()]
    lines = make_text(20_000).splitlines()
    first, second = lines[: len(own)], lines[len(own) : 2 * len(own)]
    assert sorted(first) == sorted(second)
    assert first != second


def test_pieces_are_different_and_a_beginning_comes_before_the_longer_ones() -> None:
    found = pieces(32000 - 259)
    assert len(set(found)) == 32000 - 259
    place = {piece: i for i, piece in enumerate(found)}
    assert place["▁t"] < place["▁th"] < place["▁the"] < place["th"]
    with pytest.raises(ValueError, match="pieces was asked for"):
        pieces(10**6)


def test_perplexity_output() -> None:
    assert parse_perplexity(PRINTED) == Comparison(12810.374262, 12803.746595, 0.001439, 0.000008, 0.002864, 0.125 * 0.01, 68.431 * 0.01)


def test_perplexity_output_that_breaks_off() -> None:
    found = parse_perplexity(PRINTED[: PRINTED.index("====== Token")].replace("0.001439 ±", "nan ±"))
    assert str(found.kl_nats) == "nan"
    assert (found.rms_dp, found.top1_agree) == (None, None)
    assert found.kl_nats_se == 0.000008


def test_study_document() -> None:
    own = LogitStats(100, ppl=50.0)
    other = LogitStats(100, kl_nats=0.25, kl_nats_se=0.5, kl_nats_max=2.0, rms_dp=0.125, top1_agree=0.75, ppl=60.0)
    study = Study(1, "f16", (Variant("f16", {}, None, None, logits=own), Variant("Q4_0", {}, None, None, logits=other)))
    assert parse_study(study.to_json()) == {"Q4_0": Comparison(60.0, 50.0, 0.25, 0.5, 2.0, 0.125, 0.75)}


def usage(wall_s: float, peak: int = 0, others: float = 0.0) -> Usage:
    return Usage(wall_s, wall_s, peak, peak // 2, peak // 4, others)


def report(steps: tuple[Step, ...], load: float = 0.0) -> Report:
    found = {side: {"Q4_0": Comparison(ppl=12.5)} for side in dict.fromkeys(s.side for s in steps)}
    return Report("today", "here", "tiny", ("Q4_0",), 2, 512, 2, "2G", 10**9, load, steps, found)


def test_totals_are_sums_and_the_largest_peak_averaged_over_rounds() -> None:
    steps = (
        Step("quantscope", 1, "study", usage(10, 3_000_000_000), 1_000_000),
        Step("llama.cpp", 1, "base run", usage(15, 500_000_000), 70_000_000),
        Step("llama.cpp", 1, "quantize Q4_0", usage(25, 900_000_000), 30_000_000),
        Step("quantscope", 2, "study", usage(14, 1_000_000_000), 1_000_000),
    )
    text = markdown(report(steps))
    assert "| wall time [s] | 12.0 | 40.0 | 0.300 |" in text
    assert "| peak memory [MB] | 2,000 | 900 | 2.222 |" in text
    assert "| written to disk [MB] | 1.0 | 100.0 | 0.010 |" in text
    assert "| quantscope (2): study | 14.0 |" in text
    assert "| Q4_0, quantscope | 12.5000 | none |" in text
    assert "target met: wall time, quantscope / llama.cpp 0.30, at most 1.00" in text
    assert "target met: peak memory [MB] 2,000.00, at most 2,000.00" in text
    assert "valid run" in text


def test_one_side_alone_has_no_ratio() -> None:
    text = markdown(report((Step("llama.cpp", 1, "base run", usage(15), 10**8),)))
    assert "| total | llama.cpp |" in text
    assert "target" not in text


def test_large_file_has_its_memory_target_as_a_share() -> None:
    large = Report(**{**report((Step("quantscope", 1, "study", usage(1, 4 * 10**9), 0),)).__dict__, "model_bytes": 13 * 10**9})
    assert "target MISSED: peak memory [MB] 4,000.00, at most 3,250.00" in markdown(large)


def test_busy_machine_makes_no_valid_run() -> None:
    assert validity(0.1, [usage(10)]).startswith("valid run")
    assert validity(0.9, [usage(10)]).startswith("NOT A VALID RUN")
    assert validity(0.1, [usage(10, others=0.5)]).startswith("NOT A VALID RUN")
    assert validity(0.1, [usage(1, others=0.5), usage(99)]).startswith("valid run")  # on average over the time


def test_process_is_measured(tmp_path: Path) -> None:
    used = measure.run(
        [sys.executable, "-c", "x = bytearray(b'1') * 90_000_000; print('here'); import time; time.sleep(0.3)"], tmp_path / "log"
    )
    assert used.peak_anon_bytes > 90_000_000
    assert used.peak_bytes >= used.peak_anon_bytes
    assert used.peak_file_bytes > 0
    assert (tmp_path / "log").read_text() == "here\n"


def test_failed_process_shows_its_output(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)exit code 3: .*went wrong"):
        measure.run(["sh", "-c", "echo went wrong >&2; exit 3"], tmp_path / "log")


def test_kernel_files() -> None:
    assert measure.status_bytes("Name:\tx\nVmHWM:\t    20 kB\nRssAnon:\t     7 kB\nThreads:\t3\n") == {"VmHWM": 20480, "RssAnon": 7168}
    assert measure.busy_ticks("cpu  1 20 300 9999 9999 4000 50000 600000 7 7\ncpu0 1 1\n") == 654321


def test_tree_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"12")
    assert measure.tree_bytes(tmp_path) == 7


FAKE_QUANTIZE = "#!/bin/sh\necho quantize $3 $4 >> $LOG\ntest -e $2 && exit 9\nprintf '%100s' x > $2\n"
FAKE_PERPLEXITY = """#!/bin/sh
case "$*" in
*"--kl-divergence "*|*--kl-divergence) echo compare >> $LOG; test -s $6 || exit 8; cat $PRINTED ;;
*) echo base $* >> $LOG; printf '%1000s' x > $6 ;;
esac
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Programs that do nothing but keep a list of how they were called."""
    for name, code in zip(llama_programs.PROGRAMS, (FAKE_QUANTIZE, FAKE_PERPLEXITY, *["#!/bin/sh\n"] * 2), strict=True):
        (tmp_path / name).write_text(code)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "printed").write_text(PRINTED, "utf-8")
    for name, value in ((llama_programs.ENV_BIN, tmp_path), ("LOG", tmp_path / "calls"), ("PRINTED", tmp_path / "printed")):
        monkeypatch.setenv(name, str(value))
    llama_programs.program_folder.cache_clear()
    yield tmp_path
    llama_programs.program_folder.cache_clear()


def test_llama_round(fakes: Path, tmp_path: Path) -> None:
    setting = Setting("tiny", ("Q4_0", "Q8_0"), 4, 128, 2, "2G", tmp_path)
    seen: list[Step] = []
    steps, found = llama_round(setting, 1, seen.append)
    assert steps == seen
    assert [(s.name, s.written_bytes) for s in steps] == [
        ("base run", 1000),
        ("quantize Q4_0", 100),
        ("compare Q4_0", 0),
        ("quantize Q8_0", 100),
        ("compare Q8_0", 0),
    ]
    assert found == dict.fromkeys(("Q4_0", "Q8_0"), parse_perplexity(PRINTED))
    base, *rest = (fakes / "calls").read_text().splitlines()
    assert rest == ["quantize Q4_0 2", "compare", "quantize Q8_0 2", "compare"]
    assert f"-c 128 -t 2 --kl-divergence-base {tmp_path}/llama.cpp/logits.kld" in base
    assert f"-m {tmp_path}/tiny-f16.gguf -f {tmp_path}/text-512.txt --chunks 4" in base
    assert not (tmp_path / "llama.cpp").exists()


def test_folder_without_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(llama_programs.ENV_BIN, str(tmp_path))
    (tmp_path / "llama-quantize").touch()
    llama_programs.program_folder.cache_clear()
    with pytest.raises(RuntimeError, match="holds no llama-perplexity, llama-bench"):
        llama_programs.program_folder()


def test_command_line_of_the_study(tmp_path: Path) -> None:
    command = quantscope_command(Setting("tiny", ("Q4_0", "Q8_0"), 4, 128, 2, "2G", tmp_path), tmp_path / "out")
    assert os.access(command[0], os.X_OK)
    known = subprocess.run([command[0], "study", "--help"], capture_output=True, text=True, check=True).stdout
    assert {part for part in command if part.startswith("--")} <= set(known.split())


def test_time_of_a_helper_goes_to_its_callers() -> None:
    add, matmul = ("quantscope/logit_sums.py", 1, "add"), ("~", 0, "<built-in method torch._C._nn.linear>")
    helper, amax, root = ("torch/x.py", 5, "helper"), ("~", 0, "<method 'amax'>"), ("x.py", 1, "main")
    decode = ("/a/quantscope/quants/__init__.py", 9, "decode")
    stats = {  # function → (calls, calls, own, cumulative, callers → (calls, calls, own, cumulative))
        root: (1, 1, 1.0, 100.0, {}),
        matmul: (1, 1, 50.0, 50.0, {root: (1, 1, 50.0, 50.0)}),
        add: (1, 1, 2.0, 10.0, {root: (1, 1, 2.0, 10.0)}),
        decode: (1, 1, 3.0, 10.0, {root: (1, 1, 3.0, 10.0)}),
        helper: (1, 1, 8.0, 18.0, {add: (1, 1, 6.0, 12.0), decode: (1, 1, 2.0, 6.0)}),
        amax: (1, 1, 10.0, 10.0, {helper: (1, 1, 10.0, 10.0)}),
    }
    assert group_seconds(stats) == pytest.approx({OTHER: 1, "GEMM": 50, "logit sums": 2 + 6 + 7.5, "decode": 3 + 2 + 2.5})


def test_time_of_modules_is_imports_and_of_our_other_functions_is_other() -> None:
    module, ours, helper = (
        ("/a/quantscope/tap_stats.py", 1, "<module>"),
        ("/a/quantscope/study.py", 7, "run_study"),
        ("json.py", 5, "dumps"),
    )
    pool = ("/a/quantscope/quants/threads.py", 3, "share_out")
    stats = {
        pool: (1, 1, 8.0, 8.0, {module: (1, 1, 8.0, 8.0)}),
        module: (1, 1, 1.0, 9.0, {}),
        ours: (1, 1, 2.0, 8.0, {module: (1, 1, 2.0, 8.0)}),
        helper: (2, 2, 5.0, 5.0, {ours: (1, 1, 4.0, 4.0), module: (1, 1, 1.0, 1.0)}),
    }
    assert group_seconds(stats) == pytest.approx({"imports": 8 + 1 + 1, OTHER: 2 + 4})


def test_helpers_that_call_each_other_come_to_an_end() -> None:
    a, b, encode = ("x.py", 1, "a"), ("x.py", 2, "b"), ("/a/quantscope/quants/__init__.py", 9, "encode")
    stats = {
        a: (1, 1, 4.0, 4.0, {b: (1, 1, 2.0, 2.0), encode: (1, 1, 2.0, 2.0)}),
        b: (1, 1, 4.0, 4.0, {a: (1, 1, 4.0, 4.0)}),
        encode: (1, 1, 1.0, 9.0, {}),
    }
    assert sum(group_seconds(stats).values()) == pytest.approx(9)


def test_line_through_points() -> None:
    found = line([1, 2, 4, 8], [5, 7, 11, 19])
    assert (found.per_x, found.at_zero, found.r2) == pytest.approx((2, 3, 1))
    assert line([1, 2, 3, 4], [1, 3, 2, 4]).r2 == pytest.approx(0.64)


def test_cells() -> None:
    assert cells_wanted([1, 2], [1, 4], full=True) == [(1, 1), (2, 1), (1, 4), (2, 4)]
    assert cells_wanted([1, 2, 4], [1, 2], full=False) == [(1, 1), (2, 1), (1, 2), (4, 1)]
    assert set(TYPES) <= set(PRESETS)
    assert len(set(TYPES)) == 8
