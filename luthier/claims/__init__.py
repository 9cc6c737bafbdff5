"""Claims: one small experiment a paper, which anyone can run.

A claim file is `NNN_slug.py`. It declares what the paper says and how that is measured, and gives its arms as functions:

    claim = Claim(paper=33, says="...", published="...", metric="exact match", smallest=0.02, equal=("rows",))

    @claim.arm("method", grid={"lr": (3e-4, 1e-3, 3e-3)})
    def mig(trial): ...
        return {"exact match": ...}

Each arm is run once a seed and gives its numbers; `luthier claims run SLUG` compares the method's arm with the baseline's.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from luthier.errors import RecipeError, nearest

HERE = Path(__file__).parent
Role = Literal["method", "baseline", "control", ""]
GRID_SEED = 100
"""Where grids are searched; never a reported seed."""


@dataclass(frozen=True)
class Arm:
    """One way of doing the job."""

    name: str
    run: Callable[[Any], Mapping[str, float]] = field(repr=False)
    role: Role = ""
    """`--quick` runs only method, baseline and control; only an arm without a role may be dropped for time."""
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """What is chosen for this arm on the grid seed, from these values."""
    exempt: bool = False
    """Its budget differs by its nature (an untrained start, an upper bound), so it is not held against the others."""


@dataclass
class Claim:
    """A paper's headline as an experiment."""

    paper: int
    says: str
    """The headline, as one sentence about what is measured here."""
    published: str
    """What the paper reports for it."""
    metric: str
    smallest: float
    """The smallest effect worth speaking of, declared before anything was run."""
    better: Literal["higher", "lower"] = "higher"
    span: tuple[float, float] = (0.0, 1.0)
    """Where the metric can lie; a value outside is a mistake and is flagged."""
    at_least: float = 0.0
    """The claim is that the improvement exceeds this; below zero it says "no worse by more than"."""
    equal: tuple[str, ...] = ("rows",)
    """Which parts of the budget (rows, steps, tokens, ...) must be the same in every arm."""
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = ()
    """The methods that are on trial, as axis/name."""
    tasks: tuple[str, ...] = ()
    """The lab's tasks and models that it uses; with the methods they decide when its evidence is stale."""
    models: tuple[str, ...] = ()
    departs: str = ""
    """Where this experiment is not the paper's: what the reader must know before quoting the figure."""
    reason: str = ""
    """After a result that does not reproduce: what we think the cause is."""
    arms: dict[str, Arm] = field(default_factory=dict)
    slug: str = ""
    file: Path = HERE

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 3:
            raise RecipeError(f"A claim needs three or more seeds; that of paper {self.paper} has {len(set(self.seeds))}.")
        if GRID_SEED in self.seeds:
            raise RecipeError(f"Seed {GRID_SEED} is where grids are searched; a claim may not report it.")
        if self.smallest <= 0:
            raise RecipeError("A claim declares the smallest effect worth speaking of, a number above 0.")

    def arm(self, role: Role = "", name: str | None = None, grid: Mapping[str, tuple[Any, ...]] | None = None, exempt: bool = False) -> Callable[..., Any]:
        """Makes a function an arm of this claim."""

        def register(function: Callable[[Any], Mapping[str, float]]) -> Callable[[Any], Mapping[str, float]]:
            key = name or function.__name__.replace("_", " ")
            if key in self.arms or (role in ("method", "baseline") and role in {a.role for a in self.arms.values()}):
                raise RecipeError(f"The claim of paper {self.paper} has two arms '{key if key in self.arms else role}'.")
            self.arms[key] = Arm(key, function, role, dict(grid or {}), exempt)
            return function

        return register

    def of_role(self, role: Role) -> Arm:
        for arm in self.arms.values():
            if arm.role == role:
                return arm
        raise RecipeError(f"The claim {self.slug} has no arm of the role '{role}'.")

    def chosen_arms(self, quick: bool) -> list[Arm]:
        return [a for a in self.arms.values() if a.role or not quick]


def names() -> list[str]:
    """The claims that are there: `033_mig`, ..."""
    return sorted(p.stem for p in HERE.glob("[0-9][0-9][0-9]_*.py"))


def find(which: str | int) -> Claim:
    """A claim by its paper's number, its slug, or its file's name; or a file of your own, whose evidence is written beside it."""
    known = names()
    if str(which).endswith(".py") and Path(str(which)).is_file():
        return _read(Path(str(which)).resolve())
    text = str(which).strip().replace("-", "_").removesuffix(".py")
    for name in known:
        number, _, slug = name.partition("_")
        if text in (name, slug, number, str(int(number))):
            return _read(HERE / f"{name}.py")
    raise RecipeError(f"There is no claim '{which}'.{nearest(text, [*known, *(n[4:] for n in known)])} `luthier claims list` names them.")


def _read(file: Path) -> Claim:
    """The claim of a file. A file's name begins with a digit, so it is loaded by its path."""
    name = f"luthier.claims.{file.stem}" if file.parent == HERE else f"luthier_claim_{file.stem}"
    module = sys.modules.get(name)
    if module is None or module.__file__ != str(file):
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    claim = getattr(module, "claim", None)
    if not isinstance(claim, Claim):
        raise RecipeError(f"{file} defines no `claim = Claim(...)`.")
    claim.slug, claim.file = file.stem, file
    for role in ("method", "baseline"):
        claim.of_role(role)  # type: ignore[arg-type]
    return claim
