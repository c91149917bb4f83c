"""docs/api.md, from the public names: ``python -m tools.api_reference`` writes it, a test sees that it is fresh."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import quantscope
from quantscope import api
from quantscope.frames import Frame

FILE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
HEAD = """# Python interface

```python
import quantscope

with quantscope.open("f16.gguf") as model:
    print(model.config.n_layer, model.tokenizer.encode("Hello"))

study = quantscope.study("f16.gguf", types=["Q4_K_M", "Q6_K"], text="wiki.txt", chunks=8)
print(study.answer)
study.to_pandas()["logits"][["variant", "kl_nats", "top1_agree"]]

quantscope.diagnose("q4.gguf", "my-engine.safetensors").verdict
```

What the commands do, as functions that return results. Options have the names and defaults of [the commands](cli.md); what a command
refuses raises the same `quantscope.QuantscopeError`, whose text says what to do. `import quantscope` takes no time: torch is imported when
a function is first used. In a notebook results draw themselves (`examples/study.ipynb` in the repository).

Every result has `answer`, its one paragraph; `frames()`, its tables; `to_pandas()`, the same as pandas frames (`pip install
'quantscope[pandas]'`); and `write_tables(FOLDER, "csv" | "parquet")`. Made by `python -m tools.api_reference`.
"""
RESULTS = ("Study", "Comparison", "Diagnosis", "WeightComparison")


def page() -> str:
    """The whole file."""
    functions = [n for n, f in vars(api).items() if n in quantscope.__all__ and inspect.isfunction(f)]  # in the order of the source
    parts = [HEAD.rstrip(), "## Functions", *(_function(f"quantscope.{n}", getattr(quantscope, n)) for n in functions)]
    parts += ["## Model", _doc(api.Model), *_members(api.Model)]
    parts += ["## Results", *(block for n in RESULTS for block in _result(getattr(api, n)))]
    parts += ["## Frames", _doc(Frame), "`quantscope.frames` holds the class and what makes them of a study."]
    return "\n\n".join(parts) + "\n"


def _function(name: str, f: Any, level: int = 3) -> str:
    return f"{'#' * level} {name}\n\n```python\n{_signature(name, f)}\n```\n\n{_doc(f)}"


def _signature(name: str, f: Any) -> str:
    """``name(a, *, b=1) -> T``, one parameter a line where it is long; annotations as they are written in the code."""
    s = inspect.signature(f)
    shown = [p for p in s.parameters.values() if p.name != "self"]
    star = next((i for i, p in enumerate(shown) if p.kind is p.KEYWORD_ONLY), len(shown))
    words = [_parameter(p) for p in shown]
    if star < len(shown) and not any(p.kind is p.VAR_POSITIONAL for p in shown):
        words.insert(star, "*")
    one = f"{name}({', '.join(words)}) -> {s.return_annotation}"
    return one if len(one) <= 110 else f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f") -> {s.return_annotation}"


def _parameter(p: inspect.Parameter) -> str:
    default = "" if p.default is p.empty else f" = {p.default!r}"
    return f"{'*' if p.kind is p.VAR_POSITIONAL else ''}{p.name}: {p.annotation}{default}"


def _members(kind: type) -> list[str]:
    """Properties and methods that are meant for users, in the order of the source."""
    found = []
    for name, member in vars(kind).items():
        if name.startswith("_"):
            continue
        f = getattr(member, "fget", None) or getattr(member, "func", None)
        if f is not None and f.__doc__:
            found.append(f"- `{name}`: {_inline(f)}")
        elif inspect.isfunction(member) and member.__doc__:
            found.append(f"- `{_signature(name, member)}`: {_inline(member)}")
    return ["\n".join(found)] if found else []


def _result(kind: type) -> list[str]:
    return [f"### {kind.__name__}", _doc(kind), *_members(kind)]


def _doc(thing: Any) -> str:
    return textwrap.dedent(inspect.getdoc(thing) or "").replace("``", "`").strip()


def _inline(thing: Any) -> str:
    return " ".join(_doc(thing).split())


if __name__ == "__main__":
    FILE.write_text(page(), "utf-8")
