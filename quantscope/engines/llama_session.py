"""The real llama.cpp through llama-cpp-python's low-level API: every node of its graph, and the logits of every token.

    with LlamaSession(path, kv="F16") as llama:
        logits = llama.decode(ids)                                # [T,V], nothing observed, so that operations may be fused
        logits = llama.decode(ids, Observer)                      # asked about every node, shown those it wants

CPU, all tokens in one batch, flash attention only where the cache needs it.
What llama.cpp would print on stderr is kept: its last complaints explain a failure.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import llama_cpp
import numpy as np
import torch
from numpy.typing import NDArray

from quantscope.engines.ggml_tensor import name_and_op, read, sources
from quantscope.engines.node_names import VIEWS, TapNamer
from quantscope.errors import EngineError
from quantscope.qtypes import QTYPES, QuantType

Values = NDArray[Any]
WARNING = 3  # enum ggml_log_level: 3 warning, 4 error, 5 continues the line before
_complaints: deque[str] = deque(maxlen=8)


def has_amx() -> bool:
    """Whether this build would compute with AMX tiles.

    They are left alone: their code has died of ``ldtilecfg`` in virtual machines that offer AMX, and it adds up in another order than the
    rest of llama.cpp, which is what is emulated.
    """
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


class Observer(Protocol):
    """Asked about every node in order of evaluation, and shown the values of those it wants."""

    def wants(self, name: str, op: str, sources: Sequence[str]) -> bool: ...

    def __call__(self, values: Values) -> None:
        """The values of the node it was asked about last."""


@dataclass(frozen=True)
class Node:
    """One evaluated graph node."""

    name: str
    op: str
    values: Values


class LlamaSession:
    """A loaded model.  kv: type of the key cache, and of the value cache unless ``values`` names another.

    Flash attention is on where the values have a quantized type: llama.cpp does not do without it there.
    Raises EngineError with llama.cpp's own words when it does not load the file.
    """

    def __init__(self, path: Path, *, n_ctx: int = 512, kv: str = "F32", values: str | None = None, n_threads: int = 1) -> None:
        llama_cpp.llama_log_set(_keep, ctypes.c_void_p(0))
        _complaints.clear()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = not has_amx()
        self._observer: Observer | None = None
        self._failure: BaseException | None = None
        self._context: Any = None
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise EngineError(f"{path}: llama.cpp does not load this file{_its_words()}")
        self._context = self._new_context(n_ctx, QTYPES[kv], QTYPES[values or kv], n_threads)
        if not self._context:
            self.close()
            raise EngineError(f"{path}: llama.cpp does not make a context of {n_ctx} tokens for this file{_its_words()}")

    def _new_context(self, n_ctx: int, keys: QuantType, values: QuantType, n_threads: int) -> Any:
        p = llama_cpp.llama_context_default_params()
        p.n_ctx = p.n_batch = p.n_ubatch = n_ctx
        p.n_threads = p.n_threads_batch = n_threads
        p.type_k, p.type_v = keys.id, values.id
        flash = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if values.block_size > 1 else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        p.flash_attn_type = flash
        p.no_perf = True
        p.cb_eval = self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._on_node)  # kept: ctypes does not
        return llama_cpp.llama_init_from_model(self._model, p)

    def __enter__(self) -> LlamaSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free model and context; harmless when done twice."""
        if self._context:
            llama_cpp.llama_free(self._context)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._context = self._model = None

    @property
    def n_vocab(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))

    @property
    def n_ctx_train(self) -> int:
        return int(llama_cpp.llama_model_n_ctx_train(self._model))

    def decode(self, ids: Sequence[int], observer: Observer | None = None, n_past: int = 0) -> Values:
        """Logits [T,V] float32 of every token.  n_past: tokens that the cache holds; 0 empties it.  EngineError when llama_decode fails."""
        self._observer, self._failure = observer, None
        n = len(ids)
        if n_past == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for t, token in enumerate(ids):
                batch.token[t], batch.pos[t], batch.n_seq_id[t], batch.seq_id[t][0], batch.logits[t] = token, n_past + t, 1, 0, True
            status = llama_cpp.llama_decode(self._context, batch)
        finally:
            llama_cpp.llama_batch_free(batch)
        if self._failure is not None:
            raise self._failure
        if status != 0:
            raise EngineError(f"llama_decode returned {status}, expected 0{_its_words()}")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self._context), (n, self.n_vocab)).copy()

    def nodes(self, ids: Sequence[int], wanted: Callable[[str, str], bool] = lambda name, op: True) -> tuple[list[Node], Values]:
        """The graph's nodes that are no views in order of evaluation, those with wanted(name, op), and the logits [T,V]."""
        keeper = _NodeKeeper(wanted)
        logits = self.decode(ids, keeper)
        return keeper.nodes, logits

    def taps(self, ids: Sequence[int]) -> tuple[dict[str, Values], Values]:
        """Every tap, [T,channels] or [H,T,T], and the logits [T,V]."""
        keeper = _TapKeeper()
        logits = self.decode(ids, TapObserver(keeper, len(ids)))
        return {tap: x.numpy() for tap, x in keeper.taps.items()}, logits

    def _on_node(self, address: int, ask: bool, user_data: int) -> bool:
        """ggml_backend_sched_eval_callback: asked whether a node is wanted, then called when it is computed."""
        try:
            if ask:
                return self._observer is not None and self._observer.wants(*name_and_op(address), sources(address))
            values = read(address)
            if self._observer is not None and values is not None:
                self._observer(values)
        except BaseException as error:  # an exception cannot pass through C: it is raised again after llama_decode
            self._failure = error
        return self._failure is None


