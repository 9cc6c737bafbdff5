"""`python -m bench` measures all rows of the table, `python -m bench sft dpo` some of them; results go to bench/RESULTS.md, results.json and plots/."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import plots, table
from bench.case import WORK, Bench, Row
from bench.cases import CASES, RANK, contrastive
from bench.peers import NotInstalled
from bench.run import Different, Failed, failed, measure, work
from luthier.errors import UserError

SCALING = "scaling"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*CASES, SCALING, []], help="rows of the table, and the curves; default: everything")
    parser.add_argument("--repeats", type=int, default=2, help="turns of both sides (default 2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, help="the causal language model's folder (default: the fetched SmolLM2-135M)")
    parser.add_argument("--encoder", type=Path, help="the encoder's folder (default: the fetched MiniLM)")
    parser.add_argument("--quick", action="store_true", help="once and at small sizes, to see that every row runs; the figures go to bench/.work/quick and say nothing")
    parser.add_argument("--out", type=Path, help="where results go (default: bench/)")
    return parser.parse_args()


def bench_of(given: argparse.Namespace) -> Bench:
    from luthier.core.fetch import cache_folder

    model = given.model or cache_folder() / "smollm2-135m"
    return Bench(small(model) if given.quick else model, given.encoder or cache_folder() / "minilm", given.threads, given.quick)


def small(model: Path) -> Path:
    """A network of two narrow layers with the model's tokenizer, for a quick look."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = WORK / "small"
    if not (folder / "model.safetensors").exists():
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        AutoTokenizer.from_pretrained(model).save_pretrained(folder)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, **sizes)).save_pretrained(folder)
    return folder


def curves(bench: Bench) -> dict[str, Any]:
    """How our seconds grow with the size of the work, and our memory with the batch of contrastive tuning; one that fails leaves the others."""
    job = {"model": str(bench.model), "threads": bench.threads, "rank": RANK, "steps": 2}
    sizes = {"lengths": [64, 128, 256, 512], "batches": [2, 4, 8, 16], "rollouts": [2, 4, 8, 16], "rows": [30_000, 100_000, 200_000, 300_000]}
    if bench.quick:
        sizes = {name: [size // (20 if name == "rows" else 1) for size in found[:2]] for name, found in sizes.items()}
    found: dict[str, Any] = {}
    for parts in (lambda: work(sys.executable, "ours_scaling", {**job, **sizes}), lambda: contrastive_memory(bench)):
        try:
            found |= parts()
        except Failed as error:
            found[f"curves {len(found)}"] = {"failed": " ".join(str(error).split())}
    return found


def contrastive_memory(bench: Bench) -> dict[str, Any]:
    """The most memory of a step with cached gradients, over the batch: each in a process of its own, which has allocated nothing before."""
    sizes = [64, 256] if bench.quick else [64, 256, 1024]
    jobs = [{**contrastive(bench, size), "threads": bench.threads} for size in sizes]
    points = [(job["batch"], work(sys.executable, "ours_train", job)["extra_bytes"] / 1e9) for job in jobs]
    return {"contrastive-memory": {"title": "Memory of contrastive tuning over its batch, gradients cached", "x": "pairs a batch", "y": "GB beyond the model", "points": points}}


def main() -> int:
    given = arguments()
    bench, wanted = bench_of(given), given.rows or [*CASES, SCALING]
    out = given.out or (WORK / "quick" if given.quick else table.HERE)
    out.mkdir(parents=True, exist_ok=True)
    wrong = sum(not one(name, bench, 1 if given.quick else given.repeats, out) for name in wanted)
    for checkpoints in WORK.glob("checkpoints/*/*/model.safetensors"):
        checkpoints.unlink()
    print(f"{out / 'RESULTS.md'}: {len(wanted) - wrong} of {len(wanted)} rows measured.", file=sys.stderr)
    return 1 if wrong else 0


def one(name: str, bench: Bench, repeats: int, out: Path) -> bool:
    """Measure one row and write the table anew, so that a run that is stopped keeps what it has. A row that fails is written as failed."""
    file = out / "results.json"
    scaling = json.loads(file.read_text(encoding="utf-8")).get("scaling", {}) if file.exists() else {}
    rows: list[Row] = []
    if name == SCALING:
        scaling = curves(bench)
        plots.write(scaling, out / "plots")
        good = all(found.get("points") for found in scaling.values())
    else:
        rows.append(attempt(name, bench, repeats))
        good = not rows[-1].failed
        print(table._line(rows[-1]), rows[-1].failed, sep="", flush=True)
    table.write(table.merged(rows, file, list(CASES)), scaling, out)
    return good


def attempt(name: str, bench: Bench, repeats: int) -> Row:
    try:
        return measure(CASES[name], bench, repeats)
    except (Different, Failed, NotInstalled, UserError, OSError) as error:
        return failed(CASES[name], str(error))


if __name__ == "__main__":
    sys.exit(main())
