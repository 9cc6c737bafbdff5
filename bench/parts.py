"""Where the time of one step goes: torch's profiler sums up its operations by kind. Needs torch alone."""

from __future__ import annotations

import math
import time
from typing import Any

from torch.profiler import ProfilerActivity, profile

PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1, "aten::baddbmm_": 1}
"""Matrix products, and which of their inputs is the first factor."""


class Parts:
    """One step under the profiler: `start` before it, `stop` after it."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        """Shares of the step's seconds; of the products also how many operations they are, and how many a second."""

    def start(self) -> None:
        self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.profile.__enter__()
        self.began = time.perf_counter()

    def stop(self) -> None:
        whole = time.perf_counter() - self.began
        self.profile.__exit__(None, None, None)
        seconds = {"products": 0.0, "attention": 0.0, "others": 0.0}
        operations = 0.0
        for event in self.profile.key_averages(group_by_input_shape=True):
            spent, name = event.self_cpu_time_total / 1e6, event.key
            if name in PRODUCTS:
                seconds["products"] += spent
                operations += event.count * _operations(event.input_shapes[PRODUCTS[name] :])
            elif "scaled_dot_product" in name:
                seconds["attention"] += spent
            elif name.startswith("aten::"):
                seconds["others"] += spent
        self.found = {name: value / whole for name, value in seconds.items()} | {"flops": operations, "flops_per_second": operations / max(seconds["products"], 1e-9)}


def _operations(shapes: Any) -> float:
    """Two for every multiply-add of a (batched) product."""
    return 2.0 * math.prod(shapes[0]) * shapes[1][-1]


def sentence(parts: dict[str, float]) -> str:
    """The parts in words."""
    between = 1 - parts["products"] - parts["attention"] - parts["others"]
    return (
        f"of one step under torch's profiler {100 * parts['products']:.0f} % are matrix products ({parts['flops'] / 1e9:,.0f} GFLOP at {parts['flops_per_second'] / 1e9:.0f} GFLOP/s, narrow ones "
        f"among them; with attention {parts['must'] / 1e9:,.0f} must be done in this step), {100 * parts['attention']:.0f} % attention's kernel, {100 * parts['others']:.0f} % all other operations, {100 * between:.0f} % what lies between operations"
    )
