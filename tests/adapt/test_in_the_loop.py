"""Adapters and optimizers in the real loop: a stopped run continues bit for bit, and what it exports is what it learned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from luthier.catalog import method
from luthier.core.context import Context
from luthier.core.engine import Engine, Plan
from luthier.core.journal import Journal
from luthier.core.models import load
from luthier.objective import Supervised
from tests.adapt._rows import ROWS, by_ids
from tests.helpers import tiny_llama

SETTINGS = {
    "epochs": 1.0, "steps": 4, "batch": 4, "tokens_per_micro_batch": 16, "seed": 0, "schedule": "linear", "warmup": 0.0, "clip": 1.0, "precision": "fp32",
    "gradient_checkpointing": False, "reuse": 1, "save_every": 1, "keep": 2, "log_every": 1, "eval_every": None,
}  # fmt: skip
ADAPTERS = {
    "full": {}, "lora": {"rank": 2, "dropout": 0.1}, "pissa": {"rank": 4}, "corda": {"rank": 4, "samples": 6}, "adalora": {"rank": 1, "start_rank": 3, "every": 1},
    "hft": {"redraw": "steps", "every": 1}, "owlore": {"active": 1, "every": 1, "samples": 4}, "lofit": {"number": 2},
    "spiel": {"density": 0.1, "every": 2, "collect": 1}, "prompt-tuning": {"tokens": 2},
}  # fmt: skip
OPTIMIZERS = {"adamw": {"lr": 0.01}, "galore": {"lr": 0.01, "rank": 2, "refresh": 2}, "sm3": {"lr": 0.02},
              "sam": {"lr": 0.01}, "tram": {"lr": 0.01, "variant": "previous"}}  # fmt: skip


class NLL(Supervised):
    axis, name = "objective", "nll"


def engine(folder, adapt, optimize, more=None):
    model = by_ids(tiny_llama(hidden=16, layers=2, vocab=48))
    tuner = method("adapt", adapt)(**{**ADAPTERS[adapt], **(more or {})})
    plan = Plan(model, ROWS, [(NLL(), 1.0)], method("optimize", optimize)(**OPTIMIZERS[optimize]), [tuner])
    ctx = Context(model, 0, streams={"train": ROWS})
    return Engine(plan, SimpleNamespace(**SETTINGS), ctx, folder, Journal(folder / "metrics.jsonl"))


def tensors(made):
    return {k: v.clone() for k, v in made.model.network.state_dict().items()}


PAIRS = [(a, "adamw", {}) for a in ADAPTERS] + [("full", o, {}) for o in ("galore", "tram")] + [
    ("owlore", "galore", {}), ("spiel", "sm3", {"variant": "ma"}), ("spiel", "sam", {}), ("hft", "tram", {}),
]  # fmt: skip


@pytest.mark.parametrize("adapt, optimize, more", PAIRS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_stopped_run_continues_bit_for_bit(adapt, optimize, more, tmp_path):
    whole = engine(tmp_path / "whole", adapt, optimize, more)
    start = tensors(whole)
    whole.run()
    assert any(not torch.equal(start.get(k, torch.empty(0)), v) for k, v in tensors(whole).items())
    cut = engine(tmp_path / "cut", adapt, optimize, more)
    step = cut._step

    def stopping(*args):
        if cut.ctx.clock.step == 2:
            raise KeyboardInterrupt
        return step(*args)

    cut._step = stopping
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    again = engine(tmp_path / "cut", adapt, optimize, more)
    again.run(resume=True)
    wanted, got = tensors(whole), tensors(again)
    assert wanted.keys() == got.keys()
    assert [k for k in wanted if not torch.equal(wanted[k], got[k])] == []


@pytest.mark.parametrize("adapt", ["full", "hft", "owlore", "spiel", "lofit"])
def test_the_exported_folder_is_the_tuned_model(adapt, tmp_path):
    made = engine(tmp_path / "run", adapt, "adamw")
    made.run()
    made.model.eval()
    batch = made.model.collate(ROWS)
    with torch.no_grad():
        wanted = made.model.score(batch).logp
    made.plan.adapters[0].export(made.model, tmp_path / "model")
    loaded = load(str(tmp_path / "model"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.score(batch).logp, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(made.model.score(batch).logp, wanted, atol=0, rtol=0)


def test_a_second_stage_exports_the_merged_network(tmp_path):
    made = engine(tmp_path / "one", "lora", "adamw")
    made.run()
    tuner = method("adapt", "lora")(rank=2)
    tuner.attach(made.model)
    made.model.eval()
    with torch.no_grad():
        wanted = made.model.score(made.model.collate(ROWS)).logp
    tuner.export(made.model, tmp_path / "model")
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    with torch.no_grad():
        torch.testing.assert_close(load(str(tmp_path / "model")).score(made.model.collate(ROWS)).logp, wanted, atol=1e-5, rtol=1e-4)
