"""The faults of Transformers one by one: each edits a loaded model, or sets a function of its modelling module.

    FAULTS[cause](model, fault)

``transformers_faults`` loads the model and restores the functions.  What a fault means in GGUF's layout (rows of q and k, pairs of RoPE)
is done in that layout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.numpy_blocks import MISTAKES
from benchmarks.planted import F16_MAX, Planted
from quantscope.model.taps import graph_order, split_tap
from quantscope.trace import Evidence

Fault: TypeAlias = Callable[[Any, Planted], None]  # edits a loaded model
Turn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [1,H,T,D], cos, sin [1,1,T,D]) → x turned

FUNCTIONS = ("apply_rotary_pos_emb", "create_causal_mask", "eager_attention_forward", "repeat_kv")  # of a modelling module, set by faults
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def only(fault: Planted) -> int:
    """The one layer of a fault that has one."""
    assert fault.layers is not None
    return fault.layers[0]


def _blocks(model: Any, fault: Planted) -> list[Any]:
    return [block for i, block in enumerate(model.model.layers) if fault.at(i)]


def _modeling(model: Any) -> Any:
    return import_module(type(model).__module__)


def _done_elsewhere(model: Any, fault: Planted) -> None:
    """By the loader's decoding, or by the ids of the run."""


# Weights


def _transposed(w: Tensor) -> Tensor:
    return w.reshape(w.shape[1], w.shape[0]).T.contiguous()


def _reinterpreted(w: Tensor) -> Tensor:
    return w.T.contiguous().view(w.shape)


def _weight(change: Callable[[Tensor], Tensor]) -> Fault:
    def plant(model: Any, fault: Planted) -> None:
        if fault.where == "output":
            return _replace(model.lm_head, change(model.lm_head.weight.data))
        for block in _blocks(model, fault):
            linear = block.get_submodule(LINEARS[fault.where])
            n_head = linear.out_features // block.self_attn.head_dim
            permuted = fault.where in ("attn_q", "attn_k") and model.config.model_type == "llama"
            w = _interleaved(linear.weight.data, n_head) if permuted else linear.weight.data
            _replace(linear, _halves(change(w), n_head) if permuted else change(w))
        return None

    return plant


def _replace(linear: Any, w: Tensor) -> None:
    linear.weight = nn.Parameter(w, requires_grad=False)


