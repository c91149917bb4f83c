"""Canonical tensors: one set of names and one layout, whatever the file, decoded when asked for.

Canonical means GGUF's names and GGUF's layout.  From a Hugging Face folder the tensors are renamed, and where the converter
reorders the rows of q and k, so does this module: both files of one model give bit-identical tensors
(docs/decisions/0001-canonical-layout.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from quantscope.arch.config import Llama3Scaling, ModelConfig
from quantscope.arch.names import Change, HfNames, expert_of, names_in, to_hf
from quantscope.arch.read import read_config
from quantscope.arch.table import ARCHS, TensorRow
from quantscope.errors import MissingTensorError, NonFiniteError, ShapeError, UnsupportedTypeError
from quantscope.qtypes import QuantType
from quantscope.quants import can_decode, decode
from quantscope.sources.base import RawTensor, Source, missing_tensor, show

ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # of runs beyond and within the pretraining's context
ALL_IDS = slice(None)
NOT_OF_THE_HEAD = ("token_embd.weight", ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
IN_OUT: tuple[Change, ...] = ("transposed", "alternating")  # matrices that a folder stores as [in,out]
BY_ID = ("output.weight", "output.bias")  # tensors of the head with one row per token id


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by local name, each made when it is asked for: a matrix lives as long as its product takes, no longer.

    part: how one matrix of a stack of them, [n,out,in], is made without the others.
    """

    def __init__(self, names: Mapping[str, str], make: Callable[[str], Tensor], part: Callable[[str, int], Tensor] | None = None) -> None:
        self._names, self._make, self._part = names, make, part

    def part(self, local: str, n: int) -> Tensor:
        """Matrix n of a stack."""
        return self[local][n] if self._part is None else self._part(self._names[local], n)

    def __getitem__(self, local: str) -> Tensor:
        return self._make(self._names[local])

    def __contains__(self, local: object) -> bool:
        return local in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class WeightProvider(Protocol):
    """What the forward asks for; all tensors float32 unless the provider says otherwise."""

    @property
    def config(self) -> ModelConfig: ...

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of a matrix: ids [...] int64, matrix [n,m] → [...,m]."""

    def layer(self, i: int) -> Mapping[str, Tensor]:
        """The tensors of layer i by local name, "attn_q.weight"; optional ones only where the file has them."""

    def top(self, ids: slice = ALL_IDS) -> Mapping[str, Tensor]:
        """What the head needs: "output_norm.weight", "output.weight" (the embedding where tied), "output.bias" ...

        ids: the part of the vocabulary whose logits are wanted; "output.weight" and "output.bias" have these rows only.
        """

    def rope_factors(self, n: int = 0) -> Tensor | None:
        """The divisors of the RoPE frequencies of a run over n positions, [R]: rope_freqs.weight, or rope_factors_short and _long; None:
        there are none."""

    def layer_names(self, i: int) -> Mapping[str, str]:
        """Local name → canonical name of the tensors layer i has."""

    def top_names(self) -> Mapping[str, str]:
        """Local name → canonical name of what the head needs; "output.weight" is the embedding where tied."""

    def will_need(self, names: Iterable[str]) -> None:
        """These tensors come next: what can be prepared beside the work at hand begins now."""

    def let_go(self, names: Iterable[str]) -> None:
        """These tensors are not needed for a while: what they hold of memory is given back."""


class OnTop:
    """A WeightProvider that changes some of what another one gives: what it does not define is the inner one's."""

    def __init__(self, inner: WeightProvider) -> None:
        self.inner = inner

    @property
    def config(self) -> ModelConfig:
        return self.inner.config

    def rows(self, name: str, ids: Tensor) -> Tensor:
        return self.inner.rows(name, ids)

    def layer(self, i: int) -> Mapping[str, Tensor]:
        return self.inner.layer(i)

    def top(self, ids: slice = ALL_IDS) -> Mapping[str, Tensor]:
        return self.inner.top(ids)

    def rope_factors(self, n: int = 0) -> Tensor | None:
        return self.inner.rope_factors(n)

    def layer_names(self, i: int) -> Mapping[str, str]:
        return self.inner.layer_names(i)

    def top_names(self) -> Mapping[str, str]:
        return self.inner.top_names()

    def will_need(self, names: Iterable[str]) -> None:
        self.inner.will_need(names)

    def let_go(self, names: Iterable[str]) -> None:
        self.inner.let_go(names)


