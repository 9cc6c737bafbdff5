"""What a run came to, in plain words: gained, lost, trusted, moved, and where everything lies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.run import Run

LABELS = {
    "task/exact_match": "answered rightly (test rows)", "task/ood_exact_match": "answered rightly (out of domain)",
    "task/accuracy": "classified rightly (test rows)", "task/ood_accuracy": "classified rightly (out of domain)", "task/score": "score (test rows)", "task/pair_accuracy": "better answer likelier (test rows)",
    "task/recall_at_1": "partner found first (test rows)", "task/nll": "loss a token (test rows)", "task/ood_nll": "loss a token (out of domain)",
    "forgetting/general_score": "general questions answered rightly", "forgetting/general_nll": "loss a token (general rows)",
    "forgetting/kl_to_base": "distance from the base, nats a token", "calibration/ece": "calibration error", "calibration/auroc": "knows when it is right (AUROC)",
    "calibration/brier": "Brier score", "calibration/aurc": "error, averaged over coverage",
}  # fmt: skip
SHARES = ("exact_match", "accuracy", "pair_accuracy", "general_score", "recall_at_1", "score")


def plain_report(run: Run, stages: list[dict[str, Any]], seconds: float) -> tuple[str, dict[str, Any]]:
    """The report as text and as facts."""
    changes = compared(run.measures)
    facts: dict[str, Any] = {"status": "finished", "verdict": verdict(changes), "changes": changes, "stages": stages, "seconds": seconds, "cost": cost(stages), "model": str(run.model_path), "run": str(run.folder)}
    lines = ["", *facts["verdict"], ""]
    if changes:
        lines += _table(changes)
    lines += _notes(run.measures)
    lines += ["", *_rows(stages), *_costs(stages, seconds), "", *_where(run)]
    return "\n".join(lines) + "\n", facts


def compared(measures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every number that has a direction, before and after; missing stays None."""
    before, after = measures.get("before", {}), measures.get("after", {})
    found = []
    for name, result in after.items():
        for key, value in result["numbers"].items():
            direction = result.get("better", {}).get(key)
            if direction is None or value is None:
                continue
            old = before.get(name, {}).get("numbers", {}).get(key)
            found.append(
                {
                    "name": f"{name}/{key}", "label": LABELS.get(f"{name}/{key}", f"{name}: {key.replace('_', ' ')}"), "before": old, "after": value, "better": direction,
                    "interval": [result["numbers"].get(f"{key}_low"), result["numbers"].get(f"{key}_high")], "share": any(key.endswith(s) for s in SHARES),
                }
            )  # fmt: skip
    return found


def verdict(changes: list[dict[str, Any]]) -> list[str]:
    """Up to three sentences: what was gained, what was lost, how far it is to be trusted."""
    by = {c["name"]: c for c in changes}
    said = []
    gained = next((by[n] for n in ("task/exact_match", "task/accuracy", "task/score", "task/recall_at_1", "task/pair_accuracy") if n in by), None)
    if gained is not None:
        said.append(_sentence("Gained" if _improved(gained) else "Not gained", gained))
    lost = by.get("forgetting/general_score")
    if lost is not None and lost["before"] is not None:
        drop = lost["before"] - lost["after"]
        said.append(f"Lost: {_percent(drop)} of the general questions ({_percent(lost['before'])} before, {_percent(lost['after'])} after)." if drop > 0
                    else f"Nothing lost on the general questions ({_percent(lost['before'])} before, {_percent(lost['after'])} after).")  # fmt: skip
    elif gained is not None:
        said.append("What was lost is not known: the data names no general rows.")
    trust = by.get("calibration/ece")
    if trust is not None:
        said.append(f"Its stated confidence is off by {100 * trust['after']:.0f} points on average.")
    return said or ["Nothing was measured: the recipe has no measures, or there are no test rows."]


def _improved(change: dict[str, Any]) -> bool:
    if change["before"] is None:
        return True
    return change["after"] > change["before"] if change["better"] == "higher" else change["after"] < change["before"]


def _sentence(word: str, change: dict[str, Any]) -> str:
    low, high = change["interval"]
    spread = f" (95 % interval {_percent(low)} to {_percent(high)})" if low is not None else ""
    before = f" {_percent(change['before'])} before," if change["before"] is not None else ""
    return f"{word}: {change['label']}:{before} {_percent(change['after'])} after{spread}."


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, share: bool) -> str:
    return "-" if value is None else _percent(value) if share else f"{value:.3f}"


def _table(changes: list[dict[str, Any]]) -> list[str]:
    width = max(len(c["label"]) for c in changes)
    head = f"{'':{width}}  {'before':>10}  {'after':>10}"
    return [head, *(f"{c['label']:{width}}  {_number(c['before'], c['share']):>10}  {_number(c['after'], c['share']):>10}" for c in changes)]


def _notes(measures: dict[str, dict[str, Any]]) -> list[str]:
    notes = [n for result in measures.get("after", {}).values() for n in result.get("notes", [])]
    return ["", *dict.fromkeys(notes)] if notes else []


def _rows(stages: list[dict[str, Any]]) -> list[str]:
    out = []
    for stage in stages:
        steps = stage.get("rows", [])
        if len(steps) > 1:
            out.append("Rows: " + ", then ".join(f"{s['rows']} {'given' if s['step'] == 'given' else 'after ' + s['step']}" for s in steps) + ".")
    return out


def cost(stages: list[dict[str, Any]]) -> dict[str, float]:
    """What the training loops of all stages took."""
    outcomes = [s["outcome"] for s in stages if "outcome" in s]
    total = {"train_seconds": sum(o["seconds"] for o in outcomes), "tokens": float(sum(o["tokens"] for o in outcomes)), "steps": float(sum(o["steps"] for o in outcomes))}
    trained = [o["trained"] for o in outcomes if "trained" in o]
    return {**total, "parameters": float(trained[-1])} if trained else total


def _costs(stages: list[dict[str, Any]], seconds: float) -> list[str]:
    total = cost(stages)
    trained = f", {total['parameters']:,.0f} trained parameters" if "parameters" in total else ""
    peak = max((s["outcome"]["peak_memory"] for s in stages if "outcome" in s), default=0)
    return [f"Cost: {seconds:.0f} s in all, {total['train_seconds']:.0f} s of training in {total['steps']:.0f} steps, {total['tokens']:,.0f} tokens{trained}, peak memory {peak / 2**30:.1f} GiB."]


def _where(run: Run) -> list[str]:
    return [f"Model:    {run.model_path}   (loads with plain transformers or peft)", f"Report:   {run.folder / 'report.html'}   Numbers: {run.folder / 'report.json'}", f"Recipe:   {run.folder / 'recipe.yaml'}"]
