"""Classification heads: finding one in a network, what it sees, its labels, and giving a model a fresh one for a new task."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.errors import DataError, ModelError, nearest

if TYPE_CHECKING:
    from luthier.core.batch import Batch
    from luthier.core.families import Family

    Base = Family
else:
    Base = object

NAMES = ("classifier", "score", "head", "fc")
UNLABELLED = -100
"""The label of a row whose `label` is null, as torch's cross-entropy ignores it."""


class Classifies(Base):
    """`classify`, `features`, `classifier` for families whose network may end in a classification head."""

    heading: str
    """The transformers Auto class that adds a head: AutoModelForSequenceClassification ..."""

    def _logits(self, batch: Batch) -> Tensor:
        """The network's own logits of a batch."""
        raise NotImplementedError

    # the head -----------------------------------------------------------------------------------------------------------
    @property
    def has_classes(self) -> bool:
        return "Classification" in type(self.base_network).__name__ and not isinstance(_plain(_found(self.base_network)), (nn.Identity, type(None)))

    @property
    def classifier(self) -> nn.Module:
        """The head module: pooled features to logits."""
        if not self.has_classes:
            raise ModelError("This model has no classification head; give it one with `family.ensure_classes(labels)`.")
        return _found(self.base_network)

    def classifier_of(self, features: Tensor) -> Tensor:
        """Logits of features, as the head gives them."""
        head = self.classifier
        return head(features[:, None]) if _takes_tokens(head) else head(features)

    def classify(self, batch: Batch) -> Tensor:
        self.classifier  # noqa: B018 - says how to get a head if there is none
        return self._logits(batch)

    def features(self, batch: Batch) -> Tensor:
        """[rows, d] what the head sees: the network runs, and the head's input is kept."""
        seen: list[Tensor] = []
        handle = self.classifier.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            self._logits(batch)
        finally:
            handle.remove()
        found = seen[-1]
        return found[:, 0] if found.ndim == 3 and _takes_tokens(self.classifier) else found.flatten(1)

    # labels -------------------------------------------------------------------------------------------------------------
    @property
    def labels(self) -> list[str]:
        """The names of the classes, in the order of the logits."""
        names = self.config.id2label or {}
        return [str(names.get(i, i)) for i in range(int(self.config.num_labels))]

    def label_ids(self, rows: SequenceOf[Mapping[str, Any]]) -> Tensor | None:
        """The rows' `label` column as class numbers (a list of numbers: as it is, for soft and multiple labels); None without one."""
        given: list[Any] = [row.get("label") for row in rows]
        if all(v is None for v in given):
            return None
        if any(isinstance(v, (list, tuple)) or (hasattr(v, "ndim") and v.ndim == 1) for v in given):
            return self._soft(given)
        if any(isinstance(v, (float, np.floating)) for v in given):
            return torch.tensor([float("nan") if v is None else float(v) for v in given])
        return torch.tensor([UNLABELLED if v is None else self._label_id(v, i) for i, v in enumerate(given)])

    def _soft(self, given: list[Any]) -> Tensor:
        if any(v is None or len(v) != len(given[0]) for v in given):
            raise DataError("Where one row's label is a list of numbers, every row's must be one of the same length.")
        return torch.tensor([[float(x) for x in v] for v in given])

    def _label_id(self, value: Any, row: int) -> int:
        known = self.labels if self.has_classes else None
        if isinstance(value, str):
            if known is None:
                raise ModelError("This model has no classes yet; give it some with `family.ensure_classes(labels)` or `family.fit_to(rows)`.")
            if value not in known:
                raise DataError(f"Row {row}: the model has no class '{value}'.{nearest(value, known)} Its classes: {', '.join(known[:20])}.")
            return known.index(value)
        number = int(value)
        if number < 0 or (known is not None and number >= len(known)):
            raise DataError(f"Row {row}: label {value}, but the model has {len(known or [])} classes, counted from 0.")
        return number

    # new tasks ----------------------------------------------------------------------------------------------------------
    def fit_to(self, rows: SequenceOf[Mapping[str, Any]], seed: int = 0) -> bool:
        """Give the model a head for these rows' labels if it has none that knows them; whether it did.

        A head with more classes than the rows happen to hold is kept: they may be a part of its task."""
        wanted = classes_of(rows)
        if wanted is None or (isinstance(wanted, int) and self.has_classes and wanted <= len(self.labels)):
            return False
        return self.ensure_classes(wanted, seed)

    def ensure_classes(self, classes: int | SequenceOf[str], seed: int = 0) -> bool:
        """A head for `classes` (a number, or the labels' names): the one at hand if it fits, else a fresh seeded one.

        A number fits a head with as many classes; names fit a head that knows them all. Returns whether the head is new."""
        names = [f"LABEL_{i}" for i in range(classes)] if isinstance(classes, int) else [str(c) for c in classes]
        if not names or len(set(names)) != len(names):
            raise ModelError(f"Classes must be at least one and named differently; got {names[:20]}.")
        if self.has_classes and (len(self.labels) == len(names) if isinstance(classes, int) else set(names) <= set(self.labels)):
            return False
        if hasattr(self.network, "peft_config"):
            raise ModelError("Adapters are attached already; give the model its classes before that.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if self.has_classes:
                _rehead(self.base_network, names)
            else:
                self.network = self._with_head(names)
        return True

    def _with_head(self, names: list[str]) -> nn.Module:
        """The same body under a fresh head of transformers' own class, so that what is saved loads without us."""
        import transformers

        old = self.base_network
        config = copy.deepcopy(old.config)
        _name(config, names)
        auto = getattr(transformers, self.heading)
        try:
            new = auto.from_config(config, attn_implementation=getattr(old.config, "_attn_implementation", None))
        except ValueError as error:
            raise ModelError(f"transformers has no classification head for a {type(old).__name__}.") from error
        found = new.base_model.load_state_dict(old.base_model.state_dict(), strict=False)
        lost = [k for k in found.missing_keys if "pool" not in k and not k.startswith("layernorm")]
        if lost:
            raise ModelError(f"The body of a {type(old).__name__} does not fit {type(new).__name__}: '{lost[0]}' is missing.")
        return new.to(self.device, self.dtype).train(old.training)


def classes_of(rows: SequenceOf[Mapping[str, Any]]) -> int | list[str] | None:
    """How many classes, or which names, the rows' labels need; None where no row has a class label."""
    values = [v for v in (row.get("label") for row in rows) if v is not None]
    if not values or any(isinstance(v, (float, np.floating)) for v in values):
        return None
    if any(isinstance(v, str) for v in values):
        return sorted({str(v) for v in values})
    if any(hasattr(v, "__len__") for v in values):
        return len(values[0])
    return max(2, int(max(values)) + 1)  # one class alone would be regression to transformers


def _found(network: nn.Module) -> Any:
    return next((getattr(network, n) for n in NAMES if isinstance(getattr(network, n, None), nn.Module)), None)


def _plain(head: Any) -> Any:
    """The head itself, without the shell that peft puts around a module to save."""
    saved = getattr(head, "modules_to_save", None)
    return head if saved is None else saved[next(iter(head.active_adapters if hasattr(head, "active_adapters") else saved))]


def _takes_tokens(head: nn.Module) -> bool:
    """RoBERTa-like heads take all token states and use the first."""
    return hasattr(_plain(head), "out_proj")


def _name(config: Any, names: list[str]) -> None:
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {n: i for i, n in enumerate(names)}
    config.problem_type = None


def _rehead(network: Any, names: list[str]) -> None:
    """Replace the last linear layer of the head, and draw the head's other layers anew."""
    head_name = next(n for n in NAMES if isinstance(getattr(network, n, None), nn.Module))
    head = getattr(network, head_name)
    linears = [n for n, m in head.named_modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ModelError(f"The head of a {type(network).__name__} ends in no linear layer, so it cannot be given new classes.")
    std = float(getattr(network.config, "initializer_range", None) or 0.02)
    for name in linears:
        old = head.get_submodule(name) if name else head
        new = nn.Linear(old.in_features, len(names) if name == linears[-1] else old.out_features, old.bias is not None)
        nn.init.normal_(new.weight, std=std)
        if new.bias is not None:
            nn.init.zeros_(new.bias)
        new.to(old.weight.device, old.weight.dtype)
        parent, _, leaf = (f"{head_name}.{name}" if name else head_name).rpartition(".")
        setattr(network.get_submodule(parent), leaf, new)
    network.num_labels = len(names)
    _name(network.config, names)
