"""One-token rollout: a policy gradient at every position of a gold answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luthier.catalog import register
from luthier.errors import RecipeError
from luthier.objective import Supervised
from luthier.objective._shared import device_rng, token_loss

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family
    from luthier.core.loss import Loss


def draw(logits: Tensor, samples: int = 256, temperature: float = 1.3, generator: torch.Generator | None = None) -> Tensor:
    """[tokens, samples] ids from softmax(logits / temperature), with replacement and without gradient."""
    behaviour = torch.softmax(logits.detach().float() / temperature, -1)
    return torch.multinomial(behaviour, samples, replacement=True, generator=generator)


def one_token_rollout(
    logits: Tensor,
    target: Tensor,
    draws: Tensor | None = None,
    wrong_reward: float = -0.1,
    temperature: float = 1.3,
    floor: float = -20.0,
) -> Tensor:
    """Per token: -(1/K) sum_k R(a_k) log p(a_k), R = 1 for the gold token and `wrong_reward` for any other, p = softmax(logits).

    Without `draws` the expectation over a ~ m = softmax(sg(logits) / temperature):
    -[ m(y) log p(y) + wrong_reward * sum_{v != y} m(v) log p(v) ]. log p is cut at `floor`: below it a token moves nothing."""
    logp = torch.log_softmax(logits.float(), -1).clamp(min=floor)
    if draws is not None:
        reward = torch.where(draws == target[:, None], 1.0, wrong_reward)
        return -(reward * logp.gather(-1, draws)).mean(-1)
    behaviour = torch.softmax(logits.detach().float() / temperature, -1)
    gold = (behaviour.gather(-1, target[:, None]) * logp.gather(-1, target[:, None]))[:, 0]
    return -(gold + wrong_reward * ((behaviour * logp).sum(-1) - gold))


@register("one-token-rollout", paper=118)
@dataclass
class OneTokenRollout(Supervised):
    """At every position of a gold answer draw tokens from the model itself, reward those that equal the gold token, punish the rest.

    Each position is an episode of one step: a_1..a_K ~ softmax(sg(z) / temperature), R(a) = 1 if a = y_t else `wrong_reward`,
    L = -(1/T) sum_t (1/K) sum_k R(a_k) log softmax(z)(a_k). The data become on-policy token by token for one ordinary forward pass;
    no reference, no baseline, no importance ratio. `expected: true` replaces the draws by their exact expectation (no noise, the same
    mean gradient). wrong_reward 0 and temperature 1 give DFT, i.e. asft with kl 0, in expectation. The paper's release is not public: K =
    256, temperature 1.3 and wrong_reward -0.1 are our reading, as is log p at temperature 1 in the gradient. A rare draw with a
    negative reward has an unbounded loss, hence the floor. Tokens that the model would never draw are hardly taught: start from a
    model that already answers in the right form. Learning rates of SFT do not carry over (the step scales with the token's probability)."""

    samples: int = 256
    """Tokens drawn at each position (K)."""
    temperature: float = 1.3
    """Temperature of the draws (kappa)."""
    wrong_reward: float = -0.1
    """Reward of every token that is not the gold one (beta); 0 or less."""
    expected: bool = False
    """Use the exact expectation instead of draws."""
    floor: float = -20.0
    """Log-probabilities below this neither count nor move."""

    default_loss = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"samples is {self.samples}; at least one token must be drawn.")
        if self.temperature <= 0:
            raise RecipeError(f"temperature is {self.temperature}; it must be positive.")
        if self.wrong_reward > 0:
            raise RecipeError(f"wrong_reward is {self.wrong_reward}; it must be 0 or less.")
        if self.floor >= 0:
            raise RecipeError(f"floor is {self.floor}; it bounds log-probabilities from below and must be negative.")

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        scores = model.score(batch)
        if not len(scores):
            return token_loss("otr", scores.logp, batch)
        draws = None
        if not self.expected:
            # drawn before the pass with gradient, whose chunks may run twice
            generator = device_rng(ctx, "one-token-rollout", scores.hidden.device)
            with torch.no_grad():
                draws = scores.map(lambda logits, at: draw(logits, self.samples, self.temperature, generator))

        def values(logits: Tensor, at: slice) -> Tensor:
            mine = None if draws is None else draws[at]
            return one_token_rollout(logits, scores.target[at], mine, self.wrong_reward, self.temperature, self.floor)

        return token_loss("otr", scores.map(values), batch)
