"""``quantscope study``: one model in many quantizations, or several files, layer by layer."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantscope.cli.lang import Lang, LangOption
from quantscope.errors import UsageError

if TYPE_CHECKING:
    from quantscope.results import StudyOptions


DIVERGED, FAILED = 1, 2  # exit codes: an engine differs, an engine failed


class Positions(str, Enum):
    all = "all"
    last = "last"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


class Scoring(str, Enum):
    llama_cpp = "llama.cpp"
    all = "all"


class Dtype(str, Enum):
    float32 = "float32"
    float64 = "float64"


Models = Annotated[
    list[str],
    typer.Argument(metavar="MODEL", help="GGUF files, Hugging Face folders, or names: hf:OWNER/REPO, ollama:NAME.", show_default=False),
]
Types = Annotated[
    str | None,
    typer.Option(
        metavar="T,T,...", help="Quantize one MODEL in memory to these presets or types.  [default: Q4_0,Q4_K_M,Q5_K_M,Q6_K,Q8_0]"
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(
        metavar="T,T,...",
        help="Also every variant with a key/value cache of these types: f16, q8_0, q4_0 ..., or q8_0/q4_0 for keys and values.",
        show_default=False,
    ),
]
Ref = Annotated[str | None, typer.Option(metavar="MODEL", help="The original that the given files are compared with.")]
Base = Annotated[
    Path | None,
    typer.Option(
        "--kl-divergence-base",
        metavar="BASE",
        help="llama-perplexity's file of log-probabilities of the text, in place of an original.",
        show_default=False,
    ),
]
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="Text to continue.  [default: Once upon a time]", show_default=False)]
Tokens = Annotated[str | None, typer.Option(metavar="ID,ID,...", help="Token ids instead of a prompt.")]
Text = Annotated[Path | None, typer.Option(metavar="FILE", help="UTF-8 text for KL divergence and perplexity; - reads standard input.")]
Ctx = Annotated[int | None, typer.Option(metavar="N", help="Tokens per chunk of the text.  [default: 512]")]
Chunks = Annotated[int | None, typer.Option(metavar="N", help="Use only the first N chunks of the text.")]
PositionsOption = Annotated[Positions, typer.Option(help="Positions that the layer statistics cover.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Arithmetic of the reference forward.")]
ScoringOption = Annotated[
    Scoring, typer.Option(help="Scored positions of the text: the second half of each chunk, as llama-perplexity does, or all.")
]
UntilCi = Annotated[
    str | None,
    typer.Option(metavar="PERCENT", help="Stop when every mean KL is known to this part of itself, as in 5%.", show_default=False),
]
Memory = Annotated[str | None, typer.Option(metavar="SIZE", help="Bound of the memory in use, as in 800M or 4G.  [default: 4G]")]
Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--engine", metavar="NAME", help="Also run llama.cpp or transformers on each file; may be given twice.", show_default=False
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help='Compute on a Ray cluster: its address, or "local" to start one here.', show_default=False),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="DIR", help="Where report.md, study.json and the finished batches go.  [default: quantscope-MODEL]"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the content of study.json on stdout, the report on stderr.")]


def study(
    models: Models,
    types: Types = None,
    kv: Kv = None,
    ref: Ref = None,
    kl_divergence_base: Base = None,
    prompt: Prompt = None,
    tokens: Tokens = None,
    text: Text = None,
    ctx: Ctx = None,
    chunks: Chunks = None,
    scoring: ScoringOption = Scoring.llama_cpp,
    until_ci: UntilCi = None,
    positions: PositionsOption = Positions.all,
    memory: Memory = None,
    device: DeviceOption = Device.cpu,
    dtype: DtypeOption = Dtype.float32,
    engine: Engines = None,
    ray: Ray = None,
    out: Out = None,
    json: Json = False,
    lang: LangOption = Lang.en,
) -> int:
    """Run variants of a model side by side and show where and how much they differ.

    One MODEL: it is the original, and the variants are quantized from it in memory (--types).  Several MODELs, or one and --ref: each
    file is a variant as it is.

    With --kv, keys and values are also rounded as in a quantized cache: of MODEL as it is, and of each of --types where they are given.

    With --engine, files are taken as they are, and each engine is compared with an exact run of the same file on the prompt.

    With --kl-divergence-base the files are compared with the distributions in it, and MODEL is a variant as any other.

    With --text, finished batches are kept in DIR: a study that was interrupted goes on where it was when the same command is given again.
    """
    from quantscope.results import StudyOptions

    if types is not None and engine:
        raise UsageError(
            "--engine runs files, and --types makes variants in memory: expected one of them. Write the files with llama-quantize "
            "and give them instead of --types."
        )
    if kv is not None and engine:
        raise UsageError(
            "--engine runs files with the engine's own cache, and --kv rounds keys and values here: expected one of them. Run "
            "`quantscope study` once with each."
        )
    _check(models, types, ref, prompt, tokens, text, {"--ctx": ctx, "--chunks": chunks, "--until-ci": until_ci, "--ray": ray})
    options = StudyOptions(
        models=tuple(models),
        types=_types(types, alone=len(models) == 1 and not any((ref, kv, engine, kl_divergence_base))),
        kv=() if kv is None else _listed("--kv", kv, "q8_0,q4_0"),
        ref=ref,
        prompt=prompt,
        tokens=None if tokens is None else parse_ids(tokens),
        text=text,
        n_ctx=ctx or (StudyOptions.n_ctx if kl_divergence_base is None else _ctx_of(kl_divergence_base)),
        n_chunks=chunks,
        positions=positions.value,
        scoring=scoring.value,
        until_ci=None if until_ci is None else parse_share(until_ci),
        memory_bytes=StudyOptions.memory_bytes if memory is None else parse_memory(memory),
        base=kl_divergence_base,
        device=device.value,
        dtype=dtype.value,
        engines=tuple(engine or ()),
        ray=ray,
    )
    return study_and_show(options, out or default_folder(models[0]), json, keep=out is not None, lang=lang)


def study_and_show(options: StudyOptions, out: Path, json: bool, *, keep: bool = False, lang: Lang = Lang.en) -> int:
    """Run a study, print it, and write report.md and study.json; returns the exit code.  study.json is the same in every language.

    keep: the folder was chosen by the user, so another study in it is an error; in a folder of our own choosing a finished one makes room,
    as it always does for the reports.
    """
    from quantscope.cli.console import console
    from quantscope.cli.output import check_folder, write_files
    from quantscope.cli.progress import watching
    from quantscope.findings import told
    from quantscope.language import language
    from quantscope.report.markdown import markdown
    from quantscope.report.page import html
    from quantscope.report.page.study import study_page
    from quantscope.report.study_json import dump
    from quantscope.report.text import render
    from quantscope.wording import listed

    check_folder(out)
    from quantscope.study import run_study  # after the checks that need no torch

    check_device(options.device)
    with watching() as monitor:
        done = run_study(options, monitor, out if options.text else None, replace_finished=not keep)
    document = dump(done)
    human = console(sys.stderr if json else sys.stdout)
    with language(lang.value):
        shown = told(done)
        written = write_files(out, {"report.html": html(study_page(shown)), "report.md": markdown(shown), "study.json": document})
        human.print(render(shown, human.width, full=str(out / "report.md")))
    if json:
        sys.stdout.write(document)
    console(sys.stderr).print(f"\nWrote {listed(str(p) for p in written)}.", markup=False, soft_wrap=True)
    if any(run.failure for run in done.engines):
        return FAILED
    return DIVERGED if any(run.agrees is False for run in done.engines) else 0


def _ctx_of(base: Path) -> int:
    from quantscope.kld_base import read_base

    return read_base(base).n_ctx


def text_options(
    model: str, text: Path, ctx: int | None, chunks: int | None, memory: str | None, device: Device, dtype: Dtype = Dtype.float32
) -> StudyOptions:
    """The options of one model on a text; UsageError for lengths that are none."""
    from quantscope.results import StudyOptions

    for name, value in {"--ctx": ctx, "--chunks": chunks}.items():
        if value is not None and value < 1:
            raise UsageError(f"{name} {value}: expected at least 1. Leave it out for the default.")
    return StudyOptions(
        models=(model,),
        text=text,
        n_ctx=ctx or StudyOptions.n_ctx,
        n_chunks=chunks,
        memory_bytes=StudyOptions.memory_bytes if memory is None else parse_memory(memory),
        device=device.value,
        dtype=dtype.value,
    )


def check_device(device: str) -> None:
    """UsageError for "cuda" where torch has none."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"--device cuda: torch {torch.__version__} finds no usable CUDA device, expected one. Either there is no GPU or "
            f"this torch was built without CUDA: run with --device cpu."
        )


