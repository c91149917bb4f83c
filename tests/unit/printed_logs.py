"""What llama.cpp's debug callback prints, written again from its rules (common/debug.cpp), for made-up tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

NEW = {"func": "common_debug_cb_eval", "indent": "    ", "step": "    ", "more": "   ..., ", "end": "  ],\n"}
OLD = {"func": "ggml_debug", "indent": " " * 37, "step": " ", "more": "..., ", "end": "],\n"}


def kept(n: int, shown: int = 3) -> list[int | None]:
    """The printed places along a dimension, None for the mark."""
    return [*range(n)] if n <= 2 * shown else [*range(shown), None, *range(n - shown, n)]


def body(x: np.ndarray, style: dict[str, str] = NEW, sum_of_printed: bool = False) -> str:
    """x: float32 [ne2,ne1,ne0]."""
    pad, step = style["indent"], style["step"]
    out, printed = f"{pad}[\n", np.float32(0)
    for block in kept(x.shape[0]):
        if block is None:
            out += f"{pad}{step}..., \n"
            continue
        out += f"{pad}{step}[\n"
        for row in kept(x.shape[1]):
            if row is None:
                out += f"{pad}{step}{step}..., \n"
                continue
            out += f"{pad}{step}{step}["
            for cell in kept(x.shape[2]):
                if cell is None:
                    out += style["more"]
                else:
                    value = x[block, row, cell]
                    printed += value
                    out += f"{value:12.4f}" + (", " if cell < x.shape[2] - 1 else "")
            out += style["end"]
        out += f"{pad}{step}],\n"
    total = printed if sum_of_printed else x.astype(np.float32).sum()
    return out + f"{pad}]\n{pad}sum = {total:f}\n"


def node(name: str, op: str, x: np.ndarray, style: dict[str, str] = NEW, sum_of_printed: bool = False) -> str:
    """One node with its values, x: [ne2,ne1,ne0]."""
    ne = ", ".join(map(str, (*x.shape[::-1], 1)))
    return f"{style['func']}: {name:>24} = (f32) {op:>10}(a{{{ne}}}, b{{1, 1, 1, 1}}}}) = {{{ne}}}\n" + body(x, style, sum_of_printed)


def ids_lines(ids: Iterable[int]) -> str:
    ids = list(ids)
    return f"number of input tokens = {len(ids)}\n" + "".join(f"  {i}\n" for i in ids)
