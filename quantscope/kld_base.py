"""llama-perplexity's file of a base's log-probabilities (its ``--kl-divergence-base``), read and written.

    "_logits_"   n_ctx:u32   n_vocab:i32   n_chunk:i32   tokens:i32[n_chunk · n_ctx]                      little-endian, no padding
    and for each chunk and each position n_ctx/2 … n_ctx − 2:
    scale:f32    lowest:f32  code:u16[n_vocab, one more where that is odd]

    ln p(v) = scale · code(v) + lowest,   scale = (max − min) / 65535,   min = the larger of the smallest logit and max − 16

A log-probability is off by half a step at most, 1.2·10⁻⁴ nats, and a token more than 16 below the largest has ``lowest``, whatever it
had.  What is not above −16 has no part in a KL divergence here, as in llama-perplexity; its tokens' share of the probability is missing.
Source: ``log_softmax`` and ``kl_divergence`` in llama.cpp's tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantscope.errors import (
    CorruptFileError,
    MissingFileError,
    ModelFileError,
    NonFiniteError,
    NotAModelError,
    TruncatedFileError,
    UsageError,
)
from quantscope.inputs import Input, read_inputs
from quantscope.lockstep import Member, walk
from quantscope.new_file import written
from quantscope.plan import LOGIT_BYTES, slices
from quantscope.results import PlanInfo, StudyOptions
from quantscope.sources.base import show
from quantscope.sources.files import advise, sha256_of
from quantscope.variants import line_up, lineup_plan
from quantscope.wording import count, size

MAGIC = b"_logits_"
HEADER = struct.Struct("<8sIii")  # magic, n_ctx, n_vocab, n_chunk
REACH = np.float32(16)  # [nats] below the largest: where the codes end, and of what counts in a KL divergence
STEPS = np.float32(65535)
LARGEST_STEP = REACH / STEPS


def row_type(n_vocab: int) -> np.dtype[np.void]:
    """One scored position."""
    return np.dtype([("scale", "<f4"), ("lowest", "<f4"), ("codes", "<u2", (n_vocab + n_vocab % 2,))])


def n_scored(n_ctx: int) -> int:
    """Scored positions of a chunk, n_ctx/2 … n_ctx − 2."""
    return n_ctx - 1 - n_ctx // 2


def file_size(n_ctx: int, n_vocab: int, n_chunk: int) -> int:
    """[bytes]"""
    return HEADER.size + 4 * n_chunk * n_ctx + n_chunk * n_scored(n_ctx) * (8 + 2 * (n_vocab + n_vocab % 2))


# ---- Reading -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KldBase:
    """An open file.  tokens: int32 [C,T] as the tokenizer gave them; rows: [C,S] of ``row_type``, read from disk when they are used."""

    path: Path
    n_vocab: int
    tokens: NDArray[np.int32]
    rows: NDArray[np.void]
    mapped: NDArray[np.uint8]

    @property
    def n_chunk(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def n_ctx(self) -> int:
        return int(self.tokens.shape[1])

    @cached_property
    def sha256(self) -> str:
        return sha256_of(self.mapped)

    def log_probs(self, chunk: NDArray[Any], position: NDArray[Any], ids: slice) -> Tensor:
        """ln p of these ids at scored positions, counted from 0 in each chunk: [n] and [n] → float32 [n,v]; −∞ where it does not count.

        Raises CorruptFileError for numbers that no program writes.
        """
        scale, lowest = self._scales(chunk, position)
        codes = self.rows["codes"][chunk, position, slice(*ids.indices(self.n_vocab))]
        self._let_go()
        log_p = scale[:, None] * codes.astype(np.float32) + lowest[:, None]  # in float32, as llama-perplexity
        log_p[log_p <= -REACH] = -np.inf
        return torch.from_numpy(log_p)

    def log_p_of_labels(self, chunks: slice) -> NDArray[np.float64]:
        """ln p of the token that follows each scored position of some chunks, [C,S]; what is out of reach has the lowest there is."""
        labels = self.tokens[chunks, self.n_ctx // 2 + 1 :]  # [C,S]
        chunk, position = np.indices(labels.shape).reshape(2, -1)
        chunk = chunk + (chunks.start or 0)
        scale, lowest = self._scales(chunk, position)
        codes = self.rows["codes"][chunk, position, labels.ravel()]
        return (scale * codes.astype(np.float32) + lowest).astype(np.float64).reshape(labels.shape)

    def largest_step(self, n_chunk: int) -> float:
        """[nats] between neighbouring codes, the largest of the first chunks."""
        largest = float(self.rows["scale"][:n_chunk].max())
        self._let_go()
        return largest

    def _let_go(self) -> None:
        """Give the file's pages back: they count as this process's memory from the moment they are read."""
        advise(self.mapped, "MADV_DONTNEED")

    def _scales(self, chunk: NDArray[Any], position: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        scale, lowest = self.rows["scale"][chunk, position], self.rows["lowest"][chunk, position]
        good = (scale >= 0) & (scale <= 1.01 * LARGEST_STEP) & np.isfinite(lowest) & (lowest <= 0.01)  # not so: NaN
        good &= np.where(good, scale, 0) * STEPS + np.where(good, lowest, 0) <= 0.01  # ln p of the most probable token
        if not good.all():
            at = int(good.argmin())
            raise CorruptFileError(
                f"{show(self.path)}: chunk {int(chunk[at])}, scored position {int(position[at])}: step {scale[at]:g} and lowest ln p "
                f"{lowest[at]:g}, expected a step of 0 to {LARGEST_STEP:g} and no ln p above 0. The file was damaged, or the model that "
                f"made it gave NaN: make it again with `llama-perplexity --kl-divergence-base` or `quantscope kld-base`."
            )
        return scale, lowest


def read_base(path: Path) -> KldBase:
    """Open a file; its rows stay on disk.

    Raises MissingFileError, NotAModelError for another kind of file, TruncatedFileError and CorruptFileError for a header that the rest of
    the file does not bear out.
    """
    mapped = _mapped(path)
    magic, n_ctx, n_vocab, n_chunk = HEADER.unpack(mapped[: HEADER.size].tobytes().ljust(HEADER.size, b"\0"))
    if magic != MAGIC:
        raise NotAModelError(
            f"{show(path)}: it starts with {magic!r}, expected {MAGIC!r}, as a file of log-probabilities. Make one with `llama-perplexity "
            f"-m MODEL -f TEXT --kl-divergence-base {show(path)}` or `quantscope kld-base MODEL --text TEXT -o {show(path)}`."
        )
    if len(mapped) < HEADER.size or n_ctx < 3 or n_vocab < 1 or n_chunk < 1:
        raise CorruptFileError(
            f"{show(path)}: {n_chunk} chunks of {n_ctx} tokens and a vocabulary of {n_vocab}, expected at least 1 of 3 and 1. The program "
            f"that wrote the file was stopped before its first chunk, or the file was damaged: make it again."
        )
    _check_size(path, len(mapped), n_ctx, n_vocab, n_chunk)
    first_row = HEADER.size + 4 * n_chunk * n_ctx
    tokens = mapped[HEADER.size : first_row].view("<i4").reshape(n_chunk, n_ctx)
    outside = (tokens < 0) | (tokens >= n_vocab)
    if outside.any():
        raise CorruptFileError(
            f"{show(path)}: token {int(tokens[outside][0])} at position {int(outside.argmax())}, expected ids of 0 to {n_vocab - 1}. The "
            f"file was damaged: make it again."
        )
    rows = mapped[first_row:].view(row_type(n_vocab)).reshape(n_chunk, n_scored(n_ctx))
    return KldBase(path, n_vocab, tokens, rows, mapped)


def _mapped(path: Path) -> NDArray[np.uint8]:
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode) or info.st_size == 0:
            raise NotAModelError(f"{show(path)}: not a regular file or empty, expected a file of log-probabilities. Check the path.")
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except FileNotFoundError:
        raise MissingFileError(
            f"{show(path)}: no such file, expected one of log-probabilities. Make it with `quantscope kld-base MODEL --text TEXT -o "
            f"{show(path)}`, or check the path."
        ) from None
    except (OSError, ValueError) as e:
        raise ModelFileError(
            f"{show(path)}: cannot be read ({e}), expected a file of log-probabilities. Check its path and permissions."
        ) from None


def _check_size(path: Path, found: int, n_ctx: int, n_vocab: int, n_chunk: int) -> None:
    expected = file_size(n_ctx, n_vocab, n_chunk)
    what = f"{count(n_chunk, 'chunk')} of {n_ctx:,} tokens with a vocabulary of {n_vocab:,} take {expected:,} bytes"
    if found < expected:
        raise TruncatedFileError(
            f"{show(path)}: {what}, the file has {found:,}. The program that wrote it was stopped, the disk was full, or the copy is "
            f"incomplete: make it again, or copy it again."
        )
    if found > expected:
        raise CorruptFileError(
            f"{show(path)}: {what}, the file has {found:,}. It was damaged, or written by a program that keeps other positions: make it "
            f"again."
        )


def check_base(base: KldBase, text: Input, n_vocab: int, n_chunk: int, *, add_bos: bool) -> None:
    """UsageError unless the file's token ids are those of the text, in the first ``n_chunk`` chunks.

    add_bos: the first token of each chunk becomes BOS whatever it is, here as in llama-perplexity.
    """
    where = f"--kl-divergence-base {show(base.path)}"
    if base.n_vocab != n_vocab:
        raise UsageError(
            f"{where}: it has a vocabulary of {base.n_vocab:,} tokens, expected the model's, {n_vocab:,}. The file is of another model: "
            f"make one with `quantscope kld-base`."
        )
    assert text.as_given is not None
    ours = text.as_given.numpy()
    if n_chunk > base.n_chunk:
        raise UsageError(f"{where}: it has {count(base.n_chunk, 'chunk')}, expected {n_chunk:,}, as --chunks says. Leave --chunks out.")
    theirs = base.tokens[: len(ours)]
    differs = ours != theirs
    differs[:, 0] &= not add_bos
    if differs.any():
        chunk, position = (int(i) for i in np.argwhere(differs)[0])
        raise UsageError(
            f"{where}: in chunk {chunk}, position {position} it has token {int(theirs[chunk, position])}, expected "
            f"{int(ours[chunk, position])}, which the text has there. It was made from another text or with another tokenizer: give "
            f"the text it was made from with `--text FILE`, or make it again with `quantscope kld-base`."
        )
    if len(ours) < n_chunk:
        raise UsageError(
            f"{where}: it has {count(n_chunk, 'chunk')}, the text {len(ours):,}, expected as many. The text is only the beginning of the "
            f"one that the file was made from: give that one, or `--chunks {len(ours)}`."
        )


# ---- Writing -------------------------------------------------------------------------------------------------------------


def encode_rows(logits: NDArray[np.float32]) -> NDArray[np.void]:
    """Rows of the file: float32 [n,V] → [n] of ``row_type``, in llama-perplexity's order of operations.

    Every operation is float32 but the sum, as there; eˣ is rounded to float32 from float64, where the C library may differ in the last bit.
    Raises NonFiniteError for NaN and +∞.
    """
    x = np.asarray(logits, np.float32)
    largest = x.max(-1)
    if not np.isfinite(largest).all():
        raise NonFiniteError(
            f"logits at {count(int((~np.isfinite(largest)).sum()), 'position')} of {len(x)} are NaN or infinite, expected numbers: of them "
            f"there is no distribution. Look for the cause with `quantscope study MODEL --prompt TEXT`."
        )
    low = np.maximum(x.min(-1), largest - REACH)
    total = np.exp((x - largest[:, None]).astype(np.float64)).astype(np.float32).sum(-1, dtype=np.float64)
    out = np.zeros(len(x), row_type(x.shape[-1]))
    out["scale"] = scale = (largest - low) / STEPS
    out["lowest"] = low - largest - np.log(total).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))[:, None]
        codes = np.rint(inverse * (x - low[:, None]))
    out["codes"][:, : x.shape[-1]] = np.where(x > low[:, None], codes, 0)
    return out


class _RowWriter:
    """An Observer that writes the rows of one batch; holds the logits of as many positions as the head computes at a time."""

    taps: Collection[str] = ()

    def __init__(self, out: BinaryIO, n_vocab: int, positions_per_chunk: int) -> None:
        self.out, self.n_vocab, self.per_chunk = out, n_vocab, positions_per_chunk
        self.logits_so_far = np.empty((0, n_vocab), np.float32)

    def tap(self, member: int, name: str, ref: Tensor | None, x: Tensor, chunk: int) -> None:
        """No tap is wanted."""

    def logits(self, start: int, first_id: int, members: Sequence[Tensor]) -> None:
        x = members[0].float().cpu().numpy()
        if first_id == 0:
            self.logits_so_far = np.empty((len(x), self.n_vocab), np.float32)
        self.logits_so_far[:, first_id : first_id + x.shape[1]] = x
        if first_id + x.shape[1] == self.n_vocab:
            scored = (start + np.arange(len(x))) % self.per_chunk < self.per_chunk - 1  # the last of a chunk has no token after it
            self.out.write(encode_rows(self.logits_so_far[scored]).tobytes())


@dataclass(frozen=True)
class BaseJob:
    """A base before it is computed."""

    member: Member
    text: Input
    plan: PlanInfo

    @property
    def n_steps(self) -> int:
        """Per batch: the embedding, the layers, the head."""
        return self.member.weights.config.n_layer + 2

    @property
    def size(self) -> int:
        n_chunk, n_ctx = self.text.ids.shape
        return file_size(n_ctx, self.member.weights.config.n_vocab, n_chunk)


def prepare_base(options: StudyOptions) -> BaseJob:
    """Open, tokenize and plan; raises QuantscopeErrors for a model, text and options that cannot be used."""
    lineup = line_up(options)
    text = read_inputs(options, lineup.first.source, lineup.first.config).text
    if text is None:
        raise UsageError("no text given, expected one to compute the base on: `quantscope kld-base MODEL --text FILE -o BASE`.")
    plan = lineup_plan(lineup, text.ids, text.last - text.first, options)
    whole_rows = max(1, LOGIT_BYTES // (32 * lineup.first.config.n_vocab))  # float32, and what encoding makes of it
    return BaseJob(lineup.members[0], text, replace(plan, positions_per_slice=min(plan.positions_per_slice, whole_rows)))


def write_base(path: Path, job: BaseJob, step: Callable[[int], None] = lambda n: None) -> None:
    """Run the model over the text and write the file, which is complete or absent.

    step: called with the number of steps done, n_steps for each of the plan's batches.
    Raises UsageError when there is no room for it or the disk does not allow it.
    """
    n_chunk, n_ctx = job.text.ids.shape
    n_vocab = job.member.weights.config.n_vocab
    check_room(path, job.size)
    assert job.text.as_given is not None
    with written(path, partial(_failed, path)) as out:
        out.write(HEADER.pack(MAGIC, n_ctx, n_vocab, n_chunk))
        out.write(job.text.as_given.numpy().astype("<i4").tobytes())
        for b in range(job.plan.n_batches):
            ids = job.text.ids[b * job.plan.chunks_per_batch : (b + 1) * job.plan.chunks_per_batch]
            writer = _RowWriter(out, n_vocab, n_ctx - job.text.first)
            done = b * job.n_steps
            walk(
                ids,
                [job.member],
                writer,
                has_reference=False,
                slices=slices(job.plan),
                first=job.text.first,
                step=lambda n, done=done: step(done + n),  # type: ignore[misc]
            )


def check_room(path: Path, n_bytes: int) -> None:
    """UsageError when the folder does not exist or its disk has less than n_bytes."""
    folder = path.absolute().parent
    if not folder.is_dir() or path.is_dir():
        raise UsageError(f"-o {show(path)}: expected a file in a folder that exists. Give another `-o FILE`.")
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise UsageError(
            f"-o {show(path)}: the base takes {size(n_bytes)}, the disk has {size(free)} free. Give a `-o FILE` on another disk, fewer "
            f"`--chunks`, or compare without a file: `quantscope study MODEL --types ... --text FILE` keeps no logits."
        )


def _failed(path: Path, why: str) -> UsageError:
    return UsageError(f"-o {show(path)}: the base could not be written: {why}. Give another `-o FILE`, or fewer `--chunks`.")
