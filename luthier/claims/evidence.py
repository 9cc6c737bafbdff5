"""Evidence: what a claim's runs gave, kept with everything that is needed to judge it.

Records only append: a shorter run never overwrites a longer one, and a run after a change of code stands beside the old until it is
whole. The summary is made anew from the records at every save: values, means, the paired effect, the verdict, and flags for whatever
should keep a reader from trusting it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import platform
import re
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from luthier import __version__, catalog
from luthier.claims import HERE, Arm, Claim
from luthier.claims.statistics import paired, verdict

FOLDER = catalog.PACKAGE / "evidence"
UNEQUAL = 0.02
"""Budgets that differ by more than this share are flagged."""


def finite(value: Any) -> float | None:
    """A number, or None where there is none: JSON knows no NaN, and nobody should average one."""
    return float(value) if value is not None and math.isfinite(float(value)) else None


def sources(claim: Claim) -> list[Path]:
    """The files that a claim's result rests on: itself, its methods and what their axes share, lab tasks and weights."""
    package = catalog.PACKAGE
    files = [claim.file]
    for method in claim.methods:
        axis, _, name = method.partition("/")
        file = Path(catalog.find(axis, name).path)
        words = set(re.findall(r"\w+", file.read_text(encoding="utf-8")))
        files += [file, *(f for f in (package / axis).glob("_*.py") if f.stem in words)]
    for task in claim.tasks:
        files += [package / "lab" / f"{task}.py", *package.glob(f"lab/_{task.rstrip('s')}_*.py")]
    for model in claim.models:
        files.append(package / "lab" / "weights" / model / "model.safetensors")
    return sorted({f for f in files if f.is_file()})


def fingerprint(claim: Claim) -> str:
    """Changes when any of the sources does something else; words, comments and where a method may run are not part of it."""
    found = hashlib.sha256()
    for file in sources(claim):
        found.update(file.name.encode() + b"\0")
        found.update(_digest(file, file.stat().st_mtime_ns, claim=file == claim.file))
    return found.hexdigest()[:16]


PROSE = ("says", "published", "departs", "reason")
"""What a claim says about itself: an explanation written after a run does not make the run stale."""
PLACES = ("parallel", "toy", "by_rows")
"""What a method says about where and in which pieces it runs, and how it is tried out."""


@functools.cache
def _digest(file: Path, changed: int, claim: bool) -> bytes:
    return hashlib.sha256(_code(file, claim) if file.suffix == ".py" else file.read_bytes()).digest()


