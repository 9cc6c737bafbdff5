"""mergekit's side of the merging rows, in fp32, tensor by tensor with lazy reading: its least memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from bench.checkpoints import samples
from bench.worker import Job, Memory, main, timed


def recipe(job: Job) -> dict[str, Any]:
    if job["method"] == "linear":
        return {"merge_method": "linear", "dtype": "float32", "models": [{"model": m, "parameters": {"weight": 1.0}} for m in job["tuned"]]}
    models = [{"model": m, "parameters": {"weight": 1.0, "density": job["density"]}} for m in job["tuned"]]
    return {"merge_method": "ties", "dtype": "float32", "base_model": job["base"], "parameters": {"normalize": True}, "models": models}


def merge(job: Job) -> Job:
    """Seconds and memory of reading, merging and writing."""
    config = MergeConfiguration.model_validate(recipe(job))
    options = MergeOptions(lazy_unpickle=True, copy_tokenizer=False, quiet=True, write_model_card=False)
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder, Memory() as memory:
        seconds = timed(lambda: run_merge(config, folder, options), job["warmup"], job["steps"])
        extra = memory.extra
        return {**seconds, "check": samples(Path(folder)), "extra_bytes": extra}


if __name__ == "__main__":
    main(merge)