def _interleaved(w: Tensor, n_head: int) -> Tensor:
    """Rows of each head from Transformers' order (first halves, second halves) to GGUF's for llama (pairs side by side)."""
    return w.view(n_head, 2, -1, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def _halves(w: Tensor, n_head: int) -> Tensor:
    return w.view(n_head, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)


def _embedding_column(model: Any, fault: Planted) -> None:
    table = model.model.embed_tokens.weight.data  # [V,E]
    columns = table.reshape(table.shape[1], table.shape[0])  # [E,V]
    model.model.embed_tokens.forward = lambda ids: columns[:, ids[0]].T[None]


def _head_layout(model: Any, fault: Planted) -> None:
    _replace(model.lm_head, _transposed(model.lm_head.weight.data))


def _head_missing(model: Any, fault: Planted) -> None:
    n_vocab = model.config.vocab_size
    model.lm_head.forward = lambda x: F.pad(x, (0, n_vocab - x.shape[-1]))


def _head_zero(model: Any, fault: Planted) -> None:
    _replace(model.lm_head, torch.zeros_like(model.lm_head.weight.data))


def _without_biases(model: Any, fault: Planted) -> None:
    for block in _blocks(model, fault):
        for path in LINEARS.values():
            block.get_submodule(path).bias = None


# Norms


def _rms(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, w.shape, w, eps)


def _norm(change: Callable[[Tensor, Tensor, float], Tensor]) -> Fault:
    def plant(model: Any, fault: Planted) -> None:
        for module in _norm_modules(model, fault):
            module.forward = lambda x, module=module: change(x, module.weight, module.variance_epsilon)

    return plant


def _norm_modules(model: Any, fault: Planted) -> list[Any]:
    if fault.where == "output_norm":
        return [model.model.norm]
    return [block.get_submodule(NORMS[fault.where]) for block in _blocks(model, fault)]


def _norm_eps(model: Any, fault: Planted) -> None:
    everywhere = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    for module in everywhere if fault.where == "all" else _norm_modules(model, fault):
        module.variance_epsilon = fault.value


def _without_head_norms(model: Any, fault: Planted) -> None:
    for block in _blocks(model, fault):
        block.self_attn.q_norm.forward = block.self_attn.k_norm.forward = lambda x: x


# RoPE


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def _unturned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x


def _backwards(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotated(x, cos, -sin)


def _pairs_side_by_side(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels (2i, 2i+1) are a pair, for models whose pairs are halves."""
    return _side_by_side(_rotated(_apart(x), cos, sin))


def _pairs_in_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channels (i, i + D/2) of a head in GGUF's order are a pair, for models whose pairs are side by side there."""
    return _apart(_rotated(_side_by_side(x), cos, sin))


def _apart(x: Tensor) -> Tensor:
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def _side_by_side(x: Tensor) -> Tensor:
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def _turns(of_q: Turn, of_k: Turn) -> Fault:
    def plant(model: Any, fault: Planted) -> None:
        def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
            return of_q(q, cos[:, None], sin[:, None]), of_k(k, cos[:, None], sin[:, None])

        _modeling(model).apply_rotary_pos_emb = apply

    return plant


def _other_layout(model: Any, fault: Planted) -> None:
    turn = _pairs_in_halves if model.config.model_type == "llama" else _pairs_side_by_side
    _turns(turn, turn)(model, fault)


def _positions(change: Callable[[Tensor], Tensor]) -> Fault:
    def plant(model: Any, fault: Planted) -> None:
        rotary = model.model.rotary_emb
        tables = rotary.forward
        rotary.forward = lambda x, position_ids: tables(x, position_ids=change(position_ids))

    return plant


def _offset_q(model: Any, fault: Planted) -> None:
    """The tables of the next positions come along with those of the right ones, and q is turned by them."""
    rotary: Any = model.model.rotary_emb
    later: list[Tensor] = []
    tables = rotary.forward

    def both(x: Tensor, position_ids: Tensor) -> Any:
        later[:] = tables(x, position_ids=position_ids + 1)
        return tables(x, position_ids=position_ids)

    rotary.forward = both
    _turns(lambda q, cos, sin: _rotated(q, later[0][:, None], later[1][:, None]), _rotated)(model, fault)


def _theta(model: Any, fault: Planted) -> None:
    rotary = model.model.rotary_emb
    exponents = torch.arange(0, 1, 1 / len(rotary.inv_freq))
    rotary.inv_freq = rotary.inv_freq * (fault.value / model.config.rope_parameters["rope_theta"]) ** -exponents


def _plain_frequencies(model: Any, fault: Planted) -> None:
    rotary = model.model.rotary_emb
    exponents = torch.arange(0, 1, 1 / len(rotary.inv_freq))
    rotary.inv_freq = model.config.rope_parameters["rope_theta"] ** -exponents


# Attention


def _mask(sees: Callable[[Tensor, Tensor], Tensor]) -> Fault:
    """sees(query [T,1], key [1,T]) → bool [T,T]."""

    def plant(model: Any, fault: Planted) -> None:
        def create(*args: Any, inputs_embeds: Tensor, **more: Any) -> Tensor:
            at = torch.arange(inputs_embeds.shape[1])
            hidden = ~sees(at[:, None], at[None, :])
            return torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]

        _modeling(model).create_causal_mask = create

    return plant


def _scale(of: Callable[[Any, Any], float]) -> Fault:
    def plant(model: Any, fault: Planted) -> None:
        for block in _blocks(model, fault):
            block.self_attn.scaling = of(block.self_attn, model.config)

    return plant


def _tiled(model: Any, fault: Planted) -> None:
    _modeling(model).repeat_kv = lambda x, n_rep: x.repeat(1, n_rep, 1, 1)


def _softmax_over(axis: int) -> Fault:
    """axis of [1,H,T,S]; where everything along it is masked, the probability is 0."""

    def plant(model: Any, fault: Planted) -> None:
        repeat = _modeling(model).repeat_kv

        def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **more: Any) -> tuple[Tensor, Tensor]:
            k, v = repeat(k, module.num_key_value_groups), repeat(v, module.num_key_value_groups)
            scores = (q @ k.transpose(2, 3) * scaling).masked_fill(mask < 0, -torch.inf)
            probs = scores.softmax(axis).nan_to_num(0)
            return (probs @ v).transpose(1, 2).contiguous(), probs

        _modeling(model).eager_attention_forward = attention

    return plant


def _halved_heads(model: Any, fault: Planted) -> None:
    for block in _blocks(model, fault):
        block.self_attn.head_dim //= 2
        block.self_attn.scaling = block.self_attn.head_dim**-0.5
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[::2]  # theta^(−2i/(D/2)): every second of the right ones


# Feed-forward


def _product(act: Callable[[Tensor, Tensor], Tensor]) -> Fault:
    """act(gate, up) in place of silu(gate) · up."""

    def plant(model: Any, fault: Planted) -> None:
        for block in _blocks(model, fault):
            mlp = block.mlp
            mlp.forward = lambda x, mlp=mlp: mlp.down_proj(act(mlp.gate_proj(x), mlp.up_proj(x)))

    return plant


def _activation(act: Callable[[Tensor], Tensor]) -> Fault:
    return _product(lambda gate, up: act(gate) * up)


def _gate_up_swapped(model: Any, fault: Planted) -> None:
    if fault.where == "used":
        return _product(lambda gate, up: F.silu(up) * gate)(model, fault)
    for block in _blocks(model, fault):
        gate, up = block.mlp.gate_proj.weight.data, block.mlp.up_proj.weight.data
        _replace(block.mlp.gate_proj, up)
        _replace(block.mlp.up_proj, gate)
    return None


def _overflowing(gate: Tensor, up: Tensor) -> Tensor:
    act = F.silu(gate) * up
    return torch.where(act.abs() > F16_MAX, math.inf * act.sign(), act)


# The residual stream


def _residuals(attn: bool = True, ffn: bool = True) -> Fault:
    def plant(model: Any, fault: Planted) -> None:
        for block in _blocks(model, fault):
            block.forward = _block_forward(block, attn, ffn)

    return plant


def _block_forward(block: Any, attn: bool, ffn: bool) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **more: Any) -> Tensor:
        branch = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **more)[0]
        h = hidden_states + branch if attn else branch
        branch = block.mlp(block.post_attention_layernorm(h))
        out: Tensor = h + branch if ffn else branch
        return out

    return forward


