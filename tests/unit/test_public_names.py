"""``import quantscope``: few names, nothing heavy, and functions that modules of the same name do not hide."""

from __future__ import annotations

import subprocess
import sys

import pytest

import quantscope

HEAVY = "{'torch', 'numpy', 'numba', 'transformers', 'pandas', 'pyarrow', 'gguf', 'rich', 'typer'}"


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_it_is_light() -> None:
    assert python(f"import sys, quantscope; dir(quantscope); print(sorted({HEAVY} & set(sys.modules)))") == "[]"


def test_results_need_neither_transformers_nor_pandas() -> None:
    assert (
        python("import sys, quantscope; quantscope.study; print(sorted({'transformers', 'pandas', 'pyarrow'} & set(sys.modules)))") == "[]"
    )


def test_every_public_name_is_there_and_documented() -> None:
    for name in quantscope.__all__:
        assert name in dir(quantscope)
        assert getattr(quantscope, name).__doc__


@pytest.mark.parametrize("name", ["study", "compare", "diagnose", "trace", "weights"])
def test_a_module_of_the_same_name_does_not_hide_a_function(name: str) -> None:
    code = f"import sys, quantscope, quantscope.{name}; print(callable(quantscope.{name}), type(sys.modules['quantscope.{name}']).__name__)"
    assert python(code) == "True module"
    assert python(f"import quantscope.api, quantscope; print(callable(quantscope.{name}))") == "True"


def test_other_modules_are_attributes_as_ever() -> None:
    assert python("import quantscope.metrics; print(quantscope.metrics.__name__)") == "quantscope.metrics"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'studdy'; it has .*study"):
        _ = quantscope.studdy
