"""CorDA: LoRA started from a decomposition of the weight that knows its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from luthier.adapt._shared import MovedBase, calibration_rows, side_sizes, target_layers
from luthier.catalog import register
from luthier.core.collect import collect
from luthier.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

TOLERANCE = 0.05
"""Largest ||C' C'^-1 - I||_F that the inverse may have."""


@torch.no_grad()
def decompose(weight: Tensor, context: Tensor | None = None, damp: float = 0.01) -> tuple[Tensor, Tensor, Tensor, float]:
    """U, S, V^ with weight = U diag(S) V^: the SVD of weight @ C', multiplied back by C'^-1. In fp64.

    `context`: the input covariance C [in, in], damped to C' = C + damp * mean(diag C) I, the damping doubled until the inverse is
    good; or [in] scales of the inputs (ASVD); or None, the plain SVD. Returns the damping that was used as well."""
    w = weight.double()
    if context is None:
        return (*torch.linalg.svd(w, full_matrices=False), 0.0)
    c = context.double()
    if c.ndim == 1:
        scales = c + 1e-6
        u, s, vh = torch.linalg.svd(w * scales, full_matrices=False)
        return u, s, vh / scales, 0.0
    eye = torch.eye(len(c), dtype=c.dtype, device=c.device)
    if not float(c.diagonal().mean()) > 0:
        c = eye  # no input was seen: nothing to orient by
    while True:
        fixed = c + damp * c.diagonal().mean() * eye
        inverse = torch.linalg.inv(fixed)
        if float(torch.dist(fixed @ inverse, eye)) < TOLERANCE:
            break
        damp *= 2
    u, s, vh = torch.linalg.svd(w @ fixed, full_matrices=False)
    return u, s, torch.linalg.solve(fixed, vh.T).T, damp


@torch.no_grad()
def corda(
    weight: Tensor, covariance: Tensor | None, rank: int, mode: str = "kpm", damp: float = 0.01
) -> tuple[Tensor, Tensor, Tensor, float]:
    """(residual, B, A, damp) with residual + B @ A = weight: B = U_r sqrt(S_r), A = sqrt(S_r) V^_r.

    kpm takes the r smallest components (of the context that is to be kept), ipm the r largest (of the task's)."""
    u, s, vh, damp = decompose(weight, covariance, damp)
    u, s, vh = _chosen(u, s, vh, rank, mode)
    b, a = u * s.sqrt(), s.sqrt()[:, None] * vh
    dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
    return (weight.double() - b @ a).to(dtype), b.to(dtype), a.to(dtype), damp


def _chosen(u: Tensor, s: Tensor, vh: Tensor, rank: int, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    return (u[:, :rank], s[:rank], vh[:rank]) if mode == "ipm" else (u[:, -rank:], s[-rank:], vh[-rank:])


@torch.no_grad()
def discard(weight: Tensor, context: Tensor | None, number: int, damp: float = 0.01) -> Tensor:
    """The weight without its `number` smallest components: the probe of which orientation keeps what a context needs."""
    u, s, vh, _ = decompose(weight, context, damp)
    kept = len(s) - number
    return (u[:, :kept] * s[:kept] @ vh[:kept]).to(weight.dtype)


@register("corda", paper=52, wraps="peft.LoraConfig")
@dataclass
class CorDA(MovedBase):
    """Multiply each weight by the covariance of its inputs on sample texts before the SVD, so that the leading components carry
    what those texts use; train the trailing ones to keep that knowledge, or the leading ones to learn that task fast.

    C = mean over sequences of X^T X, X scaled by its largest |entry|, padding left out; C' = C + damp mean(diag C) I, damping
    doubled until the inverse is good (what was used is reported). U S V^T = svd(W C'), V^T <- V^T C'^-1.
    B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T with r the smallest (`kpm`: the rows are knowledge to keep) or largest (`ipm`: the rows
    are the task); the residual is frozen, scale 1. Needs rows: the stream `calibration`, else the training rows (right for ipm only).

    peft does the wrapping; the covariance and the inverse are ours: fp32 sums without padding and fp64 inverses. The release divides
    by |max(X)| over signed values (`scale: max`); max |X| is the default. `orientation: asvd` scales columns by mean |x|^alpha
    instead, `none` is PiSSA (ipm) and MiLoRA (kpm). Exported as a plain LoRA of rank 2 r on the original weights."""

    rank: int = 128
    """Rank; at most the smallest side of the targeted layers."""
    mode: Literal["kpm", "ipm"] = "kpm"
    """Keep what the calibration rows need, or learn them."""
    samples: int = 256
    """Calibration rows."""
    damp: float = 0.01
    """First damping of the covariance."""
    scale: Literal["abs_max", "max", "none"] = "abs_max"
    """What each sequence's inputs are divided by."""
    orientation: Literal["covariance", "asvd", "none"] = "covariance"
    """What the decomposition knows of the inputs."""
    asvd_alpha: float = 1.0
    """Exponent of the input scales for `asvd`."""

    families = frozenset({"causal-lm", "text-encoder", "image-classifier", "dual-encoder"})
    positive = ("rank", "alpha", "samples", "damp")
    toy = {"rank": 4, "samples": 8}

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft.tuners.lora.config import CordaConfig

        return self.lora(model, init_lora_weights="corda", corda_config=CordaConfig(corda_method=self.mode))

    def before(self, model: Family, config: Any, ctx: Context | None) -> None:
        chosen = target_layers(model.network, self.targets, self.whole(model))
        small = min((min(side_sizes(m)) for m in chosen.values()), default=0)
        if self.rank > small:
            raise RecipeError(f"'rank' is {self.rank}, but the smallest side of the targeted layers is {small}; lower it or name wider layers.")
        contexts = self.contexts(model, chosen, ctx)
        self.report = {}
        layer: Any
        for name, layer in chosen.items():
            weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.weight.T
            u, s, vh, self.report[name] = decompose(weight, contexts.get(name), self.damp)
            u, s, vh = (x.float().contiguous() for x in _chosen(u, s, vh, self.rank, self.mode))
            layer.eigens = SimpleNamespace(S_WC=s, U_WC=u, V_WC=vh.T.contiguous())  # what peft's corda_init reads and removes
        top = max(self.report.values(), default=0.0)
        if ctx is not None and top > self.damp:
            ctx.notice(f"CorDA raised its damping to {top:g}: the calibration rows hardly span some layer's inputs. More rows orient it better.")

    def contexts(self, model: Family, layers: dict[str, Any], ctx: Context | None) -> dict[str, Tensor]:
        """What each layer's decomposition is told of its inputs."""
        if self.orientation == "none":
            return {}
        rows = calibration_rows(ctx, self.samples, self.name)
        if self.orientation == "asvd":
            found = collect(model, rows, {"abs_mean"}, layers)
            made = {n: one["abs_mean"] ** self.asvd_alpha for n, one in found.items()}
        else:
            found = collect(model, rows, {"second_moment"}, layers, scale=self.scale)
            made = {n: one["second_moment"] / one["sequences"] for n, one in found.items()}
        missing = [n for n in layers if n not in made]
        if missing:
            raise ModelError(f"The layer '{missing[0]}' received nothing from the calibration rows; leave it out of `targets`.")
        return made
