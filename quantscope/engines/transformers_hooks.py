"""Where a Transformers model shows the taps: the modules that hold the tensors, by the names of ``arch.names``.

    tap  →  the input or output of the module whose tensor makes or reads it:     Qcur_pre: attn_q's output,  kqv_out: attn_output's input

A tensor's GGUF stem has a module path in the row of its ``model_type``, so a new model type needs no row here.  What no module of its own
makes is seen elsewhere: the embedding as the first layer's input, q and k after RoPE in the functions that turn them or multiply them.
What nothing shows (the inside of an expert, the router's probabilities) is left out, never computed
(docs/decisions/0065-transformers-taps.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from quantscope.arch.config import ModelConfig
from quantscope.arch.names import HfNames, names_of
from quantscope.model.feed_forward import expert_probabilities
from quantscope.model.taps import CHOSEN
from quantscope.model.wiring import layer_wiring
from quantscope.weights import Weights, changed

EXPERTS, MOE, ATTENTION, ITSELF = "the experts", "experts and router", "the attention", ""  # modules that no tensor names

# Tap → (the modules that show it, the first that a layer has; which side; which of several tensors).  A module is named by the GGUF stem
# of its tensor; "norm:x" is the stem that ``Block`` has for the norm x.
Row = tuple[tuple[str, ...], Literal["input", "output"], int]
TAPS: Mapping[str, Row] = {
    "attn_norm": (("norm:attn_norm",), "output", 0),
    "attn_norm_2": (("attn_norm_2",), "output", 0),
    "wqkv": (("attn_qkv",), "output", 0),
    "Qcur_pre": (("attn_q", "attn_q_b"), "output", 0),
    "Kcur_pre": (("attn_k",), "output", 0),
    "Vcur": (("attn_v",), "output", 0),
    "Qcur_normed": (("attn_q_norm",), "output", 0),
    "Kcur_normed": (("attn_k_norm",), "output", 0),
    "kq_soft_max": ((ATTENTION,), "output", 1),
    "kqv_out": (("attn_output",), "input", 0),
    "attn_out": (("attn_output",), "output", 0),
    "attn_post_norm": (("norm:attn_post_norm",), "output", 0),
    "ffn_inp": (("norm:ffn_norm", "ffn_up"), "input", 0),
    "ffn_norm": (("norm:ffn_norm",), "output", 0),
    "ffn_moe_logits": (("ffn_gate_inp",), "output", 0),
    CHOSEN: ((EXPERTS,), "input", 1),
    "ffn_moe_weights": ((EXPERTS,), "input", 2),
    "ffn_moe_out": ((EXPERTS,), "output", 0),
    "ffn_gate": (("ffn_gate", "ffn_gate_shexp"), "output", 0),
    "ffn_up": (("ffn_up", "ffn_up_shexp"), "output", 0),
    "ffn_swiglu": (("ffn_down", "ffn_down_shexp"), "input", 0),
    "ffn_shexp": (("ffn_down_shexp",), "output", 0),
    "ffn_out": (("ffn_down", MOE), "output", 0),
    "ffn_post_norm": (("norm:ffn_post_norm",), "output", 0),
    "l_out": ((ITSELF,), "output", 0),
}
PARTS = ("Qcur_pre", "Kcur_pre", "Vcur")  # of wqkv
TURNED = ("Qcur", "Kcur")
ROUTES = ("ffn_moe_logits", CHOSEN, "ffn_moe_weights")
CLAMPED = ("wqkv", *PARTS)  # where a model clamps q, k and v: it does so after the module

# model_type → GGUF stem → path, where the loaded model has other modules than the checkpoint has names
LOADED_AS: Mapping[str, Mapping[str, str]] = {
    "mixtral": {"ffn_gate_inp": "mlp.gate"},
    "granitemoe": {"ffn_gate_inp": "block_sparse_moe.router"},
}
HEADS_BEFORE_POSITIONS = ("exaone4", "exaone_moe", "gemma3_text", "hunyuan_v1_dense", "hunyuan_v1_moe")  # q and k as their norms see them
TURNED_TO_HALVES = ("deepseek_v3",)  # its rotation reads pairs of neighbours and writes halves


class Sink(Protocol):
    """Who is shown a tap by its full name: [T,channels], or [H,T,S] of the probabilities."""

    def wants(self, name: str, /) -> bool: ...

    def __call__(self, name: str, x: Tensor, /) -> None: ...


class Observer:
    """Shows the taps of a loaded model to ``sink`` while it runs, those that ``weights`` says it has.

    Raises AttributeError where the model has no layers under the name of its type.
    """

    def __init__(self, model: Any, weights: Weights) -> None:
        self.model, self.config = model, weights.config
        self.model_type: str = model.config.model_type
        self.names: HfNames = names_of(self.model_type)
        self.layers = list(model.get_submodule(self.names.prefix.rstrip(".")))
        self.weights = weights
        last = self.config.n_layer - 1  # of the file; an engine that runs more layers than it has shows these too
        self.taps = [layer_wiring(self.config, i, weights.layer_names(i)) for i in (min(i, last) for i in range(len(self.layers)))]
        self.shown: set[str] = set()
        self.sink: Sink | None = None
        self.at = 0  # the layer that runs
        self._routes: dict[str, Tensor] = {}  # of the layer that runs
        self._turned: set[int] = set()  # the layers whose heads were shown as they turned

    @property
    def unseen(self) -> tuple[str, ...]:
        """Taps without their layer that the model has and that were not shown in some layer, in the order of the graph."""
        return tuple(dict.fromkeys(tap for i, taps in enumerate(self.taps) for tap in taps if f"{tap}-{i}" not in self.shown))

    @contextmanager
    def showing(self, sink: Sink) -> Iterator[None]:
        """Every tap is shown to ``sink`` inside the block."""
        self.sink, self._turned = sink, set()
        hooks = [hook for i, layer in enumerate(self.layers) for hook in self._layer_hooks(i, layer)]
        top = [
            _on_input(self.layers[0], 0, partial(self._top_tap, "embd")),
            _on_output(self.model.get_submodule(self.names.top["output_norm"]), 0, partial(self._top_tap, "result_norm")),
            self.model.register_forward_hook(lambda _module, _args, out: self._top_tap("result_output", out.logits)),
        ]
        try:
            with self._functions():
                yield
        finally:
            for hook in (*hooks, *top):
                hook.remove()

    def _layer_hooks(self, i: int, layer: Any) -> Iterator[Any]:
        yield layer.register_forward_pre_hook(lambda _module, _args: setattr(self, "at", i))
        for tap, path in places(self, i, layer).items():
            _, side, item = TAPS[tap]
            hook = _on_input if side == "input" else _on_output
            yield hook(layer.get_submodule(path), item, partial(self._layer_tap, tap, i))

    def _top_tap(self, tap: str, x: Tensor) -> None:
        self._show(tap, _rows(x))

    def _layer_tap(self, tap: str, i: int, x: Tensor) -> None:
        """A tap of layer i as Transformers has it: in canonical channel order, and with it what it is cut into."""
        if x.ndim == 4 and tap != "kq_soft_max" and self.model_type in HEADS_BEFORE_POSITIONS:
            x = x.transpose(1, 2)  # [1,H,T,D] → [1,T,H,D]
        if tap in ROUTES:
            self._routed(tap, i, x)
        if tap in ROUTES[1:]:
            return
        x = canonical(tap, x, self.names, self.config)
        self._show(f"{tap}-{i}", x)
        if tap == "wqkv":
            for part, values in zip(PARTS, torch.split(x, [self.config.axis(letter) for letter in "QKW"], dim=-1), strict=True):
                self._show(f"{part}-{i}", values)

    def _routed(self, tap: str, i: int, x: Tensor) -> None:
        """The chosen experts and their weights, which come in any order: the most wanted first, as the reference has them."""
        self._routes[tap] = x
        if tap != "ffn_moe_weights" or self.config.experts is None or "ffn_moe_logits" not in self._routes:
            return
        logits, chosen, weights = (self._routes[t] for t in ROUTES)
        wanted = expert_probabilities(logits.float(), self.config.experts) + self.weights.layer(i).get("exp_probs_b.bias", torch.zeros(()))
        order = wanted.gather(-1, chosen).argsort(dim=-1, descending=True)
        self._show(f"{CHOSEN}-{i}", chosen.gather(-1, order))
        self._show(f"{tap}-{i}", weights.gather(-1, order))

    def _show(self, name: str, x: Tensor) -> None:
        tap, dash, layer = name.partition("-")
        if dash and tap not in self.taps[int(layer)]:
            return
        self.shown.add(name)
        if self.sink is not None and self.sink.wants(name):
            self.sink(name, (x[0] if tap == "kq_soft_max" else x).clone())  # Falcon adds to its ffn_out in place

    @contextmanager
    def _functions(self) -> Iterator[None]:
        """q and k after RoPE, which functions of the modelling module make and read: no sub-module does."""
        modeling: Any = importlib.import_module(type(self.model).__module__)
        watched: dict[str, Any] = {"apply_rotary_pos_emb": self._rotate, "eager_attention_forward": self._attend}
        replaced = {name: getattr(modeling, name) for name in watched if hasattr(modeling, name)}
        for name, function in replaced.items():
            setattr(modeling, name, partial(watched[name], function))
        try:
            yield
        finally:
            for name, function in replaced.items():
                setattr(modeling, name, function)

    def _rotate(self, rotate: Any, q: Tensor, k: Tensor, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """Shows what a rotation makes, where it turns whole heads."""
        q, k = rotate(q, k, *args, **more)  # [1,H,T,D], [1,K,T,D]
        if q.shape[-1] == self.config.head_dim and not self.config.latent:
            self._turned.add(self.at)
            self._heads(q, k)
        return q, k

    def _attend(self, attend: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **more: Any) -> Any:
        """Shows what the scores are made of, where no rotation of whole heads did, and the values that no module has as they are used."""
        T = q.shape[-2]
        now_k, now_v = k[..., -T:, :], v[..., -T:, :]  # a cache's positions come first
        if self.at not in self._turned:
            self._heads(q, now_k)
        if self.config.latent or self.config.clamp_qkv:
            self._show(f"Vcur-{self.at}", _rows(now_v.transpose(1, 2)))
        return attend(module, q, k, v, *args, **more)

    def _heads(self, q: Tensor, k: Tensor) -> None:
        """q [1,H,T,D] and k [1,K,T,D]; of a k that is repeated for every head of q, one of each group."""
        if k.shape[1] == q.shape[1] and self.config.n_group > 1:
            k = k[:, :: self.config.n_group]
        for tap, x in zip(TURNED, (q, k), strict=True):
            x = x.transpose(1, 2)
            if self.model_type in TURNED_TO_HALVES:
                still, turned = x[..., : -self.config.rope.dim], x[..., -self.config.rope.dim :]
                x = torch.cat([still, torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2)], dim=-1)
            self._show(f"{tap}-{self.at}", canonical(tap, x, self.names, self.config))


def places(seen: Observer, i: int, layer: Any) -> dict[str, str]:
    """Tap → path of the sub-module of layer i that shows it, of the taps that the model has and a module shows."""
    paths = module_paths(layer, seen.names, LOADED_AS.get(seen.model_type, {}), seen.config)
    hidden = CLAMPED if seen.config.clamp_qkv else ()
    found = {}
    for tap, (stems, _, _) in TAPS.items():
        path = next((paths[stem] for stem in stems if stem in paths), None)
        if path is not None and tap in seen.taps[i] and tap not in hidden:
            found[tap] = path
    return found


def module_paths(layer: Any, names: HfNames, loaded_as: Mapping[str, str], config: ModelConfig) -> dict[str, str]:
    """What ``TAPS`` calls a module → its path in a layer, of those that the layer has."""
    have = {path for path, _ in layer.named_modules()}
    paths = {stem: path for stem, path in {**names.layer, **loaded_as}.items() if path in have}
    # a row for one tensor only, "attn_norm.weight", is another name of its module
    paths |= {
        stem.removesuffix(".weight"): path.removesuffix(".weight")
        for stem, path in names.layer.items()
        if stem.endswith(".weight") and path.removesuffix(".weight") in have
    }
    paths |= {f"norm:{role}": paths[stem] for role in NORMS if (stem := getattr(config.block, role)) in paths}
    if "attn_output" in paths:
        paths[ATTENTION] = paths["attn_output"].rpartition(".")[0]
    experts = next((path for path in have if path.endswith(".experts")), None)
    if experts is not None:
        paths |= {EXPERTS: experts, MOE: experts.removesuffix(".experts")}
    return {**paths, ITSELF: ""}


NORMS = ("attn_norm", "ffn_norm", "attn_post_norm", "ffn_post_norm")
MADE_BY = {"wqkv": "attn_qkv"} | {f"{x}cur{kind}": f"attn_{x.lower()}" for x in "QK" for kind in ("", "_pre", "_normed")}


def canonical(tap: str, x: Tensor, names: HfNames, config: ModelConfig) -> Tensor:
    """[1,T,...] → [T,channels] in canonical order: the channels of a product are its matrix's rows, and are reordered as these are."""
    if tap == "kq_soft_max":
        return x
    x = _rows(x)
    change = names.changes.get(MADE_BY.get(tap, ""))
    return changed(x.T, change, config).T if change in ("halves", "by head") else x


def _rows(x: Tensor) -> Tensor:
    """[1,T,...] or [T,channels] → [T,channels]."""
    return x.reshape(x.shape[1] if x.ndim > 2 else x.shape[0], -1)


def _on_input(module: Any, item: int, show: Callable[[Tensor], None]) -> Any:
    return module.register_forward_pre_hook(lambda _module, args: show(args[item]))


def _on_output(module: Any, item: int, show: Callable[[Tensor], None]) -> Any:
    return module.register_forward_hook(lambda _module, _args, out: show(out[item] if isinstance(out, tuple) else out))
