"""Every method of the catalogue passes its axis's battery; and the battery notices what it is there to notice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from luthier.adapt import Adapter
from luthier.catalog import entries, register
from luthier.core.loss import Loss
from luthier.core.plugin import Group, Parts
from luthier.measure import Measure, Measures
from luthier.objective import Supervised
from luthier.optimize import Optimizer, torch_groups
from luthier.select import Picks, Selector
from luthier.testing import check_method
from luthier.testing.battery import AXIS, COMMON, NotConforming
from luthier.testing.matrix import settled

ALL = [f"{e.axis}/{e.name}" for e in entries()]


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
    with settled():
        yield


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ALL)
def test_conforms(method):
    axis = method.partition("/")[0]
    assert check_method(method) == [check.__name__ for check in (*COMMON, *AXIS[axis])]


# what it notices --------------------------------------------------------------------------------------------------------


def refused(cls: Any, *words: str) -> None:
    with pytest.raises(NotConforming) as found:
        check_method(cls)
    assert all(w in str(found.value) for w in words), str(found.value)


def test_a_field_without_documentation():
    @register("undocumented")
    @dataclass
    class Undocumented(Measure):
        """Counts rows, and has a field that nobody explains."""

        weight: float = 1.0

        def measure(self, model, rows, ctx=None):
            return Measures({"rows": 1.0})

    refused(Undocumented, "weight", "no documentation")


def test_a_field_that_hides_a_hook():
    @register("hides-a-hook")
    @dataclass
    class Hides(Supervised):
        """A loss whose field bears the name of a hook."""

        penalty: float = 0.1  # Weight of nothing.

    refused(Hides, "penalty", "hides")


def test_a_selector_that_draws_anew_each_time():
    @register("unseeded")
    @dataclass
    class Unseeded(Selector):
        """Draws rows without a seed, so that no two runs agree."""

        calls: ClassVar[list[int]] = []

        def select(self, rows, budget, ctx=None):
            self.calls.append(1)
            return Picks([(i + len(self.calls)) % len(rows) for i in range(budget)])

    refused(Unseeded, "same seed")


def test_a_selector_that_changes_its_rows():
    @register("scribbles")
    @dataclass
    class Scribbles(Selector):
        """Writes into the rows that it is asked to choose from."""

        def select(self, rows, budget, ctx=None):
            for row in rows:
                row["seen"] = True
            return Picks(range(budget))

    refused(Scribbles, "changes the rows")


def test_an_adapter_that_trains_what_no_group_names():
    @register("stray")
    @dataclass
    class Stray(Adapter):
        """Names one parameter and leaves all others trainable."""

        def attach(self, model, ctx=None):
            name, param = next(iter(model.network.named_parameters()))
            return Parts([Group("body", {name: param})])

    refused(Stray, "no group names it")


def test_an_adapter_that_says_it_switches_off():
    @register("sticks")
    @dataclass
    class Sticks(Adapter):
        """Trains all weights in place, and claims to be switched off exactly."""

        switchable = True

        def attach(self, model, ctx=None):
            return Parts([Group("body", dict(model.network.named_parameters()))])

    refused(Sticks, "disabled", "original")


def test_a_loss_that_is_nan_on_nothing():
    @register("divides-by-nothing")
    @dataclass
    class Divides(Supervised):
        """Means over the supervised tokens, of which there may be none."""

        default_loss = False

        def loss(self, model, batch, ctx=None):
            return Loss().add("mean", -model.score(batch).logp.mean(), per="batch")

    refused(Divides, "nothing supervised")


def test_an_optimizer_that_moves_what_has_no_gradient():
    @register("shrinks-all")
    @dataclass
    class Shrinks(Optimizer):
        """Shrinks every parameter at each step, gradient or none."""

        lr: float = 1e-3  # Peak learning rate.

        def build(self, groups, ctx=None):
            class Shrink(torch.optim.SGD):
                def step(self, closure=None):
                    for group in self.param_groups:
                        for param in group["params"]:
                            param.data.mul_(0.9)

            return Shrink(torch_groups(groups, self.lr), lr=self.lr)

    refused(Shrinks, "without gradient")


def test_a_state_that_is_lost_in_a_checkpoint():
    @register("forgets")
    @dataclass
    class Forgets(Supervised):
        """Counts its steps, and does not take the count back from a checkpoint."""

        default_loss = False

        def __post_init__(self):
            self.tokens = torch.zeros(1).uniform_()

        def loss(self, model, batch, ctx=None):
            return Loss().add("nll", -model.score(batch).logp)

        def state_dict(self):
            return {"tokens": self.tokens}

    refused(Forgets, "checkpoint")


def test_a_run_that_does_not_resume_to_the_same_weights(tmp_path):
    @register("ages")
    @dataclass
    class Ages(Supervised):
        """Weighs the loss by how often it was called, and forgets that when a run is cut."""

        default_loss = False

        def __post_init__(self):
            self.age = 0

        def loss(self, model, batch, ctx=None):
            self.age += 1
            return Loss().add("nll", -model.score(batch).logp, weight=1.0 / self.age)

        def after_step(self, step, ctx):
            for group in step.groups:
                for param in group.params.values():
                    param.data.mul_(1 - 0.01 * self.age)

    refused(Ages, "resumed run")
