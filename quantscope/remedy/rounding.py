"""Rounding that looks at the output of a product: the codes of a block type chosen for Σ‖X·(W − Ŵ)ᵀ‖², not for ‖W − Ŵ‖².

    E(Ŵ) = Σᵢ rᵢᵀ H rᵢ,   r = W − Ŵ row by row,   H = Σ x·xᵀ over the inputs x of the product

``error_feedback``: columns from left to right; each is rounded, and the columns to its right take over what that did to the output:
W[:, j+1:] −= (w_j − ŵ_j)/U_jj · U[j, j+1:], U the upper Cholesky factor of (H + λ·mean(diag H)·I)⁻¹.  The scales of a super-block are
fitted, weighted with diag H, to the already compensated weights when its first column is reached.  ``descended``: code by code to the
best value with all others fixed; ``rescaled``: the float16 scales of each block likewise, codes and integer scales fixed.  Both can only
lower E.  Format and size are those of the type.

Sources: GPTQ (Frantar et al. 2022, arXiv:2210.17323); coordinate descent: QuantEase (Behdin et al. 2023, arXiv:2309.01885).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantscope.qtypes import QuantType
from quantscope.quants import decode, encode
from quantscope.quants.codes import Bytes, codes, grid, layout_of, with_codes

DAMPING = 0.01  # λ: of the mean of diag H
SUPER = 256  # [columns] whose scales are fitted together: a super-block, or eight blocks of 32
STEP = 64  # [columns] whose updates are held back and applied as one product
SWEEPS = 2  # of the descent: a third one gains under a percent


def error_feedback(w: Tensor, gram: Tensor, qtype: QuantType) -> Bytes:
    """The bytes of w in this type, [out,in] float32 and gram [in,in] float64 → uint8.

    Raises what ``encode`` raises.  A gram that has no inverse (dead or too few inputs) is damped until it has one.
    """
    n_out, n_in = w.shape
    layout, width = layout_of(qtype), SUPER if n_in % SUPER == 0 else layout_of(qtype).block
    left, factor = w.double().clone(), _factor(gram)  # [out,in], [in,in] upper
    importance = gram.diagonal().float().numpy()
    blocks = np.empty((n_out, n_in // width, qtype.row_bytes(width)), np.uint8)
    for a in range(0, n_in, width):
        part = slice(a, a + width)
        raw = encode(left[:, part].float().contiguous().numpy(), qtype, width, importance=np.ascontiguousarray(importance[part]))
        new = _swept(left, factor, raw, qtype, a, width)
        blocks[:, a // width] = with_codes(raw, new.reshape(-1, layout.block), qtype).reshape(n_out, -1)
    return blocks.reshape(-1)


def _swept(left: Tensor, factor: Tensor, raw: Bytes, qtype: QuantType, a: int, width: int) -> Bytes:
    """The codes of the columns a … a + width − 1, the columns to their right compensated in place.  uint8 [out,width]."""
    top = layout_of(qtype).top
    step, offset = (torch.from_numpy(g).reshape(len(left), width) for g in grid(raw, qtype))
    chosen = torch.empty(len(left), width, dtype=torch.uint8)
    for b in range(a, a + width, STEP):
        end = min(b + STEP, a + width)
        errors = torch.empty(len(left), end - b, dtype=torch.float64)
        for j in range(b, end):
            s, o = step[:, j - a], offset[:, j - a]
            code = _nearest(left[:, j], s, o, top)
            chosen[:, j - a] = code.to(torch.uint8)
            error = (left[:, j] - (o + s * code)) / factor[j, j]
            left[:, j + 1 : end] -= error[:, None] * factor[j, j + 1 : end]
            errors[:, j - b] = error
        left[:, end:] -= errors @ factor[b:end, end:]
    return chosen.numpy()


def _nearest(x: Tensor, step: Tensor, offset: Tensor, top: int) -> Tensor:
    """The code whose value is nearest to x; 0 where a step of 0 makes all values alike."""
    flat = step == 0
    return ((x - offset) / torch.where(flat, 1.0, step)).round().clamp(0, top).masked_fill(flat, 0)


def _factor(gram: Tensor) -> Tensor:
    """U with (H + λ·mean(diag H)·I)⁻¹ = UᵀU, upper; λ is raised tenfold until the matrix is positive definite."""
    h = gram / gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    damping = DAMPING
    while True:
        lower, failed = torch.linalg.cholesky_ex(h + damping * torch.eye(len(h), dtype=h.dtype))
        if not failed:
            factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
            return factor
        damping *= 10


def descended(w: Tensor, raw: Bytes, gram: Tensor, qtype: QuantType, sweeps: int = SWEEPS) -> Bytes:
    """The same blocks with codes that are each the best with all others fixed: E never rises."""
    n_out, n_in = w.shape
    layout = layout_of(qtype)
    step, offset = (torch.from_numpy(g).reshape(n_out, n_in) for g in grid(raw, qtype))
    code = torch.from_numpy(codes(raw, qtype).astype(np.float64)).reshape(n_out, n_in)
    slope = (w.double() - (offset + step * code)) @ gram  # −½ ∂E/∂Ŵ
    curvature = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
    for _ in range(sweeps):
        for b in range(0, n_in, STEP):
            end = min(b + STEP, n_in)
            moved = torch.zeros(n_out, end - b, dtype=torch.float64)
            for j in range(b, end):
                value = offset[:, j] + step[:, j] * code[:, j]
                new = _nearest(value + slope[:, j] / curvature[j], step[:, j], offset[:, j], layout.top)
                moved[:, j - b] = step[:, j] * (new - code[:, j])
                code[:, j] = new
                slope[:, b:end] -= moved[:, j - b, None] * gram[j, b:end]
            slope[:, :b] -= moved @ gram[b:end, :b]
            slope[:, end:] -= moved @ gram[b:end, end:]
    return with_codes(raw, code.to(torch.uint8).numpy().reshape(-1, layout.block), qtype)


# type → byte of the block at which its float16 scale is, and its float16 min where it has one
HALVES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def rescaled(w: Tensor, raw: Bytes, gram: Tensor, qtype: QuantType) -> Bytes:
    """The same blocks with float16 scales (and mins) that are each the best with all else fixed: E never rises.

    x = d·A + m·B is linear in a block's halves, so the step of block b is (δd, δm) = argmin ‖r − δd·A − δm·B‖²_H, rounded to float16 and
    taken only by the rows that it helps.
    """
    n_out, n_in = w.shape
    size = qtype.block_size
    blocks = raw.reshape(n_out, n_in // size, qtype.type_size).copy()
    bases = [_decoded_with(blocks, qtype, k).reshape(n_out, n_in) for k in range(len(HALVES[qtype.name]))]
    residual = w.double() - _decoded(blocks, qtype).reshape(n_out, n_in)
    slope = residual @ gram
    for b in range(n_in // size):
        part = slice(b * size, (b + 1) * size)
        a = torch.stack([base[:, part] for base in bases], dim=1)  # [out,K,block], K halves
        ha = a @ gram[part, part]
        normal, right = ha @ a.transpose(1, 2), (a @ slope[:, part, None])[..., 0]  # [out,K,K], [out,K]
        ridge = 1e-12 * normal.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp(min=1e-300)
        step = torch.linalg.solve(normal + torch.diag_embed(ridge.expand_as(right)), right)
        before = _halves(blocks[:, b], qtype)
        after = (before + step).half().double()
        moved = torch.where(after.isfinite().all(-1, keepdim=True), after - before, 0.0)
        gain = 2 * (moved * right).sum(-1) - (moved[:, None] @ normal @ moved[..., None])[:, 0, 0]
        moved = torch.where((gain > 0)[:, None], moved, 0.0)
        _set_halves(blocks[:, b], before + moved, qtype)
        slope -= (moved[:, None] @ a)[:, 0] @ gram[part]
    return blocks.reshape(-1)


def _decoded(blocks: Bytes, qtype: QuantType) -> Tensor:
    return torch.from_numpy(decode(np.ascontiguousarray(blocks).reshape(-1), qtype)).double()


def _decoded_with(blocks: Bytes, qtype: QuantType, k: int) -> Tensor:
    """What the blocks decode to with half k = 1 and the others 0."""
    plain = blocks.copy()
    for n, at in enumerate(HALVES[qtype.name]):
        plain[..., at : at + 2] = np.frombuffer(np.float16(n == k).tobytes(), np.uint8)
    return _decoded(plain, qtype)


def _halves(blocks: Bytes, qtype: QuantType) -> Tensor:
    """[out, bytes] → float64 [out,K]."""
    read = [np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16)[:, 0] for at in HALVES[qtype.name]]
    return torch.from_numpy(np.stack(read, axis=1).astype(np.float64))


def _set_halves(blocks: Bytes, values: Tensor, qtype: QuantType) -> None:
    for k, at in enumerate(HALVES[qtype.name]):
        blocks[:, at : at + 2] = values[:, k].numpy().astype(np.float16)[:, None].view(np.uint8)


def output_error(w: Tensor, raw: Bytes, gram: Tensor, qtype: QuantType) -> float:
    """E: the squared error of the product's outputs, summed over all inputs."""
    r = w.double() - torch.from_numpy(decode(raw, qtype)).reshape(w.shape).double()
    return float(((r @ gram) * r).sum())
