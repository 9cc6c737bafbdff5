"""The parts that the processes of both sides share."""

import numpy as np
import torch

from bench import texts, worker
from bench.worker import Clock, Memory


def test_the_first_steps_start_the_clock():
    clock = Clock(warmup=2)
    clock.ends = clock.starts = [(0.0, 0.0), (5.0, 1.0), (6.0, 1.5), (8.0, 3.0)]
    assert clock.result == {"seconds": [1.0, 2.0], "cpu_seconds": [0.5, 1.5]}


def test_the_clock_stands_still_between_steps():
    now = iter([(0.0, 0.0), (7.0, 7.0), (8.0, 7.5), (20.0, 9.0)])
    clock = Clock(1, lambda: 4.0)
    clock._now = lambda: next(now)
    clock.tick()
    clock.tick()
    assert clock.result == {"seconds": [1.0], "cpu_seconds": [0.5]} and clock.found == [4.0, 4.0]


def test_what_was_allocated_meanwhile_is_seen():
    with Memory() as memory:
        kept = torch.ones(50_000_000)
        memory.over.wait(0.2)
    assert memory.extra > 0.9 * kept.nbytes


def test_adapters_start_alike_by_name_whatever_was_drawn_before():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(4, 3), "base": torch.nn.Linear(4, 3)})

    first, second = Layer(), Layer()
    base = second.layers["base"].weight.clone()
    for one in (first, second):
        worker.start_adapter(one)
        torch.rand(3)
    assert torch.equal(first.layers["lora_A"].weight, second.layers["lora_A"].weight) and first.layers["lora_A"].weight.any()
    assert torch.equal(second.layers["base"].weight, base)


def test_texts_have_the_tokens_that_were_asked_for():
    writer = texts.Writer(["one", "two", "three"])
    rows = texts.completions(writer, 3, 8, 4, system=5)
    shared = " ".join(rows[0]["prompt"].split()[:5])
    assert all(row["prompt"].startswith(shared) and row["completion"].startswith(" ") for row in rows)
    (given,) = texts.rollouts(writer, 1, 6, 5, 4)
    assert len(given["answers"]) == 4 and abs(sum(given["advantages"])) < 1e-9 and len(given["answers"][0].split()) == 4
    lists, quality = texts.tags(50, 10)
    assert len(lists) == len(quality) == 50 and all(1 <= len(some) <= 8 for some in lists)
    assert np.array_equal(quality, texts.tags(50, 10)[1])


def test_rows_of_a_step_come_in_order_of_length():
    rows = [{"prompt": "a " * n} for n in (3, 1, 2, 9, 8)]
    assert [len(r["prompt"].split()) for r in texts.by_length(rows, 3)] == [1, 2, 3, 8, 9]
