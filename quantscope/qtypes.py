"""One row per ggml tensor type: name, id, block size, bytes per block.

Source: ``enum ggml_type`` in ggml.h and the ``type_traits`` table in ggml.c; checked against the gguf package in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from quantscope.errors import BlockError, UnsupportedTypeError

KVType: TypeAlias = Literal["F16", "F32"]  # of a key/value cache that engines here have


@dataclass(frozen=True)
class QuantType:
    """A ggml tensor type: ``block_size`` elements are stored in ``type_size`` bytes."""

    name: str
    id: int
    block_size: int  # [elements]
    type_size: int  # [bytes]

    @property
    def bpw(self) -> float:
        """Bits per weight, 8 · type_size / block_size."""
        return 8 * self.type_size / self.block_size

    @property
    def is_quantized(self) -> bool:
        return self.block_size > 1

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of ``n`` elements; BlockError when the blocks do not fill it."""
        if n % self.block_size:
            raise BlockError(
                f"a row of {n} elements cannot be stored as {self.name}: expected a multiple of {self.block_size}, "
                f"{n % self.block_size} are left over. llama-quantize falls back to another type for such rows; "
                f"so do the presets here, e.g. `--types Q4_K_M`."
            )
        return n // self.block_size * self.type_size

    def __str__(self) -> str:
        return self.name


# fmt: off
_ROWS = (
    # name     id  block  bytes
    ("F32",      0,    1,     4),
    ("F16",      1,    1,     2),
    ("Q4_0",     2,   32,    18),
    ("Q4_1",     3,   32,    20),
    ("Q5_0",     6,   32,    22),
    ("Q5_1",     7,   32,    24),
    ("Q8_0",     8,   32,    34),
    ("Q8_1",     9,   32,    36),
    ("Q2_K",    10,  256,    84),
    ("Q3_K",    11,  256,   110),
    ("Q4_K",    12,  256,   144),
    ("Q5_K",    13,  256,   176),
    ("Q6_K",    14,  256,   210),
    ("Q8_K",    15,  256,   292),
    ("IQ2_XXS", 16,  256,    66),
    ("IQ2_XS",  17,  256,    74),
    ("IQ3_XXS", 18,  256,    98),
    ("IQ1_S",   19,  256,    50),
    ("IQ4_NL",  20,   32,    18),
    ("IQ3_S",   21,  256,   110),
    ("IQ2_S",   22,  256,    82),
    ("IQ4_XS",  23,  256,   136),
    ("I8",      24,    1,     1),
    ("I16",     25,    1,     2),
    ("I32",     26,    1,     4),
    ("I64",     27,    1,     8),
    ("F64",     28,    1,     8),
    ("IQ1_M",   29,  256,    56),
    ("BF16",    30,    1,     2),
    ("TQ1_0",   34,  256,    54),
    ("TQ2_0",   35,  256,    66),
    ("MXFP4",   39,   32,    17),
    ("NVFP4",   40,   64,    36),
    ("Q1_0",    41,  128,    18),
    ("Q2_0",    42,   64,    18),
)
# fmt: on

QTYPES: dict[str, QuantType] = {row[0]: QuantType(*row) for row in _ROWS}
BY_ID: dict[int, QuantType] = {t.id: t for t in QTYPES.values()}


def qtype(name: str) -> QuantType:
    """The type of this name (any case); UnsupportedTypeError with the list of names otherwise."""
    try:
        return QTYPES[name.upper()]
    except KeyError:
        raise UnsupportedTypeError(f"unknown tensor type {name!r}: expected one of {', '.join(QTYPES)}.") from None
