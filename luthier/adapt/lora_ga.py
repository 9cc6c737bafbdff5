"""LoRA-GA: LoRA started from the gradient of full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from luthier.adapt._shared import MovedBase, calibration_rows
from luthier.catalog import register
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("lora-ga", wraps="peft.tuners.lora.preprocess_loraga")
@dataclass
class LoraGa(MovedBase):
    """Start LoRA so that its first step moves the weight as full fine-tuning would: from the singular vectors of the full gradient.

    G = U S V^T of each weight's gradient on a few rows; A and B take alternate blocks of its leading 2 r vectors (`direction`),
    scaled for a stable output; base <- W - s B A (gradient approximation). Needs rows: `calibration`, else training rows."""

    alpha: float | None = 32.0
    """The update is scaled by alpha / rank."""
    samples: int = 32
    """Rows whose gradient is averaged."""
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    """Which singular vectors go to A and which to B."""
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """How the factors are scaled."""
    gamma: int = 16
    """Of the stable scale."""

    families = frozenset({"causal-lm", "text-encoder", "image-classifier"})
    positive = ("rank", "alpha", "samples", "gamma")
    toy = {"rank": 4, "samples": 8}

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft.tuners.lora import LoraGAConfig

        ga = LoraGAConfig(direction=self.direction, scale=self.scale, stable_gamma=self.gamma)
        return self.lora(model, init_lora_weights="lora_ga", lora_ga_config=ga)

    def before(self, model: Family, config: Any, ctx: Context | None) -> None:
        from peft.tuners.lora import preprocess_loraga

        small = min((min(side) for side in self.sizes(model)), default=0)
        if 2 * self.rank > small:
            raise RecipeError(f"'rank' is {self.rank}, but LoRA-GA takes twice as many directions and the smallest side of the targeted layers is {small}; lower it.")
        rows = calibration_rows(ctx, self.samples, self.name)
        size = ctx.batch_size if ctx is not None else 16

        def train_step() -> None:
            model.eval()  # peft turns train mode on; the gradient should not depend on a dropout mask
            for start in range(0, len(rows), size):
                _loss(model, rows[start : start + size]).backward()

        modes = [(m, m.training) for m in model.network.modules()]
        preprocess_loraga(model.network, config, train_step)
        for module, mode in modes:
            module.training = mode


def _loss(model: Family, rows: list[Any]) -> torch.Tensor:
    """The mean loss of some rows: tokens of a language model, classes otherwise."""
    batch = model.collate(rows)
    if "score" in model.verbs and batch.sequences:
        return -model.score(batch).logp.mean()
    return torch.nn.functional.cross_entropy(model.classify(batch).float(), batch.tensors["labels"].to(model.device))
