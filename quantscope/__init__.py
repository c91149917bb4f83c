"""quantscope: why a quantized language model's output differs, layer by layer.

    model = quantscope.open("model-f16.gguf")                       what is in a file
    study = quantscope.study("model-f16.gguf", types=["Q4_K_M"])    how far each quantization is from the original
    d = quantscope.diagnose("q4.gguf", "engine.safetensors")        the quantization, the engine, the file or the prompt?

The names in ``__all__`` are the public interface.  Importing the package pulls in neither torch nor transformers: what a name needs is
imported when the name is first used (docs/decisions/0050-public-names.md).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantscope.api import Model, Study, compare, diagnose, load_study, open, study, trace, weights
    from quantscope.errors import QuantscopeError

__version__ = "0.1.0"
__all__ = [
    "Model",
    "QuantscopeError",
    "Study",
    "__version__",
    "compare",
    "diagnose",
    "load_study",
    "open",
    "study",
    "trace",
    "weights",
]
_HOME = dict.fromkeys(__all__, "quantscope.api") | {"QuantscopeError": "quantscope.errors"}


class _Package(ModuleType):
    """The package, in which a public function is not hidden by the module of the same name that it uses.

    Importing ``quantscope.study`` would make ``quantscope.study`` that module; the function stays, and the module's own names are
    reached by ``from quantscope.study import run_study``.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
        value = getattr(import_module(_HOME[name]), name)
        super().__setattr__(name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