def default_folder(model: str) -> Path:
    """``quantscope-NAME`` in the current folder."""
    from quantscope.sources.resolve import short_name

    return Path(f"quantscope-{short_name(model)}")


def _check(
    models: list[str],
    types: str | None,
    ref: str | None,
    prompt: str | None,
    tokens: str | None,
    text: Path | None,
    of_a_text: dict[str, int | str | None],
) -> None:
    """UsageError for options that contradict each other."""
    if prompt is not None and tokens is not None:
        raise UsageError("--prompt and --tokens both say what to run, expected one of them. Leave one out.")
    if types is not None and len(models) > 1:
        raise UsageError(
            f"--types quantizes one model in memory, but {len(models)} models were given. Give one MODEL with --types, or several "
            f"without it: each file is then a variant as it is."
        )
    if types is not None and ref is not None:
        raise UsageError(
            "--types quantizes MODEL itself, which is then the original, so --ref has no place beside it. Leave out --ref, or leave "
            "out --types to compare the files as they are."
        )
    if text == Path("-") and of_a_text["--ray"] is not None:
        raise UsageError(
            "--ray computes in other processes, which cannot read this one's standard input: expected a file. Give --text FILE."
        )
    for name, value in of_a_text.items():
        if value is not None and text is None:
            raise UsageError(f"{name} is about the chunks of a text, but there is no text. Add --text FILE, or leave {name} out.")
        if isinstance(value, int) and value < 1:
            raise UsageError(f"{name} {value}: expected at least 1. Leave it out for the default.")


