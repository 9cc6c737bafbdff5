"""What an online selector may ask about the rows of a batch, computed on demand without gradient in eval mode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.core.batch import Sequence

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.families import Family


class RowScores(Mapping[str, Any]):
    """Lazy: "loss", "perplexity", "entropy", "hit" (one number a row, over its supervised tokens), "logits" (a list of
    [tokens, classes], one a row), "embedding" ([rows, d]). Computed once each; the forward pass is shared."""

    names = ("loss", "perplexity", "entropy", "hit", "logits", "embedding")

    def __init__(self, model: Family, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self._found: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Any:
        if name not in self._found:
            if name not in self.names:
                raise KeyError(name)
            with torch.no_grad():
                self._found[name] = getattr(self, f"_{name}")()
        return self._found[name]

    def _per_row(self, values: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor([s.row for s in self.batch.sequences], device=owner.device)[owner]
        total = torch.zeros(len(self.batch), device=values.device).index_add(0, rows, values.float())
        return (total / torch.bincount(rows, minlength=len(self.batch)).clamp(min=1)).cpu()

    @property
    def _scores(self) -> Any:
        if "scores" not in self._found:
            self._found["scores"] = self.model.score(self.batch)
        return self._found["scores"]

    @property
    def _classes(self) -> torch.Tensor:
        if "classes" not in self._found:
            self._found["classes"] = self.model.classify(self.batch).float()
        return self._found["classes"]

    def _loss(self) -> torch.Tensor:
        if "score" in self.model.verbs:
            return self._per_row(-self._scores.logp, self._scores.sequence)
        labels = self.batch.tensors["labels"].to(self._classes.device)
        return torch.nn.functional.cross_entropy(self._classes, labels, reduction="none").cpu()

    def _perplexity(self) -> torch.Tensor:
        return self["loss"].exp()

    def _entropy(self) -> torch.Tensor:
        if "score" in self.model.verbs:
            return self._per_row(self._scores.entropy, self._scores.sequence)
        logp = torch.log_softmax(self._classes, -1)
        return -(logp.exp() * logp).sum(-1).cpu()

    def _hit(self) -> torch.Tensor:
        if "score" in self.model.verbs:
            return self._per_row(self._scores.hit.float(), self._scores.sequence)
        return (self._classes.argmax(-1).cpu() == self.batch.tensors["labels"].cpu()).float()

    def _logits(self) -> list[torch.Tensor]:
        """All positions of each row's first sequence, the prompt's too; class logits as one position."""
        if "score" not in self.model.verbs:
            return [z[None] for z in self._classes]
        firsts: dict[int, Sequence] = {}
        for s in self.batch.sequences:
            firsts.setdefault(s.row, s)
        # every position is asked for its logits: as if the token after it were supervised
        whole = [Sequence(np.append(firsts[i].ids, 0), np.ones(len(firsts[i]) + 1, bool)) for i in range(len(self.batch))]
        scores = self.model.score(whole)
        logits = scores.map(lambda z, at: z)
        return list(logits.split([len(s) - 1 for s in whole]))

    def _embedding(self) -> torch.Tensor:
        if "score" not in self.model.verbs:
            return self.model.features(self.batch).float().cpu()
        firsts = {s.row: s for s in reversed(self.batch.sequences)}
        return self.model.embed([firsts[i] for i in range(len(self.batch))]).float().cpu()