class _NodeKeeper:
    """Keeps nodes with their names."""

    def __init__(self, wanted: Callable[[str, str], bool]) -> None:
        self.nodes: list[Node] = []
        self._wanted, self._asked = wanted, ("", "")

    def wants(self, name: str, op: str, sources: Sequence[str]) -> bool:
        self._asked = name, op
        return op not in VIEWS and self._wanted(name, op)

    def __call__(self, values: Values) -> None:
        self.nodes.append(Node(*self._asked, values))


class _TapKeeper:
    """Keeps all taps; of two of one name the later one stays."""

    def __init__(self) -> None:
        self.taps: dict[str, torch.Tensor] = {}

    def wants(self, name: str) -> bool:
        return True

    def __call__(self, name: str, x: torch.Tensor) -> None:
        self.taps[name] = x


class TapObserver:
    """Hands the nodes that are taps on: ``collect(name, [T,channels] or [H,T,T])``."""

    def __init__(self, collect: Any, n_tokens: int) -> None:
        self._collect, self._n_tokens = collect, n_tokens
        self._namer, self._tap = TapNamer(), ""

    def wants(self, name: str, op: str, sources: Sequence[str]) -> bool:
        tap = self._namer(name, op, sources)
        self._tap = tap or ""
        return tap is not None and bool(self._collect.wants(tap))

    def __call__(self, values: Values) -> None:
        self._collect(self._tap, torch.from_numpy(as_tap(self._tap, values, self._n_tokens)))


def as_tap(tap: str, values: Values, n_tokens: int) -> Values:
    """A node's values as [T,channels]; the attention map [H,T,S], padded to a multiple of 256 keys, as [H,T,T]."""
    if tap.startswith("kq_soft_max"):
        return values.reshape(-1, n_tokens, values.shape[-1])[..., :n_tokens]
    return values.reshape(n_tokens, -1)


def _its_words() -> str:
    """llama.cpp's last complaints as the end of a sentence."""
    words = " ".join(" ".join(_said(_complaints)).split())
    return f". It says: {words}" if words else " and does not say why."


def _said(lines: Iterable[str]) -> Iterable[str]:
    """Each line once: the same complaint comes from several functions."""
    return dict.fromkeys(line.strip() for line in lines if line.strip(" .\n"))


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep(level: int, text: bytes, user_data: int) -> None:
    with suppress(BaseException):  # an exception cannot pass through C
        if level >= WARNING:
            _complaints.append(text.decode("utf-8", "replace"))
