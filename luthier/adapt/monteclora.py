"""MonteCLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from luthier.adapt._shared import LoraLike
from luthier.catalog import register
from luthier.core.loss import Loss
from luthier.core.plugin import Step

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("monteclora", wraps="peft.LoraConfig")
@dataclass
class Monteclora(LoraLike):
    """LoRA whose A is a mixture of random perturbations with learned spread, so that training averages over plausible adapters.

    A' = A + sum_k w_k eps_k with Dirichlet weights w and Gaussian eps of learned covariance; a KL to the prior is added to the loss.
    Evaluation uses the mean."""

    samples: int = 8
    """Perturbations drawn in one pass."""
    spread: float = 1e-4
    """Scale of the perturbations."""
    prior: float = 0.1
    """Concentration of the Dirichlet prior."""
    kl: float = 1e-5
    """Weight of the KL term."""
    entropy: bool = False
    """Keep the mixture weights from collapsing by an entropy term."""

    positive = ("rank", "alpha", "samples", "prior",)

    parallel = frozenset({"single", "ddp"})

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft.tuners.lora import MontecloraConfig

        # peft's samplers hold a stock of future draws that no checkpoint knows; with a stock of one they follow the global generator.
        monte = MontecloraConfig(
            num_samples=self.samples, sample_scaler=self.spread, dirichlet_prior=self.prior, kl_loss_weight=self.kl, use_entropy=self.entropy,
            buffer_size=1,
        )  # fmt: skip
        return self.lora(model, monteclora_config=monte)

    def after(self, model: Family, ctx: Context | None) -> None:
        for sampler in _samplers(model):
            sampler.sampler.index = sampler.sampler.buffer_size

    def penalty(self, model: Family, ctx: Context | None = None) -> Loss | None:
        network: Any = model.network
        value = network.base_model._get_monteclora_loss()
        return Loss().add("monteclora", value.reshape(1), per="batch") if isinstance(value, Tensor) else None

    def after_step(self, step: Step, ctx: Context | None) -> None:
        """peft leaves the last pass's graph in two buffers, which could then not be copied."""
        for sampler in _samplers(step.model):
            sampler.gaussian_var_prior = sampler.gaussian_var_prior.detach()
            sampler.expert_weights = sampler.expert_weights.detach()


def _samplers(model: Family) -> list[Any]:
    held = [m.lora_monteclora_sampler for m in model.network.modules() if hasattr(m, "lora_monteclora_sampler")]
    return [sampler for samplers in held for sampler in samplers.values()]
