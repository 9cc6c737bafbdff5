"""Fewer bits: uniform grids with a straight-through gradient, vector codebooks, random Hadamard rotations, and packing codes into bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.core.linalg import fwht
from luthier.core.neighbours import kmeans

CHUNK = 1 << 24
"""How many distances between groups and codes are held at once."""


# uniform grids --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Grid:
    """An asymmetric uniform grid of 2^bits values a group, the groups along the last dimension:

    scale = clip (max - min) / (2^bits - 1), zero = floor(-min / scale), Q(x) = scale (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero)."""

    scale: Tensor
    zero: Tensor
    bits: int

    @classmethod
    def of(cls, x: Tensor, bits: int, clip: float = 1.0) -> Grid:
        """The grid of every last-dimension group of `x`. A group of one value keeps that value."""
        x = x.detach()
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = clip * (high - low) / (2**bits - 1)
        one = torch.where(high == 0, torch.ones_like(high), high.abs())
        scale = torch.where(scale > 0, scale, one)
        return cls(scale, torch.floor(-low / scale), bits)

    def codes(self, x: Tensor) -> Tensor:
        """Integers in [0, 2^bits - 1], in the type of `x`."""
        return (torch.round(x / self.scale) + self.zero).clamp(0, 2**self.bits - 1)

    def values(self, codes: Tensor) -> Tensor:
        return self.scale * (codes - self.zero)

    def __call__(self, x: Tensor) -> Tensor:
        return self.values(self.codes(x))


class _Straight(torch.autograd.Function):
    """The second tensor forward, the first one's gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value` exactly, with the gradient passed to `x` as if it were `x`."""
    return _Straight.apply(x, value.detach())  # type: ignore[no-untyped-call]


