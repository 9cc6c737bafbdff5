"""Linear algebra that several methods share, in fp32 or better, and the front door to sources and sparse updates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luthier.core.source import TensorSource, applied, compatible, delta
from luthier.core.sparse import Cut, SparseDelta, UpdateFilter, band_mask, cut, top_k

__all__ = [
    "Cut", "SparseDelta", "TensorSource", "UpdateFilter", "applied", "band_mask", "basis", "compatible", "cut", "delta",
    "effective_rank", "fwht", "kron_linear", "procrustes", "projector", "sketch", "svd", "top_k",
]  # fmt: skip


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def svd(matrix: Tensor, k: int | None = None, exact: bool | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], S [k], Vt [k, n] of the k largest singular values (default: all), in fp32 or better.

    Signs are fixed: the largest loading of every left vector is positive. Vectors of near-equal singular values rotate freely, so
    compare subspaces. Exact unless the matrix is large and k an eighth of its size at most; then a seeded randomised range finder
    with 10 extra directions and 4 power iterations."""
    w = _precise(matrix.detach())
    size = min(w.shape)
    k = size if k is None else min(k, size)
    if exact is None:
        exact = size <= 1024 or k > size // 8
    if exact:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
    else:
        u, s, vt = _randomised(w, min(size, k + 10), seed)
    u, s, vt = u[:, :k], s[:k], vt[:k]
    if k:
        signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        signs[signs == 0] = 1
        u, vt = u * signs, vt * signs.T
    return u.contiguous(), s.contiguous(), vt.contiguous()


def _randomised(w: Tensor, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    start = torch.randn(w.shape[1], k, generator=torch.Generator().manual_seed(seed), dtype=w.dtype).to(w.device)
    q = torch.linalg.qr(w @ start).Q
    for _ in range(4):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q).Q).Q
    u, s, vt = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u, s, vt


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the normalised singular values. `x`: a matrix, or its singular values."""
    values = _precise(x.detach()) if x.ndim == 1 else torch.linalg.svdvals(_precise(x.detach()))
    total = values.sum()
    if values.numel() == 0 or float(total) == 0.0:
        return 0.0
    p = values.double() / total.double()
    return float(torch.special.entr(p).sum().exp())


def basis(rows: Tensor, keep: int | float | None = None, center: bool = False) -> Tensor:
    """An orthonormal basis [d, r] of the rows' main directions.

    `keep`: how many (int), the share of the squared singular values they must hold (float), or every non-zero one (None). With
    `center` the rows' mean is taken out first."""
    x = _precise(rows.detach()).reshape(-1, rows.shape[-1])
    if center:
        x = x - x.mean(0)
    _, s, vt = torch.linalg.svd(x, full_matrices=False)
    nonzero = int((s > s.max() * max(x.shape) * torch.finfo(s.dtype).eps).sum()) if s.numel() and float(s.max()) > 0 else 0
    if keep is None:
        r = nonzero
    elif isinstance(keep, float):
        energy = (s.double() ** 2).cumsum(0)
        r = int((energy < keep * energy[-1] * (1 - 1e-12)).sum()) + 1 if nonzero else 0
    else:
        r = keep
    return vt[: min(r, nonzero)].T.contiguous()


def projector(rows: Tensor, keep: int | float | None = None, alpha: float = 1.0, center: bool = False) -> Tensor:
    """I - alpha V V^T: takes the rows' main directions away (alpha 1: wholly). See `basis` for `keep` and `center`."""
    v = basis(rows, keep, center)
    if v.shape[1] >= v.shape[0] and alpha == 1.0:
        raise ValueError(f"These rows span all {v.shape[0]} dimensions, so nothing would be left; keep fewer directions.")
    return torch.eye(v.shape[0], dtype=v.dtype, device=v.device) - alpha * (v @ v.T)


def procrustes(a: Tensor, b: Tensor, rotation: bool = False) -> Tensor:
    """The orthogonal R that minimises ||a R - b||; with `rotation` its determinant is 1 (Kabsch)."""
    u, _, vt = torch.linalg.svd(_precise(a.detach()).T @ _precise(b.detach()))
    if rotation and float(torch.linalg.det(u @ vt)) < 0:
        u = torch.cat([u[:, :-1], -u[:, -1:]], 1)
    return u @ vt


def fwht(x: Tensor, normalise: bool = False) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension (a power of two), in O(n log n); its own transpose.

    Normalised it is orthogonal and its own inverse."""
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"A Hadamard transform needs a power of two, not {n}.")
    y, half = x.reshape(-1, n), 1
    while half < n:
        pairs = y.reshape(-1, n // (2 * half), 2, half)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).reshape(-1, n)
        half *= 2
    y = y.reshape(x.shape)
    return y / math.sqrt(n) if normalise else y


def sketch(x: Tensor, r: int, seed: int) -> Tensor:
    """A random projection of the last dimension to r numbers that keeps squared lengths on average.

    A subsampled randomised Hadamard transform: random signs, the transform of the zero-padded vector, r of its entries, scaled. The
    same size and seed give the same projection. For a matrix's other side sketch its transpose."""
    n = x.shape[-1]
    padded = 1 << max(0, n - 1).bit_length()
    if not 1 <= r <= padded:
        raise ValueError(f"A vector of {n} numbers can be sketched to 1..{padded} numbers, not {r}.")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator).to(x.device) * 2 - 1
    chosen = torch.randperm(padded, generator=generator)[:r].to(x.device)
    y = torch.nn.functional.pad(_precise(x) * signs, (0, padded - n))
    return fwht(y)[..., chosen] / math.sqrt(r)


def kron_linear(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """(a kron b) x for the last dimension of x, without forming the product."""
    shaped = x.reshape(*x.shape[:-1], a.shape[1], b.shape[1])
    return (a @ shaped @ b.T).reshape(*x.shape[:-1], a.shape[0] * b.shape[0])