def _types(given: str | None, alone: bool) -> tuple[str, ...]:
    from quantscope.results import DEFAULT_TYPES

    if given is None:
        return DEFAULT_TYPES if alone else ()
    return _listed("--types", given, ",".join(DEFAULT_TYPES))


def _listed(option: str, given: str, example: str) -> tuple[str, ...]:
    """``a,b`` → its parts; UsageError when there is none."""
    names = tuple(part.strip() for part in given.split(",") if part.strip())
    if not names:
        raise UsageError(f"{option} {given!r} names no type, expected for example {option} {example}. Leave it out for the default.")
    return names


def parse_ids(given: str) -> tuple[int, ...]:
    """``1,403,407`` → token ids; blanks separate as well as commas."""
    parts = given.replace(",", " ").split()
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise UsageError(f"--tokens: {part!r} is no token id, expected numbers ≥ 0 with commas between, as in --tokens 1,403,407.")
    return tuple(int(part) for part in parts)


def parse_share(given: str) -> float:
    """``5%`` or ``0.05`` → 0.05.  Raises UsageError."""
    number = given.strip()
    try:
        share = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        if not 0 < share < 1:
            raise ValueError
    except ValueError:
        raise UsageError(f"--until-ci {given!r}: expected a part of the mean, as in --until-ci 5%.") from None
    return share


def parse_memory(given: str) -> int:
    """``4G``, ``500M``, ``1.5GiB`` → bytes; without a unit, bytes.  Raises UsageError."""
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
    lowered = given.strip().lower().removesuffix("b")
    number = lowered.rstrip("kmgti")
    try:
        value = float(number) * units[lowered[len(number) :]]
        if not 0 < value < 2**62:
            raise ValueError
    except (ValueError, KeyError):
        raise UsageError(f"--memory {given!r} is no amount of memory, expected a number and a unit, as in --memory 4G or 800M.") from None
    return int(value)
