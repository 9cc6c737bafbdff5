"""Every method that takes part in training, in each parallel mode it declares, against one process."""

import json

import pytest
import yaml

from luthier.catalog import entries
from luthier.core import ranks
from luthier.core.plugin import Plugin, defines
from luthier.testing.toys import recipe, shared_family
from tests.toy_runs import attempts

NOISY = {"adapt/monteclora", "adapt/pvera", "objective/masked-thought", "objective/one-token-rollout", "objective/prefix-rft"}
"""Their noise or answers are drawn row by row, and rows are shared out."""
HOOKS = ("batches", "turn", "pick", "prepare", "before_step", "penalty", "after_backward", "after_step")


def trains(cls: type[Plugin]) -> bool:
    return cls.axis in ("adapt", "objective", "optimize") or any(defines(cls, hook) for hook in HOOKS)


def jobs(folder, axis):
    for entry in entries(axis):
        cls = entry.load()
        for mode in ("single", *sorted({"ddp", "fsdp"} & ranks.modes(cls))) if trains(cls) else ():
            home = folder / f"{entry.name}-{mode}"
            home.mkdir()
            made = recipe({axis: cls}, shared_family([cls]), home / "run")
            made["train"] |= {"parallel": "auto" if mode == "single" else mode, "log_every": 1}
            (home / "recipe.yaml").write_text(yaml.safe_dump(made))
            yield (f"{axis}/{entry.name}", mode, home), {"argv": ["tune", str(home / "recipe.yaml"), "--run", str(home / "run"), "--quiet"], "processes": 1 if mode == "single" else 2}


def losses(home):
    return [json.loads(line)["loss"] for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["adapt", "objective", "optimize", "select"])
def test_methods_learn_in_two_processes_what_they_learn_in_one(tmp_path, axis):
    asked = list(jobs(tmp_path, axis))
    found = [result for at in range(0, len(asked), 12) for result in attempts(tmp_path, [job for _, job in asked[at : at + 12]])]
    wrong, alone = [], {}
    for ((name, mode, home), _), result in zip(asked, found):
        if result["code"]:
            wrong.append(f"{name} {mode}: {result['err'].strip().splitlines()[-1:]}")
        elif mode == "single":
            alone[name] = losses(home)
        elif name not in NOISY and losses(home) != pytest.approx(alone.get(name), abs=2e-3):
            wrong.append(f"{name} {mode}: {losses(home)} is not {alone.get(name)}")
    assert not wrong, "\n".join(wrong)