def _code(file: Path, claim: bool) -> bytes:
    """A file's code alone, in one form."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            node.body = [part for part in node.body if not _says_nothing(part)] or [ast.Pass()]
        if claim and isinstance(node, ast.Call):
            node.keywords = [k for k in node.keywords if k.arg not in PROSE]
    return ast.unparse(tree).encode()


def _says_nothing(part: ast.stmt) -> bool:
    """Docstrings, of modules, classes, functions and fields; and what a method says about itself."""
    if isinstance(part, ast.Expr):
        return isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
    return isinstance(part, ast.Assign) and any(isinstance(t, ast.Name) and t.id in PLACES for t in part.targets)


class Store:
    """The evidence file of one claim."""

    def __init__(self, claim: Claim, folder: Path | None = None) -> None:
        folder = folder or (FOLDER if claim.file.parent == HERE else claim.file.parent)
        self.claim, self.path, self.hash = claim, folder / f"{claim.slug}.json", fingerprint(claim)
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.records: list[dict[str, Any]] = found.get("records", [])
        self.grids: list[dict[str, Any]] = found.get("grids", [])
        self.failures: list[dict[str, Any]] = found.get("failures", [])

    # -- what is there -------------------------------------------------------------------------------------------------------
    def has(self, arm: str, seed: int, quick: bool) -> bool:
        """Whether this was run with the code as it is."""
        return any(r["arm"] == arm and r["seed"] == seed and r["quick"] == quick and r["hash"] == self.hash for r in self.records)

    def grid_value(self, arm: Arm, point: dict[str, Any]) -> float | None:
        found = [r for r in self.grids if r["arm"] == arm.name and r["settings"] == point and r["hash"] == self.hash]
        return (found[-1]["metrics"][self.claim.metric] if found[-1]["metrics"][self.claim.metric] is not None else math.nan) if found else None

    def chosen(self) -> dict[str, dict[str, Any]]:
        """The best point of every arm's grid, by the claim's own metric; the newest search counts."""
        sign, best = 1 if self.claim.better == "higher" else -1, {}
        for arm in self.claim.arms.values():
            known = [r for r in self.grids if r["arm"] == arm.name and r["settings"].keys() == arm.grid.keys() and r["metrics"][self.claim.metric] is not None]
            mine = [r for r in known if r["hash"] == self.hash] or known
            if mine:
                best[arm.name] = max(mine, key=lambda r: sign * r["metrics"][self.claim.metric])["settings"]
        return best

    # -- what comes in --------------------------------------------------------------------------------------------------------
    def take(self, record: dict[str, Any], grid: bool = False) -> None:
        """What a worker tells: an arm's numbers, a point of its grid, or that it failed."""
        if "error" in record:
            self.failures.append({**record, "hash": self.hash})
        elif grid:
            self.grids.append({**{k: record[k] for k in ("arm", "seed", "settings", "metrics", "seconds")}, "hash": self.hash})
        else:
            self.records.append({**record, "hash": self.hash, "versions": versions()})
        self.save()

    def save(self) -> None:
        """In one step: the file holds the old evidence or the new."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        made = self.path.with_suffix(".part")
        made.write_text(json.dumps(self.summary(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        made.replace(self.path)

    # -- what it says ---------------------------------------------------------------------------------------------------------
    def counted(self, quick: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """The hash and the records of the declared seeds that the summary rests on: the code as it is once all seeds are in, else the fullest.

        Other seeds are a repetition, told apart: who may add seeds until a verdict comes will get one."""
        groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for record in self.records:
            if record["quick"] == quick and record["seed"] in self.claim.seeds:
                groups[record["hash"]].append(record)
        if not groups:
            return self.hash, []
        pair = {self.claim.of_role("method").name, self.claim.of_role("baseline").name}

        def seeds(of: str) -> int:
            return len(set.intersection(*({r["seed"] for r in groups[of] if r["arm"] == a} for a in pair)))

        best = max(groups, key=lambda h: (seeds(h) == len(self.claim.seeds), h == self.hash, seeds(h)))
        return best, groups[best]

    def _failed(self, used: str, table: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
        """Failures that no later run has made good."""
        good = {(g["arm"], g["seed"], json.dumps(g["settings"], sort_keys=True)) for g in self.grids if g["hash"] == used}
        left = [f for f in self.failures if f["hash"] == used and not f["quick"] and f["seed"] not in table[f["arm"]]]
        return sorted({f"{f['arm']}, seed {f['seed']}: failed: {f['error']}" for f in left if (f["arm"], f["seed"], json.dumps(f.get("settings"), sort_keys=True)) not in good})

    def summary(self) -> dict[str, Any]:
        claim = self.claim
        used, records = self.counted()
        table: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for record in records:
            table[record["arm"]][record["seed"]] = record
        flags = self._flags(table) + self._failed(used, table)
        method, baseline = claim.of_role("method").name, claim.of_role("baseline").name
        effect, others = self._effect(table, method, baseline), {}
        for name in claim.arms:
            if name != method and (found := self._effect(table, method, name)):
                others[name] = asdict(found)
        memory = self._memory(used)
        outcome = None
        waiting = sorted(set(claim.seeds) - (set(table[method]) & set(table[baseline])))
        if effect is not None and (flags or not waiting):  # no peeking: no verdict before all declared seeds are in
            outcome = "unclear" if flags else verdict(effect, claim.smallest, claim.at_least)
        return {
            "paper": claim.paper, "slug": claim.slug, "says": claim.says, "published": claim.published, "metric": claim.metric, "better": claim.better,
            "smallest": claim.smallest, "at_least": claim.at_least, "departs": claim.departs, "verdict": outcome, "reason": claim.reason,
            "effect": None if effect is None else {**asdict(effect), "method": method, "baseline": baseline}, "against": others, "flags": flags, "waiting": waiting, "repeated": self._repeated(method, baseline),
            "arms": {name: _arm_summary(claim, claim.arms[name], table[name], memory.get(name)) for name in claim.arms if table.get(name)},
            "cost": {"time": _ratio(*(_mean(r["seconds"] for r in table.get(arm, {}).values()) for arm in (method, baseline))), "memory": _ratio(memory.get(method), memory.get(baseline))}, "hash": used, "versions": records[-1]["versions"] if records else versions(),
            "methods": list(claim.methods), "failures": self.failures, "grids": self.grids, "records": self.records,
        }  # fmt: skip

    def _effect(self, table: dict[str, dict[int, dict[str, Any]]], a: str, b: str) -> Any:
        seeds = sorted(set(table.get(a, {})) & set(table.get(b, {})))
        pairs = [(table[a][s]["metrics"].get(self.claim.metric), table[b][s]["metrics"].get(self.claim.metric)) for s in seeds]
        if len(pairs) < 3 or any(x is None or y is None for x, y in pairs):
            return None
        return paired([x for x, _ in pairs], [y for _, y in pairs], self.claim.better)

    def _memory(self, used: str) -> dict[str, float]:
        """Megabytes of every arm's peak; a quick run needs as much as a long one."""
        told: dict[str, list[float]] = defaultdict(list)
        for record in self.records:
            if record["hash"] == used and "memory_mb" in record:
                told[record["arm"]].append(record["memory_mb"])
        return {arm: _mean(values) for arm, values in told.items()}

    def _repeated(self, method: str, baseline: str) -> dict[str, Any] | None:
        """The effect and verdict on seeds that the claim did not declare, with the code as it is."""
        table: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for record in self.records:
            if record["seed"] not in self.claim.seeds and record["hash"] == self.hash and not record["quick"]:
                table[record["arm"]][record["seed"]] = record
        effect = self._effect(table, method, baseline)
        seeds = sorted(table[method])
        return None if effect is None else {"seeds": seeds, **asdict(effect), "verdict": verdict(effect, self.claim.smallest, self.claim.at_least)}

    def _flags(self, table: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
        """What should keep a reader from trusting the verdict. Any of them makes it `unclear`."""
        claim, found = self.claim, []
        low, high = claim.span
        for name, runs in table.items():
            values = {s: r["metrics"].get(claim.metric) for s, r in runs.items()}
            found += [f"{name}, seed {s}: {claim.metric} is not a number" for s, v in values.items() if v is None]
            found += [f"{name}, seed {s}: {claim.metric} of {v:g} lies outside {low:g} to {high:g}" for s, v in values.items() if v is not None and not low - 1e-9 <= v <= high + 1e-9]
        return found + _unequal(claim, table)


def _unequal(claim: Claim, table: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """Budgets that should be the same and are not."""
    found = []
    for part in claim.equal:
        for seed in sorted({s for runs in table.values() for s in runs}):
            amounts = {n: runs[seed]["spent"].get(part, 0.0) for n, runs in table.items() if seed in runs and not claim.arms[n].exempt}
            if amounts and max(amounts.values()) > (1 + UNEQUAL) * min(amounts.values()):
                most, least = max(amounts, key=amounts.__getitem__), min(amounts, key=amounts.__getitem__)
                found.append(f"seed {seed}: unequal {part}, {most} {amounts[most]:g} and {least} {amounts[least]:g}")
    return found


def _arm_summary(claim: Claim, arm: Arm, runs: dict[int, dict[str, Any]], memory_mb: float | None) -> dict[str, Any]:
    metrics = sorted({k for r in runs.values() for k in r["metrics"]})
    values = {k: {str(s): runs[s]["metrics"].get(k) for s in sorted(runs)} for k in metrics}
    means = {k: None if None in v.values() else sum(v.values()) / len(v) for k, v in values.items()}  # type: ignore[arg-type]
    spent = sorted({k for r in runs.values() for k in r["spent"]})
    return {
        "role": arm.role, "settings": runs[min(runs)]["settings"], "means": means, "values": values, "seconds": _mean(r["seconds"] for r in runs.values()),
        "memory_mb": memory_mb, "spent": {k: _mean(r["spent"].get(k, 0.0) for r in runs.values()) for k in spent},
    }  # fmt: skip


def _mean(values: Any) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4) if values else 0.0


def _ratio(method: float | None, baseline: float | None) -> float | None:
    """The method's cost over its baseline's."""
    return round(method / baseline, 3) if method and baseline else None


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"luthier": __version__, "python": platform.python_version(), "machine": platform.machine(), **{n: version(n) for n in ("torch", "transformers", "numpy")}}


def is_stale(claim: Claim, folder: Path | None = None) -> bool | None:
    """Whether evidence rests on other code than there is now; None: there is none."""
    store = Store(claim, folder)
    used, records = store.counted()
    return None if not records else used != store.hash
