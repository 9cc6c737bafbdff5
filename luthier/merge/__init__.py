"""The axis `merge`: how checkpoints combine."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING, Any

from luthier.core.plugin import Plugin

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.linalg import TensorSource


class Merger(Plugin):
    """`merge` is lazy: the result is a mapping whose tensors are computed when asked for, so mergers stream and chain."""

    by_rows = False
    """Whether rows of a tensor of the result follow from the same rows of what is merged (apart from what is read within `whole()`):
    large tensors are then computed in blocks of rows."""

    def merge(self, base: Any, tuned: SequenceOf[Any], ctx: Context | None = None) -> TensorSource | Mapping[str, Any]:
        """`base` and each of `tuned`: a state dict, a TensorSource, or a checkpoint's path."""
        raise NotImplementedError
