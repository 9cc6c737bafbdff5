"""`python -m bench` measures all rows of the table, `python -m bench sft dpo` some of them; results go to bench/RESULTS.md, results.json and plots/."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import plots, table
from bench.case import WORK, Bench, Row
from bench.cases import CASES, RANK
from bench.run import Different, Failed, measure, work

SCALING = "scaling"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*CASES, SCALING, []], help="rows of the table, and the curves; default: everything")
    parser.add_argument("--repeats", type=int, default=2, help="turns of both sides (default 2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="the causal language model's folder (default: the fetched SmolLM2-135M)")
    parser.add_argument("--encoder", type=Path, help="the encoder's folder (default: the fetched MiniLM)")
    parser.add_argument("--out", type=Path, default=table.HERE, help="where results go")
    return parser.parse_args()


def bench_of(given: argparse.Namespace) -> Bench:
    from luthier.core.fetch import cache_folder

    return Bench(given.model or cache_folder() / "smollm2-135m", given.encoder or cache_folder() / "minilm", given.threads)


def curves(bench: Bench) -> dict[str, Any]:
    """How our seconds grow with the size of the work."""
    job = {"model": str(bench.model), "threads": bench.threads, "rank": RANK, "steps": 2, "lengths": [64, 128, 256, 512], "batches": [2, 4, 8, 16], "rollouts": [2, 4, 8, 16],
           "rows": [30_000, 100_000, 200_000, 300_000]}  # fmt: skip
    return work(sys.executable, "ours_scaling", job)


def main() -> int:
    given = arguments()
    bench, wanted = bench_of(given), given.rows or [*CASES, SCALING]
    given.out.mkdir(parents=True, exist_ok=True)
    file, wrong = given.out / "results.json", 0
    for name in wanted:
        scaling = json.loads(file.read_text(encoding="utf-8")).get("scaling", {}) if file.exists() else {}
        rows: list[Row] = []
        try:
            if name == SCALING:
                scaling = curves(bench)
                plots.write(scaling, given.out / "plots")
            else:
                rows.append(measure(CASES[name], bench, given.repeats))
                print(table._line(rows[-1]), end="", flush=True)
        except (Different, Failed) as error:
            print(error, file=sys.stderr)
            wrong += 1
        # after every row, so that a run that is stopped keeps what it has
        table.write(table.merged(rows, file, list(CASES)), scaling, given.out)
    for checkpoints in WORK.glob("checkpoints/*/*/model.safetensors"):
        checkpoints.unlink()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
