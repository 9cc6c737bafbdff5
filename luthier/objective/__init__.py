"""The axis `objective`: what is optimised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any, ClassVar

from luthier.core.loss import Loss
from luthier.core.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.core.batch import Batch
    from luthier.core.context import Context
    from luthier.core.families import Family


class Objective(Plugin):
    """`loss` of a batch; several objectives in a list add. One that defines no loss of its own only transforms (`prepare`)."""

    whole_batch: ClassVar[bool] = False
    """The loss couples rows, so the batch may not be split into micro-batches (yield several losses to bound memory)."""
    default_loss: ClassVar[bool] = False
    """`loss` is the family base's: used once, and only if no objective of the list brings its own."""

    def collate(self, rows: SequenceOf[Mapping[str, Any]], ids: Any, ctx: Context) -> Batch:
        """Rows to a batch. Objectives with the same collate share one batch and its preparation."""
        return ctx.current.collate(rows, ids, train_on=ctx.train_on)  # type: ignore[union-attr]

    def together(self, batch: Batch) -> list[list[int]]:
        """Groups of rows that must stay in one micro-batch."""
        return [[i] for i in range(len(batch))]

    def counts(self, batch: Batch) -> dict[str, float]:
        """Denominators of terms that count for themselves, from the batch alone (before any forward pass)."""
        return {}

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss | Tensor | Iterator[Loss]:
        raise NotImplementedError


class Supervised(Objective):
    """Objectives on rows with a right answer: the loss is over the supervised tokens."""

    columns = (frozenset({"prompt", "completion"}), frozenset({"messages"}), frozenset({"text"}))
    families = frozenset({"causal-lm"})
    default_loss = True

    def loss(self, model: Family, batch: Batch, ctx: Context | None = None) -> Loss:
        scores = model.score(batch)
        return Loss().add("nll", -scores.logp * batch.token_weights().to(scores.logp), per="token")


class Preference(Objective):
    """Objectives on rows with a better and a worse answer. Both share the prompt's tokens in one pass."""

    columns = (frozenset({"prompt", "chosen", "rejected"}), frozenset({"chosen", "rejected"}))
    families = frozenset({"causal-lm"})


class Policy(Objective):
    """Objectives on the policy's own answers: `rollout` draws and scores them, `loss` reinforces."""

    columns = (frozenset({"prompt"}), frozenset({"messages"}))
    families = frozenset({"causal-lm"})
    needs = frozenset({"generation"})


class Contrastive(Objective):
    """Objectives on pairs of things that belong together. The batch is one set of candidates and is not split."""

    columns: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"anchor", "positive"}),)
    families = frozenset({"text-encoder", "causal-lm", "dual-encoder"})
    whole_batch = True


class Classification(Objective):
    """Objectives on labelled rows, with class logits and pooled features."""

    columns = (frozenset({"text", "label"}), frozenset({"image", "label"}))
    families = frozenset({"text-encoder", "image-classifier"})
