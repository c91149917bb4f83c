"""``quantscope demo``: the main job on the bundled trained model."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from quantscope.cli.lang import Lang, LangOption
from quantscope.cli.study import Json, Out
from quantscope.errors import MissingFileError

MODEL, TEXT = "demo-f16.gguf", "demo.txt"
PROMPT = "It was a dark and stormy"
CHUNKS = 8  # of 512 tokens: enough positions to order the presets, and done within a minute


def demo(out: Out = None, json: Json = False, lang: LangOption = Lang.en) -> int:
    """Run a study on the bundled model: a small Llama trained on English books, in five quantizations."""
    from quantscope.cli.study import study_and_show
    from quantscope.results import DEFAULT_TYPES, StudyOptions

    options = StudyOptions(
        models=(str(bundled(MODEL)),), types=DEFAULT_TYPES, prompt=PROMPT, text=bundled(TEXT), n_ctx=512, n_chunks=CHUNKS
    )
    return study_and_show(options, out or Path("quantscope-demo"), json, lang=lang)


def bundled(name: str) -> Path:
    """The path of a file shipped inside the package; MissingFileError when the installation lacks it."""
    path = Path(str(resources.files("quantscope") / "data" / name))
    if not path.is_file():
        raise MissingFileError(
            f"{path}: expected as part of the package, found nothing. The installation is incomplete: install quantscope again, or run "
            f"`quantscope study MODEL` on a model of yours."
        )
    return path