def fake_quant(x: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """`x` rounded to its own grid along the last dimension; the gradient passes as if nothing had been rounded or clipped."""
    with torch.no_grad():
        value = Grid.of(x, bits, clip)(x)
    return straight_through(x, value)


def rounding_error(x: Tensor, bits: int, clip: float = 1.0) -> float:
    """||Q(x) - x||^2 over all groups."""
    x = x.detach()
    return float((Grid.of(x, bits, clip)(x) - x).double().square().sum())


# rotations ------------------------------------------------------------------------------------------------------------------
class Rotation(nn.Module):
    """A random orthogonal map of the last dimension: x R with R = (M kron H) diag(signs), by a Walsh-Hadamard transform.

    H is the largest Hadamard matrix of a power of two that divides the size; an odd rest is mixed by a random orthogonal M. The same
    size and seed give the same map. Blocks of `size` lie side by side where the last dimension is a multiple of it (heads)."""

    signs: Tensor
    mix: Tensor | None

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.size, self.power = size, size & -size
        rest = size // self.power
        self.register_buffer("signs", (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).float(), persistent=False)
        mix = torch.linalg.qr(torch.randn(rest, rest, generator=generator, dtype=torch.float64)).Q.float() if rest > 1 else None
        self.register_buffer("mix", mix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x R."""
        y = self._hadamard(x, self.mix)
        return (y * self.signs.to(y)).reshape(x.shape)

    def back(self, y: Tensor) -> Tensor:
        """y R^T."""
        blocks = y.reshape(*y.shape[:-1], -1, self.size) * self.signs.to(y)
        return self._hadamard(blocks, None if self.mix is None else self.mix.T).reshape(y.shape)

    def _hadamard(self, x: Tensor, mix: Tensor | None) -> Tensor:
        """[..., blocks, size]; M and H act on different factors, so their order does not matter."""
        blocks = x.reshape(*x.shape[:-1], -1, self.size) if x.shape[-1] != self.size or x.ndim == 1 else x[..., None, :]
        y = fwht(blocks.reshape(*blocks.shape[:-1], -1, self.power), normalise=True)
        return (y if mix is None else mix.T.to(y) @ y).reshape(blocks.shape)


# codebooks ------------------------------------------------------------------------------------------------------------------
class VectorQuant(nn.Module):
    """A matrix [out, in] as codes: every `group` inputs of an output are its scale times the sum of one vector of each codebook,

    w[o, g] = scale[o] sum_c codebook[c, code[c, o, g]]. Codes are a buffer; codebooks and scales are parameters."""

    codes: Tensor

    def __init__(self, codebooks: Tensor, scales: Tensor, codes: Tensor) -> None:
        super().__init__()
        self.codebooks, self.scales = nn.Parameter(codebooks), nn.Parameter(scales)
        """[C, K, group] and [out, 1]."""
        self.register_buffer("codes", codes.to(torch.int32))
        """[C, out * in / group]."""

    @classmethod
    @torch.no_grad()
    def fit(cls, weight: Tensor, group: int, size: int, count: int = 1, seed: int = 0, iterations: int = 30) -> VectorQuant:
        """k-means of the rows' groups over the rows' root mean squares; each further codebook is of what the ones before leave."""
        w = weight.detach().float().cpu()
        if w.shape[1] % group:
            raise ValueError(f"{w.shape[1]} inputs are no multiple of a group of {group}.")
        scales = w.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
        rest = (w / scales).reshape(-1, group)
        books, codes = [], []
        for c in range(count):
            labels, centres = kmeans(rest.numpy(), size, seed=seed + c, restarts=1, iterations=iterations)
            books.append(torch.nan_to_num(torch.from_numpy(np.asarray(centres, np.float32))))
            codes.append(torch.from_numpy(np.asarray(labels, np.int64)))
            rest = rest - books[-1][codes[-1]]
        made = cls(torch.stack(books), scales, torch.stack(codes))
        if count > 1:
            made.recode(w, torch.arange(len(rest)), beam=4)
        return made.to(weight.device)

    @property
    def group(self) -> int:
        return self.codebooks.shape[2]

    @property
    def groups(self) -> int:
        return self.codes.shape[1]

    def units(self) -> Tensor:
        """The groups before scaling, [groups, group]."""
        return torch.stack([nn.functional.embedding(code, book) for code, book in zip(self.codes, self.codebooks)]).sum(0)

    def forward(self) -> Tensor:
        """The matrix."""
        return self.units().reshape(len(self.scales), -1) * self.scales

    def chain(self, grad: Tensor) -> None:
        """Set the gradients of codebooks and scales, where they train, from the gradient of the matrix: sums over all users of a code."""
        wanted = [p for p in (self.codebooks, self.scales) if p.requires_grad]
        if not wanted:
            return
        with torch.enable_grad():
            matrix = self()
            found = torch.autograd.grad(matrix, wanted, grad.to(matrix))
        for param, own in zip(wanted, found):
            param.grad = own

    @torch.no_grad()
    def recode(self, wanted: Tensor, chosen: Tensor, beam: int = 1, force: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Give the groups `chosen` (indices) the codes nearest to the matrix `wanted`, with the values held; which of them changed.

        Distances are measured before scaling, where a row's groups compare as they do after it. One codebook: the exact nearest code.
        Several: beam search from the present codes, so the error never rises. `force`: the best codes that differ from the present ones. With a `generator` codebooks are searched in an order of its."""
        target = (wanted.to(self.scales) / self.scales).reshape(-1, self.group)[chosen]
        now = self.codes[:, chosen].T.long()
        step = max(1, CHUNK // (self.codebooks.shape[1] * max(1, beam)))
        count = len(self.codebooks)
        order = list(range(count)) if generator is None else torch.randperm(count, generator=generator).tolist()
        found = torch.cat([self._search(t, n, beam, force, order) for t, n in zip(target.split(step), now.split(step))]) if len(chosen) else now
        changed = (found != now).any(1)
        self.codes[:, chosen] = found.T.to(self.codes)
        return changed

    def _search(self, target: Tensor, start: Tensor, beam: int, force: bool, order: list[int]) -> Tensor:
        """[groups, C] codes: each codebook's code is chosen anew given the others', the best `beam` combinations going on."""
        books, beams = self.codebooks, start[:, None]
        for c in order:
            others = sum((books[o][beams[..., o]] for o in range(len(books)) if o != c), torch.zeros_like(target)[:, None])
            residual = target[:, None] - others
            cost = (residual[..., None, :] - books[c]).square().sum(-1) if books[c].numel() < 4096 else _squares(residual, books[c])
            size, last = cost.shape[-1], c == order[-1]
            best = cost.flatten(1).topk(min(max(beam, 2 if force and last else 1), cost[0].numel()), largest=False).indices
            beams = beams.gather(1, (best // size)[..., None].expand(-1, -1, len(books))).clone()
            beams[..., c] = best % size
        if not force or beams.shape[1] < 2:
            return beams[:, 0]
        same = (beams[:, 0] == start).all(1, keepdim=True)
        return torch.where(same, beams[:, 1], beams[:, 0])

    def bits(self, value_bits: int = 16) -> int:
        """Stored bits: codes at ceil(log2 K) each; codebooks and scales at `value_bits` a number."""
        return self.codes.numel() * code_bits(self.codebooks.shape[1]) + (self.codebooks.numel() + self.scales.numel()) * value_bits


def _squares(x: Tensor, book: Tensor) -> Tensor:
    """Squared distances by the product, which needs no [groups, codes, group] tensor."""
    return (x.square().sum(-1, keepdim=True) - 2 * x @ book.T + book.square().sum(-1)).clamp_min(0)


# bytes ----------------------------------------------------------------------------------------------------------------------
def code_bits(size: int) -> int:
    """Bits that tell `size` codes apart."""
    return max(1, math.ceil(math.log2(size)))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Integers in [0, 2^bits) as bytes, `bits` each, highest bit first."""
    flat = codes.detach().cpu().reshape(-1).to(torch.int64).numpy()
    spread = (flat[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return torch.from_numpy(np.packbits(spread.astype(np.uint8)))


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` integers that `pack_codes` was given."""
    raw = packed.cpu().numpy()
    if len(raw) * 8 < count * bits:
        raise ValueError("The packed codes are cut short.")
    spread = np.unpackbits(raw, count=count * bits).reshape(count, bits).astype(np.int64)
    return torch.from_numpy(spread @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64)))