def top_tensors(names: Mapping[str, str], ids: slice, read: Callable[[str, slice], Tensor]) -> LazyTensors:
    """What ``WeightProvider.top`` gives.  names: local → canonical; read: (canonical name, rows) → tensor."""
    return LazyTensors({local: local for local in names}, lambda local: read(names[local], ids if local in BY_ID else ALL_IDS))


class Weights:
    """The tensors of one file under canonical names, in float32.

    keep: hold every tensor once read (for generation); otherwise nothing is held and each call decodes anew.
    Raises at construction: UnsupportedArchitectureError, UnsupportedFeatureError, CorruptFileError (metadata), MissingTensorError,
    ShapeError, UnsupportedTypeError.
    """

    def __init__(self, source: Source, *, keep: bool = False, device: str = "cpu") -> None:
        self.source = source
        self.config = read_config(source)
        self.device = torch.device(device)
        self._spec = ARCHS[self.config.arch]
        self._kept: dict[str, Tensor] | None = {} if keep else None
        self._finite: set[tuple[str, int | None, int | None]] = set()
        self._names = names_in(source)
        self._stored, self._stacks = _by_canonical_name(source, self._names)
        self._rows = self._find_rows()
        self._check_stored()

    def _find_rows(self) -> dict[str, TensorRow]:
        """Canonical name → row of the architecture's table, for the tensors that are there; MissingTensorError for one that must be."""
        config, found, rows = self.config, {}, dict(self._table())
        for name, row in rows.items():
            if row.flag is not None and config.biases is not None and row.flag not in config.biases:
                continue
            other = f"{name.removesuffix(row.name)}{row.unless}"
            replaced = bool(row.unless) and other in self._stored and other in rows
            if (name in self._stored or self._from_config(name) is not None) and not replaced:
                found[name] = row
            elif not replaced and (row.needed or row.flag in (config.biases or ()) or name == "output.weight"):
                raise self._missing(name)
        return found

    def _table(self) -> Iterator[tuple[str, TensorRow]]:
        """The architecture's rows under their full names, layer by layer, so that a wrong n_layer fails at the first layer."""
        for row in self._spec.top:
            if not (self.config.tied and row.name == "output.weight"):
                yield row.name, row
        for i in range(self.config.n_layer):
            for row in self._spec.layer:
                if row.exists(self.config, i):
                    yield f"blk.{i}.{row.name}", row

    def _check_stored(self) -> None:
        """Shapes as the metadata say, types that hold weights."""
        for name, row in self._rows.items():
            stored, expected = self._stored.get(name), row.shape(self.config)
            expected = _swapped(expected) if self._in_out(name) else expected
            if stored is None:  # made, not stored
                continue
            if not can_decode(stored.qtype):
                raise UnsupportedTypeError(
                    f"{show(self.source.path)}: tensor {stored.name!r} has the type {stored.qtype}, expected a floating-point or block "
                    f"type. It is packed in a way of its own (GPTQ, AWQ, bitsandbytes ...): take the original F16 or BF16 weights, or a "
                    f"GGUF file of this model."
                )
            if _squeezed(stored.shape) != _squeezed(expected):
                raise ShapeError(
                    f"{show(self.source.path)}: tensor {name!r} has the shape {list(stored.shape)}, expected {list(expected)} "
                    f"from the metadata. The header and the weights are of different models, or the file was converted wrongly: "
                    f"compare them with `quantscope inspect {show(self.source.path)}`."
                )

    def _missing(self, name: str) -> MissingTensorError:
        own = to_hf(name, self._names) if self.source.format == "safetensors" else name
        return missing_tensor(self.source.path, own or name, self.source.tensors)

    @property
    def unused(self) -> tuple[str, ...]:
        """Tensors of the file (under its own names) that the forward does not read; a report must show them."""
        used = {self._stored[name].name for name in self._rows if name in self._stored and name not in self._stacks}
        used |= {raw.name for name, stack in self._stacks.items() if name in self._rows for raw in stack}
        return tuple(name for name in self.source.tensors if name not in used)

    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors, embedding first, then layer by layer."""
        return tuple(self._rows)

    def stored_names(self) -> tuple[str, ...]:
        """``names()`` without the factors of RoPE that are made from a config.json."""
        return tuple(name for name in self._rows if name in self._stored)

    def stored_types(self) -> dict[str, QuantType]:
        """Canonical name → type in the file, of all ``stored_names()``."""
        return {name: self._stored[name].qtype for name in self.stored_names()}

    def stored(self, name: str) -> RawTensor:
        """How the file stores a tensor: its own name, type and shape.  KeyError for rope_freqs made from a config.json."""
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._rows[name].shape(self.config)

    def get(self, name: str) -> Tensor:
        """The tensor in float32 and canonical layout, [out,in] for a matrix.

        Raises MissingTensorError, and NonFiniteError when the file holds a NaN or an infinity.
        """
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        if name not in self._rows:
            raise self._missing(name)
        tensor = self._canonical(name).to(self.device)
        if self._kept is not None:
            self._kept[name] = tensor
        return tensor

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Rows of a matrix: ids [...] → [...,m].  Decodes only these rows, so that the embedding of a large vocabulary is never whole."""
        if self._kept is not None or self._made(name):
            return self.get(name)[ids.to(self.device)]
        unique, inverse = torch.unique(ids, return_inverse=True)
        raw = self._stored[name]
        blocks = self.source.raw(raw.name).reshape(raw.shape[0], -1)[unique.cpu().numpy()]  # [rows, bytes of a row]
        part = torch.from_numpy(decode(blocks.reshape(-1), raw.qtype)).reshape(len(unique), -1)
        self._check_finite(name, part, unique)
        return part.to(self.device)[inverse.to(self.device)]

    def band(self, name: str, ids: slice) -> Tensor:
        """Some consecutive rows of ``get(name)``; only these are decoded, unless the tensor is held or has its rows reordered."""
        if name in self._stacks and self._kept is None and ids != ALL_IDS:
            return torch.stack([self._decoded(raw) for raw in self._stacks[name][ids]]).to(self.device)
        shape = self.shape(name)
        by_matrix = len(shape) == 3 and self._in_out(name)
        if ids == ALL_IDS or self._kept is not None or (self._made(name) and not by_matrix):
            return self.get(name)[ids]
        raw = self._stored[name]
        blocks = self.source.entries(raw.name, ids)  # [rows, bytes of a row]
        part = torch.from_numpy(decode(blocks.reshape(-1), raw.qtype)).reshape(-1, *(raw.shape if by_matrix else shape)[1:])
        self._check_finite_once(name, part, ids)
        return self._as_canonical(name, part).to(self.device)

    def will_need(self, names: Iterable[str]) -> None:
        for raw in self._raws(names):
            self.source.will_need(raw.name)

    def let_go(self, names: Iterable[str]) -> None:
        for raw in self._raws(names):
            self.source.let_go(raw.name)

    def _raws(self, names: Iterable[str]) -> Iterator[RawTensor]:
        """What the file stores of these tensors."""
        for name in names:
            if name in self._stored:
                yield from self._stacks.get(name, (self._stored[name],))

    def layer_names(self, i: int) -> dict[str, str]:
        """Local name → canonical name of the tensors layer i has."""
        prefix = f"blk.{i}."
        return {row.name: prefix + row.name for row in self._spec.layer if prefix + row.name in self._rows}

    def top_names(self) -> dict[str, str]:
        """Local name → canonical name of what the head needs; "output.weight" is the embedding where tied."""
        names = {row.name: row.name for row in self._spec.top if row.name in self._rows and row.name not in NOT_OF_THE_HEAD}
        return names | ({"output.weight": "token_embd.weight"} if self.config.tied else {})

    def layer(self, i: int) -> Mapping[str, Tensor]:
        return LazyTensors(self.layer_names(i), self.get, lambda name, n: self.band(name, slice(n, n + 1))[0])

    def top(self, ids: slice = ALL_IDS) -> Mapping[str, Tensor]:
        return top_tensors(self.top_names(), ids, self.band)

    def rope_factors(self, n: int = 0) -> Tensor | None:
        name = next(
            (name for name in (ROPE_FREQS, ROPE_LONG if n > self.config.rope.n_ctx_orig else ROPE_SHORT) if name in self._rows), None
        )
        return None if name is None else self.get(name)

    def _canonical(self, name: str) -> Tensor:
        made = None if name in self._stored else self._from_config(name)
        if made is not None:
            return made
        if name in self._stacks:
            return torch.stack([self._decoded(raw) for raw in self._stacks[name]])
        return self._as_canonical(name, self._decoded(self._stored[name]))

    def _from_config(self, name: str) -> Tensor | None:
        """A tensor of factors of RoPE that a config.json describes and a GGUF file stores."""
        rope = self.config.rope
        if name == ROPE_FREQS and rope.llama3 is not None:
            return llama3_factors(rope.theta, rope.dim, rope.llama3)
        if name in (ROPE_LONG, ROPE_SHORT) and rope.longrope is not None:
            return torch.tensor(rope.longrope.long if name == ROPE_LONG else rope.longrope.short)
        return None

    def _as_canonical(self, name: str, stored: Tensor) -> Tensor:
        """The canonical form of a stored tensor, or of some of the matrices of a stack."""
        tensor = stored.transpose(-1, -2).contiguous() if self._in_out(name) else stored
        return changed(tensor.reshape(-1, *self.shape(name)[1:]), self._change(name), self.config)

    def _decoded(self, raw: RawTensor) -> Tensor:
        """A stored tensor in float32, in its own shape."""
        tensor = torch.from_numpy(decode(self.source.raw(raw.name), raw.qtype)).reshape(raw.shape)
        self._check_finite_once(raw.name, tensor, ALL_IDS)
        return tensor

    def _made(self, name: str) -> bool:
        """Whether the canonical tensor is made from what is stored, and not just decoded."""
        return name in self._stacks or self._change(name) is not None

    def _change(self, name: str) -> Change | None:
        """How what the folder stores differs from the canonical tensor; a GGUF file has that itself."""
        stem, _, kind = name.rpartition(".")
        change = self._names.changes.get(stem.rpartition(".")[2]) if self.source.format == "safetensors" else None
        return None if kind == "bias" and change in ("transposed", "less one") else change  # a bias that alternates stays so

    def _in_out(self, name: str) -> bool:
        """Whether a matrix, or each of a stack, is stored as [in,out]."""
        return self._change(name) in IN_OUT and not name.endswith(".bias")

    def _check_finite_once(self, name: str, tensor: Tensor, rows: slice) -> None:
        """``_check_finite`` the first time these rows are read: the file does not change."""
        key = name, rows.start, rows.stop
        if key not in self._finite:
            self._check_finite(name, tensor, None if rows.start is None else torch.arange(rows.start, rows.start + len(tensor)))
            self._finite.add(key)

    def _check_finite(self, name: str, tensor: Tensor, ids: Tensor | None = None) -> None:
        """NonFiniteError at the first NaN or infinity.  ids: which rows of the stored tensor these are; None: all of it."""
        bad = ~torch.isfinite(tensor)
        if not bad.any():
            return
        index = [int(n) for n in np.unravel_index(int(bad.flatten().byte().argmax()), tensor.shape)]
        value = float(tensor[tuple(index)])
        if ids is not None:
            index[0] = int(ids[index[0]])
        raise NonFiniteError(
            f"{show(self.source.path)}: tensor {name!r} holds {value} at index {index} ({int(bad.sum())} of {tensor.numel():,} values "
            f"are not finite), expected finite numbers. The training diverged, or the conversion overflowed (BF16 weights written "
            f"as F16 do): convert the original again with `--outtype bf16` or `f32`."
        )


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without leading axes of length 1, which a GGUF file does not store."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def interleave_rows(w: Tensor, n_head: int) -> Tensor:
    """Reorder each head's output rows from half-split to interleaved pairs: row j of the first half goes to 2j, of the second to 2j+1.

    w: [n_head·D, ...] → the same shape.  A rotation that pairs rows (i, i + D/2) of the input pairs rows (2i, 2i+1) of the result.
    """
    halves = w.reshape(n_head, 2, -1, *w.shape[1:])  # [n_head, 2, D/2, ...]
    return halves.transpose(1, 2).reshape(w.shape)


