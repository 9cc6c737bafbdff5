"""Training strategies as a tree of stages, as in the domain-adaptation study of paper 89."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.catalog import register
from luthier.errors import RecipeError
from luthier.search import Searcher
from luthier.search._shared import Point, Space, once
from luthier.search.factorial import interval, weighted_score

if TYPE_CHECKING:
    from luthier.core.context import Context


def stage_tree(nodes: SequenceOf[Point], values: Any) -> list[dict[str, Any]]:
    """What each switch of a tree is worth: mean paired differences of nodes that differ in it alone. `values` is [seeds, nodes].

    A stage: a path with it as its last stage minus the same path without it. Any other key: each of its choices minus its first one. `low`,
    `high`: a 95 % t-interval over seeds of the mean over pairs; None for one seed."""
    values = np.asarray(values, float).reshape(-1, len(nodes))
    place = {_key(n): i for i, n in enumerate(nodes)}
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    first: dict[str, Any] = {}
    for i, node in enumerate(nodes):
        for key, value in node.items():
            if key == "stages" and isinstance(value, list):
                other, name = {**node, key: value[:-1]}, f"+ {_name(value[-1])}"
            else:
                other, name = {**node, key: first.setdefault(key, value)}, _told(value)
            j = place.get(_key(other))
            if j is not None and j != i:
                pairs.setdefault((key, name), []).append((i, j))
    out = []
    for (key, name), found in pairs.items():
        gain = np.stack([values[:, i] - values[:, j] for i, j in found]).mean(0)
        low, high = interval(gain)
        out.append({"switch": key, "choice": name, "effect": float(gain.mean()), "low": low, "high": high, "pairs": len(found)})
    return out


def _key(node: Mapping[str, Any]) -> str:
    return json.dumps(node, sort_keys=True, default=str)


def _name(stage: Any) -> str:
    return str(stage.get("name") or "stage") if isinstance(stage, Mapping) else str(stage)


def _told(value: Any) -> str:
    return str(value.get("method", value)) if isinstance(value, Mapping) else str(value)


@register("stage-tree", paper=89)
@dataclass
class StageTree(Searcher):
    """Walk a tree of training strategies, every node measured, and say what each further stage, each start and each merge is worth.

    The study's tree is {base, instruct} -> CPT -> SFT -> {DPO, ORPO}, each node with and without a SLERP merge with the instruct model. Write
    it as the space: `stages` a list of paths (each a list of stages with names; YAML anchors keep it short), `model` the starts, `merge` null
    and the merge. Parents come before their children and plain nodes before merged ones; with `patience` a path whose parent did not gain on its own
    parent by more than the margin is not walked further. Points come back best first; the first carries `effects` (paired
    differences with intervals over `seeds`), also written to stage-tree.json in the run's folder. Published stage settings: CPT 2e-5 for 5 epochs
    on raw text; SFT 2e-5, 1 epoch, general chat mixed with domain questions; DPO 5e-7, beta 0.05; ORPO 3e-6, beta 0.1; each cosine, warm-up 0.1.

    Best is not synergy: whether a merge beats both parents is what `measure: synergy` tests. Nodes see different numbers of tokens, which
    each run's report states. Every node is a run of its own, so a parent's stages are trained again for its children."""

    score: dict[str, float] | None = None
    """Metrics with their weights, negative where less is better; default: the task's loss a token, else its score."""
    seeds: list[int] = field(default_factory=list)
    """Values of train.seed that every node runs with; empty: the recipe's own."""
    patience: float | None = None
    """A path is left when its last stage gained less than this; default: all are walked."""
    limit: int = 64
    """More trials are refused."""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) != len(self.seeds):
            raise RecipeError(f"seeds lists one seed twice: {self.seeds}.")
        if self.score is not None and not self.score:
            raise RecipeError("score names no metric; leave it out, or give metrics with weights such as {task/exact_match: 1}.")
        if self.limit < 1:
            raise RecipeError(f"limit is {self.limit}; it must be at least 1.")

    def search(self, space: Mapping[str, list[Any]], trial: Callable[[Point], Mapping[str, float]], ctx: Context | None = None) -> list[Point]:
        where, ask = Space(space), once(trial)
        if self.seeds and "train.seed" in space:
            raise RecipeError("The space lists train.seed, which search.seeds sets; keep one of the two.")
        number = where.size * max(1, len(self.seeds))
        if number > self.limit:
            raise RecipeError(f"{number} trials are more than search.limit {self.limit}; take fewer paths or seeds, or raise the limit.")
        runs: list[Point] = [{"train.seed": s} for s in self.seeds] or [{}]
        order = sorted(where.all(), key=lambda n: (_plain(n, space), len(n["stages"]) if isinstance(n.get("stages"), list) else 0))
        nodes: list[Point] = []
        found: dict[str, np.ndarray] = {}
        metrics: list[dict[str, float]] = []
        left: list[str] = []
        for node in order:
            if self._is_left(node, found, left):
                left.append(_key(node))
                continue
            measured = [ask({**node, **run}) for run in runs]
            found[_key(node)] = np.array([weighted_score(m, self.score) for m in measured])
            nodes.append(node)
            metrics.append({k: float(np.mean([m[k] for m in measured])) for k in measured[0] if all(m.get(k) is not None for m in measured)})
        values = np.stack([found[_key(n)] for n in nodes], 1)
        best = np.argsort(-values.mean(0), kind="stable")
        points: list[Point] = [{**nodes[i], "metrics": {**metrics[i], "stage-tree/score": float(values[:, i].mean())}} for i in best]
        points[0]["effects"] = stage_tree(nodes, values)
        if ctx is not None and ctx.folder is not None:
            table = {"score": self.score, "seeds": self.seeds, "nodes": points, "not walked": left}
            (ctx.folder / "stage-tree.json").write_text(json.dumps(table, indent=1, default=str))
        return points

    def _is_left(self, node: Point, found: Mapping[str, np.ndarray], left: list[str]) -> bool:
        """Whether the path to this node's parent was not worth its last stage."""
        path = node.get("stages")
        if self.patience is None or not isinstance(path, list) or len(path) < 2:
            return False
        parent, grand = ({**node, "stages": path[:-k]} for k in (1, 2))
        if _key(parent) in left:
            return True
        before, after = found.get(_key(grand)), found.get(_key(parent))
        return before is not None and after is not None and float((after - before).mean()) < self.patience


def _plain(node: Point, space: Mapping[str, list[Any]]) -> int:
    """How many keys (stages apart) are not at their first choice."""
    return sum(k != "stages" and v != space[k][0] for k, v in node.items())
