"""mergekit's side of the comparison, run by the interpreter of its own environment: merges that come as JSON, in fp32."""

import json
import sys

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

OPTIONS = {"lazy_unpickle": True, "copy_tokenizer": False, "quiet": True, "write_model_card": False}


def main(jobs):
    for folder, recipe in jobs.items():
        torch.manual_seed(12345)  # no seed of the checkpoints: one stream would tie what is dropped to what was added
        run_merge(MergeConfiguration.model_validate({"dtype": "float32", **recipe}), folder, MergeOptions(**OPTIONS))


if __name__ == "__main__":
    main(json.load(sys.stdin))