def llama3_factors(theta: float, dim: int, s: Llama3Scaling) -> Tensor:
    """Divisors of Llama-3.1's RoPE frequencies, [dim/2] float32, in the converter's order of operations so that they are the same bits.

        λᵢ = 2π theta^(2i/dim):   1 if λᵢ < n_ctx_orig/high,   factor if λᵢ > n_ctx_orig/low,
        else 1 / ((1 − s)/factor + s),  s = (n_ctx_orig/λᵢ − low) / (high − low)

    Source: Transformers' ``_compute_llama3_parameters``, which divides the frequencies by the same numbers.
    """
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    wavelengths = 2 * math.pi / freqs
    smooth = (s.n_ctx_orig / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    between = 1 / ((1 - smooth) / s.factor + smooth)
    long = torch.where(wavelengths > s.n_ctx_orig / s.low_freq_factor, torch.tensor(s.factor), between)
    return torch.where(wavelengths < s.n_ctx_orig / s.high_freq_factor, torch.tensor(1.0), long).float()


def changed(tensor: Tensor, change: Change | None, config: ModelConfig) -> Tensor:
    """The canonical tensor of one that a folder stores otherwise; a matrix is [out,in] already."""
    if change == "halves":
        return interleave_rows(tensor, tensor.shape[0] // config.head_dim)
    if change == "less one":
        return tensor + 1
    if change == "by head":
        heads = tensor.reshape(config.n_head_kv, config.n_group + 2, config.head_dim, *tensor.shape[1:])  # [J,H/J+2,D,...]
        return torch.cat([part.flatten(0, 2) for part in torch.split(heads, [config.n_group, 1, 1], dim=1)])
    if change == "alternating":
        return torch.cat([tensor[:, ::2], tensor[:, 1::2]], dim=1)
    return tensor


def _by_canonical_name(source: Source, names: HfNames) -> tuple[dict[str, RawTensor], dict[str, list[RawTensor]]]:
    """(canonical name → what is stored, canonical name → the matrices of a stack, where each expert's is a tensor of its own)."""
    if source.format == "gguf":
        return dict(source.tensors), {}
    stored: dict[str, RawTensor] = {}
    parts: dict[str, dict[int, RawTensor]] = {}
    for hf, raw in source.tensors.items():
        found = expert_of(hf, names)
        if found is not None and found[1] is None:
            stored[found[0]] = raw
        elif found is not None and found[1] is not None:
            parts.setdefault(found[0], {})[found[1]] = raw
    stacks = {name: [each[n] for n in sorted(each)] for name, each in parts.items()}
    whole = {name: RawTensor(stack[0].name, stack[0].qtype, (len(stack), *stack[0].shape)) for name, stack in stacks.items()}
    return stored | whole, stacks