def _after_layer(change: Callable[[Tensor, Tensor, Planted], Tensor]) -> Fault:
    """change(input, output, fault) is what the layer hands on."""

    def plant(model: Any, fault: Planted) -> None:
        for block in _blocks(model, fault):
            right = block.forward
            block.forward = lambda h, right=right, **more: change(h, right(h, **more), fault)

    return plant


def _layers_as(model: Any, layers: list[Any]) -> None:
    model.model.layers = nn.ModuleList(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = ["full_attention"] * len(layers)
    model.config.num_hidden_layers = len(layers)


def _skipped(model: Any, fault: Planted) -> None:
    if fault.where == "dropped":
        return _after_layer(lambda came, went, fault: came)(model, fault)
    return _layers_as(model, [block for i, block in enumerate(model.model.layers) if i != only(fault)])


def _repeated(model: Any, fault: Planted) -> None:
    layers = list(model.model.layers)
    layers.insert(only(fault), copy.deepcopy(layers[only(fault)]))  # of its own, so that each run has its own taps
    _layers_as(model, layers)


def _without(taps: dict[str, tuple[Evidence, ...]], layer: int) -> dict[str, tuple[Evidence, ...]]:
    """The taps under the numbers of the file's layers, where one was not run: it hands on what came."""
    numbered = _numbered(taps, lambda i: i if i < layer else i + 1)
    numbered[f"l_out-{layer}"] = taps[f"l_out-{layer - 1}" if layer else "embd"]
    return {name: numbered[name] for name in sorted(numbered, key=graph_order)}


def _second_time(taps: dict[str, tuple[Evidence, ...]], layer: int) -> dict[str, tuple[Evidence, ...]]:
    """The taps under the numbers of the file's layers, where one was run twice."""
    return _numbered(taps, lambda i: None if i == layer else i if i < layer else i - 1)


def _numbered(taps: dict[str, tuple[Evidence, ...]], number: Callable[[int], int | None]) -> dict[str, tuple[Evidence, ...]]:
    renamed = {}
    for name, evidence in taps.items():
        stem, layer = split_tap(name) or (name, None)
        new = None if layer is None else number(layer)
        if layer is None or new is not None:
            renamed[name if layer is None else f"{stem}-{new}"] = evidence
    return renamed


RENUMBERED = {"layer-skipped": _without, "layer-repeated": _second_time}
FAULTS: dict[str, Fault] = {
    "weight-transposed": _weight(_transposed),
    "weight-reinterpreted": _weight(_reinterpreted),
    "embedding-column": _embedding_column,
    "head-layout": _head_layout,
    "head-missing": _head_missing,
    "head-zero": _head_zero,
    "bias-ignored": _without_biases,
    "norm-eps": _norm_eps,
    "norm-weight-missing": _norm(lambda x, w, eps: _rms(x, torch.ones_like(w), eps)),
    "norm-weight-twice": _norm(lambda x, w, eps: _rms(x, w * w, eps)),
    "norm-weight-plus-one": _norm(lambda x, w, eps: _rms(x, 1 + w, eps)),
    "norm-layernorm": _norm(lambda x, w, eps: F.layer_norm(x, w.shape, w, eps=eps)),
    "norm-missing": _norm(lambda x, w, eps: x),
    "q-norm-ignored": _without_head_norms,
    "rope-layout": _other_layout,
    "rope-theta": _theta,
    "rope-offset": _positions(lambda at: at + 1),
    "rope-offset-q": _offset_q,
    "rope-stuck": _positions(torch.zeros_like),
    "rope-missing": _turns(_unturned, _unturned),
    "rope-missing-q": _turns(_unturned, _rotated),
    "rope-missing-k": _turns(_rotated, _unturned),
    "rope-reversed": _turns(_backwards, _backwards),
    "rope-factors-ignored": _plain_frequencies,
    "mask-missing": _mask(lambda query, key: key >= 0 * query),
    "mask-next": _mask(lambda query, key: key <= query + 1),
    "mask-self": _mask(lambda query, key: key < query.clamp(min=1)),
    "scale-missing": _scale(lambda attn, config: 1.0),
    "scale-embd": _scale(lambda attn, config: config.hidden_size**-0.5),
    "scale-linear": _scale(lambda attn, config: 1 / attn.head_dim),
    "gqa-tile": _tiled,
    "head-dim-half": _halved_heads,
    "softmax-queries": _softmax_over(2),
    "softmax-heads": _softmax_over(1),
    "gate-up-swapped": _gate_up_swapped,
    "act-gelu-erf": _activation(F.gelu),
    "act-gelu-tanh": _activation(lambda x: F.gelu(x, approximate="tanh")),
    "act-relu": _activation(F.relu),
    "act-missing": _activation(lambda x: x),
    "act-sigmoid": _activation(torch.sigmoid),
    "f16-overflow": _product(_overflowing),
    "residual-missing-attn": _residuals(attn=False),
    "residual-missing-ffn": _residuals(ffn=False),
    "layer-skipped": _skipped,
    "layer-repeated": _repeated,
    "activations-clipped": _after_layer(lambda came, went, fault: went.clamp(-fault.value, fault.value)),
    "bos-missing": _done_elsewhere,
    **dict.fromkeys(MISTAKES, _done_elsewhere),
}
