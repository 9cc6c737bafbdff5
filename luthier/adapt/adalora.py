"""AdaLoRA: LoRA whose rank budget moves between layers while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from luthier.adapt._shared import Targeted
from luthier.catalog import register
from luthier.core.loss import Loss
from luthier.core.plugin import Step
from luthier.errors import RecipeError

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family


@register("adalora", wraps="peft.AdaLoraConfig")
@dataclass
class AdaLora(Targeted):
    """Start with more rank than wanted and take it away, step by step, where it matters least, so that layers end with unequal ranks.

    W' = W + (alpha / r) P diag(lambda) Q. After the first `start` share of the run the budget falls from `start_rank` to `rank` a
    layer (cubic schedule, every `every` steps) and is fixed for the last `end` share; the lambdas of the least important triplets
    (smoothed |w g| times its uncertainty) are zeroed. P and Q are kept near orthonormal by a penalty. Budgets are counted in the
    run's own steps."""

    rank: int = 8
    """Mean rank at the end."""
    start_rank: int = 12
    """Rank at the start."""
    alpha: float = 32.0
    """The update is scaled by alpha / start_rank."""
    dropout: float = 0.0
    """Dropout on the update's input."""
    start: float = 0.1
    """Share of the run before the budget falls."""
    end: float = 0.3
    """Share of the run after it is fixed."""
    every: int = 10
    """Steps between two allocations."""
    orthogonal: float = 0.5
    """Weight of the penalty."""
    smoothing: tuple[float, float] = (0.85, 0.85)
    """Decay of importance and of its uncertainty."""

    positive = ("rank", "start_rank", "alpha", "every")
    shares = ("dropout", "start", "end")

    parallel = frozenset({"single", "ddp"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._grads: dict[str, Tensor] = {}
        self._tuner: Any = None

    def config(self, model: Family, ctx: Context | None = None) -> Any:
        from peft import AdaLoraConfig

        # The run's length is not known yet; `before_step` sets it.
        return AdaLoraConfig(
            target_r=self.rank, init_r=max(self.rank, self.start_rank), lora_alpha=self.alpha, lora_dropout=self.dropout,  # type: ignore[arg-type]  # peft says int and takes any number
            total_step=1_000_000, tinit=0, tfinal=0, deltaT=self.every, beta1=self.smoothing[0], beta2=self.smoothing[1],
            orth_reg_weight=self.orthogonal, **self.common(model),
        )  # fmt: skip

    def after(self, model: Family, ctx: Context | None) -> None:
        self._tuner = model.network.base_model

    def before_step(self, step: Step, ctx: Context | None) -> None:
        if ctx is not None:
            config, total = self._tuner.peft_config["default"], ctx.clock.steps
            config.total_step, config.tinit, config.tfinal = total, int(self.start * total), int(self.end * total)

    def penalty(self, model: Family, ctx: Context | None = None) -> Loss | None:
        """The mean over P and Q of ||P^T P - I||_F; peft adds it in its own forward pass, which is not used here."""
        if not self.orthogonal:
            return None
        parts = []
        for name, param in model.network.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = param @ param.T if "lora_A" in name else param.T @ param
                parts.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
        return Loss().add("orthogonal", torch.stack(parts).mean().reshape(1), per="batch", weight=self.orthogonal)

    def after_backward(self, step: Step, ctx: Context | None) -> None:
        """Keep the gradients: the importances are of the weights after the step, as in peft's example, when they are gone."""
        named = self._tuner.model.named_parameters()
        self._grads = {n: p.grad for n, p in named if "lora_" in n and p.grad is not None}

    def after_step(self, step: Step, ctx: Context | None) -> None:
        if step.skip or not self._grads:
            return
        params = dict(self._tuner.model.named_parameters())
        resting = next((n for n, p in params.items() if "lora_" in n and n not in self._grads and not n.endswith("ranknum")), None)
        if resting is not None:
            raise RecipeError(f"adalora ranks all its tensors by their gradients, but '{resting}' got none: another method of this recipe keeps it from training. Take `adapt: lora` with that method, or leave it out.")
        for name, grad in self._grads.items():
            params[name].grad = grad
        self._tuner.update_and_allocate(step.number + 1)
        for name in self._grads:
            params[name].grad = None
        self._grads = {}

    def state_dict(self) -> dict[str, Any]:
        allocator = self._tuner.rankallocator
        pattern = self._tuner.peft_config["default"].rank_pattern
        return {"importance": {k: dict(getattr(allocator, k)) for k in _SUMS}, "ranks": pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, values in state["importance"].items():
            setattr(self._tuner.rankallocator, key, dict(values))
        self._tuner.peft_config["default"].rank_pattern = state["ranks"]


_SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")
