"""Speed against the plain way of doing the same thing, in one run: `make bench` writes bench/RESULTS.md and results.json.

Every figure is a ratio; both sides compute the same numbers, which is checked first."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent


def best(run: Callable[[], Any], times: int = 3) -> float:
    """The shortest of some runs, in seconds, after a warm-up."""
    run()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def shared_prompts() -> dict[str, Any]:
    """A forward and backward pass of supervised rows whose prompts begin alike: forest against padded rows with full logits."""
    import torch.nn.functional as F

    from luthier.core.models import load
    from luthier.core.rows import encode

    family: Any = load("smollm2-135m")
    family.network.requires_grad_(False)
    for name, p in family.network.named_parameters():
        p.requires_grad_("q_proj" in name)
    rows = [{"prompt": f"Write this date as YYYY-MM-DD: {i + 1} March {1950 + i}", "completion": f"{1950 + i}-03-{i + 1:02d}"} for i in range(12)]
    sequences = [s for i, r in enumerate(rows) for s in encode(r, family.tokenizer, row=i)]
    width = max(len(s) for s in sequences)
    ids = torch.tensor(np.stack([np.pad(s.ids, (0, width - len(s))) for s in sequences]))
    labels = torch.tensor(np.stack([np.pad(np.where(s.mask, s.ids, -100), (0, width - len(s)), constant_values=-100) for s in sequences]))

    def ours() -> float:
        loss = -family.score(sequences).logp.mean()
        loss.backward()
        return float(loss)

    def plain() -> float:
        logits = family.network(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        return float(loss)

    assert abs(ours() - plain()) < 1e-3
    a, b = best(ours), best(plain)
    return {"work": "supervised step, 12 chat rows that share their beginning (SmolLM2-135M)", "peer": "padded rows, logits everywhere", "ours_s": a, "peer_s": b, "ratio": b / a}


def mig_selection() -> dict[str, Any]:
    """MIG on 20,000 rows against the dense greedy, same picks."""
    from luthier.select.mig import mig

    rng = np.random.default_rng(0)
    n, tags, budget = 20_000, 400, 400
    lists = [sorted(set((rng.zipf(1.5, 3) % tags).tolist())) for _ in range(n)]
    quality = rng.uniform(0.1, 1, n)

    def dense() -> np.ndarray:
        x = np.zeros((n, tags))
        for i, some in enumerate(lists):
            x[i, some] = quality[i]
        total, used, picks = np.zeros(tags), np.zeros(n, bool), []
        for _ in range(budget):
            gain = x @ (0.8 * (total + 1e-6) ** -0.2)
            gain[used] = -np.inf
            picks.append(int(gain.argmax()))
            used[picks[-1]] = True
            total += x[picks[-1]]
        return np.array(picks)

    columns = sorted({t for some in lists for t in some})
    matrix = np.zeros((n, tags))
    for i, some in enumerate(lists):
        matrix[i, some] = 1
    assert columns and np.array_equal(mig(matrix, quality, budget), dense())
    a, b = best(lambda: mig(matrix, quality, budget)), best(dense, 1)
    return {"work": f"MIG, {budget} of {n} rows, {tags} tags", "peer": "dense greedy, one matrix-vector product a pick", "ours_s": a, "peer_s": b, "ratio": b / a}


def main() -> None:
    results = [shared_prompts(), mig_selection()]
    about = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = ["# Speed", "", f"Measured by `make bench` on {about}. Ratios of wall time in one run; above 1 is faster than the peer.", "", "| work | peer | ours | peer | ratio |", "|---|---|---|---|---|"]
    lines += [f"| {r['work']} | {r['peer']} | {r['ours_s']:.2f} s | {r['peer_s']:.2f} s | {r['ratio']:.2f} |" for r in results]
    (HERE / "RESULTS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (HERE / "results.json").write_text(json.dumps({"machine": about, "results": results}, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
