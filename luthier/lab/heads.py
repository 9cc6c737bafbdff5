"""The shipped vision model under a linear probe's head: where fine-tunes of pictures begin, and what they left of its skill.

The head is fitted to the model's features before anything is trained, so that fine-tunes of one task differ only below it and can
be merged. Weights are judged apart from modules: a merge is a state dict, and the model that it is tried in stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

ABSENT = -9.0
"""The logit of a class that no row has, such as a count of none."""


def headed(rows: Sequence[Mapping[str, Any]], name: str = "lab:vit") -> Any:
    """The shipped model under a logistic regression on its features of these rows."""
    from sklearn.linear_model import LogisticRegression

    from luthier.core.models import load

    model, labels = load(name), [row["label"] for row in rows]
    model.ensure_classes(max(labels) + 1)
    with model.evaluating():
        found = LogisticRegression(max_iter=1000).fit(model.features(model.collate(rows)).numpy(), labels)
    weight, bias = torch.tensor(found.coef_).float(), torch.tensor(found.intercept_).float()
    if len(weight) == 1:  # two classes: scikit-learn gives the second's logit
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    head = model.classifier
    head.weight.data.zero_(), head.bias.data.fill_(ABSENT)
    head.weight.data[found.classes_], head.bias.data[found.classes_] = weight, bias
    return model


def body(model: Any) -> dict[str, torch.Tensor]:
    """Everything below the head."""
    return below_head(model.network.state_dict())


def below_head(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in weights.items() if not name.startswith("classifier.")}


@torch.no_grad()
def logits(model: Any, weights: Mapping[str, torch.Tensor], batch: Any) -> torch.Tensor:
    """What the model says with these weights; those that are missing are its own."""
    return torch.func.functional_call(model.network.eval(), dict(weights), (), {"pixel_values": batch.tensors["image"]}).logits


def right(said: torch.Tensor, batch: Any) -> float:
    """The share of pictures whose label has the largest logit."""
    return float((said.argmax(-1) == batch.tensors["labels"]).float().mean())


def accuracy(model: Any, weights: Mapping[str, torch.Tensor], batch: Any) -> float:
    return right(logits(model, weights, batch), batch)


def shapes_left(weights: Mapping[str, torch.Tensor], name: str = "lab:vit") -> float:
    """What is left of the shipped model's skill: shapes, named by its own head on 200 scenes."""
    from luthier.core.models import load
    from luthier.lab import make

    model = load(name)  # the first six classes of its head are shapes
    batch = model.collate(make("scenes", kind="label", label="shape", n=1, test=200).test)
    return right(logits(model, below_head(weights), batch)[:, :6], batch)
