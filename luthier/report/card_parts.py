"""The parts of a report card, each from the run's facts. A part of which nothing is known says so and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.report import compared
from luthier.report.charts import Interval, Point, heat, intervals, lines, scatter
from luthier.report.html import Raw, code, columns, details, number, paragraphs, percent, section, table, text
from luthier.report.reading import Facts

SHOWN, AT_ONCE = 150, 6
"""Examples in a stream's list, and those that show before more are asked for."""
STREAMS = {"test": "test rows", "ood": "out of domain", "general": "general questions"}


def changes_of(facts: Facts, measure: str) -> list[dict[str, Any]]:
    return [c for c in compared(facts.measures) if c["name"].startswith(f"{measure}/")]


def change_table(changes: list[dict[str, Any]]) -> Raw:
    """Before, after, and which way is better."""
    rows = []
    for c in changes:
        show = percent if c["share"] else number
        low, high = c["interval"]
        spread = f"{show(low)} to {show(high)}" if low is not None else "-"
        better = None if c["before"] is None or c["after"] == c["before"] else (c["after"] > c["before"]) == (c["better"] == "higher")
        word = "-" if better is None else Raw(f'<span class="{"good" if better else "bad"}">{"better" if better else "worse"}</span>')
        rows.append((c["label"], show(c["before"]), show(c["after"]), spread, word))
    return table(("", "before", "after", "95 % interval", ""), rows) if rows else Raw("")


def notes(facts: Facts, *measures: str) -> Raw:
    return paragraphs(*(n for m in measures for n in facts.measures.get("after", {}).get(m, {}).get("notes", [])))


def _missing(facts: Facts, measure: str, what: str) -> Raw:
    """Why a measure gave nothing."""
    if facts.status != "finished":
        return paragraphs(f"{what} was not measured: the run did not finish.")
    asked = any(measure == (m.get("method") if isinstance(m, dict) else m) for m in facts.recipe.get("measure") or [])
    why = "the measure gave no result" if asked else f"`{measure}` is not among the recipe's measures"
    return notes(facts, measure) or paragraphs(f"{what} was not measured: {why}.")


# -- what was gained, what was lost ------------------------------------------------------------------------------------------


def gained_part(facts: Facts) -> Raw:
    changes = changes_of(facts, "task")
    if not changes:
        return section("Gained", _missing(facts, "task", "The task"))
    shares = [c for c in changes if c["share"]]
    return section("Gained", columns(_before_after("Right before and after", shares, facts), change_table(changes)), *(_flips(s, rows) for s, rows in facts.examples().items() if s != "general"), notes(facts, "task"))


def _before_after(title: str, shares: list[dict[str, Any]], facts: Facts) -> str:
    rows = []
    for c in shares:
        measure, key = c["name"].split("/")
        for kind, when in ((5, "before"), (0, "after")):
            found = facts.numbers(measure, when)
            of = c["label"].partition("(")[2].rstrip(")") or "general"
            rows.append(Interval(f"{of}, {when}", found.get(key), found.get(f"{key}_low"), found.get(f"{key}_high"), kind=kind))
    return intervals(title, rows, "share", "Bars are 95 % intervals of the share over these rows (Wilson).", zero=False, rules=(0.0, 1.0)) if rows else ""


def _flips(stream: str, rows: list[dict[str, Any]]) -> Raw:
    """How many single rows went either way: a mean hides them."""
    pairs = [(r["score_before"], r["score"]) for r in rows if r["score_before"] is not None and r["score"] is not None]
    if not pairs:
        return Raw("")
    gained, lost = sum(a > b for b, a in pairs), sum(a < b for b, a in pairs)
    return paragraphs(f"Of {len(pairs)} {STREAMS[stream]}, {gained} became right, {lost} became wrong, {len(pairs) - gained - lost} stayed as they were.")


def forgotten_part(facts: Facts) -> Raw:
    changes = changes_of(facts, "forgetting")
    if not changes:
        return section("Forgotten", _missing(facts, "forgetting", "What was forgotten"))
    rows = facts.examples().get("general", [])
    chart = _before_after("General questions before and after", [c for c in changes if c["share"]], facts)
    return section("Forgotten", columns(chart, change_table(changes)), _flips("general", rows), notes(facts, "forgetting"))


# -- examples -----------------------------------------------------------------------------------------------------------------


def examples_part(facts: Facts) -> Raw:
    """What was answered before and after, the worst regressions first."""
    found = {s: rows for s, rows in facts.examples().items() if any("answer" in r for r in rows)}
    if not found:
        return section("Examples", paragraphs("No answers were kept: the task was not measured, or its answers are not text."))
    buttons = (("", "all"), ("worse", "became worse"), ("better", "became better"), ("wrong", "still wrong"), ("right", "stayed right"))
    filters = Raw('<div class="filters" data-of=".case" role="group" aria-label="Which examples">' + "".join(f'<button type="button" value="{v}">{n}</button>' for v, n in buttons) + "</div>")
    parts = []
    for stream, rows in found.items():
        shown = _spread(rows)
        lost = f" ({len(shown)} of {len(rows)} shown)" if len(shown) < len(rows) else ""
        more = details(f"{len(shown) - AT_ONCE} more", *(_case(r) for r in shown[AT_ONCE:])) if len(shown) > AT_ONCE else ""
        parts.append(details(f"{STREAMS[stream]}: {len(rows)}{lost}", *(_case(r) for r in shown[:AT_ONCE]), more, opened=stream == "test"))
    return section("Examples", filters, *parts)


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The worst and the best of a long list."""
    return rows if len(rows) <= SHOWN else rows[: SHOWN * 2 // 3] + rows[-(SHOWN // 3) :]


def _case(row: dict[str, Any]) -> str:
    before, after = row["score_before"], row["score"]
    how = "right" if before is None and after == 1 else "wrong" if before is None else "worse" if after < before else "better" if after > before else "right" if after == 1 else "wrong"
    words = {"worse": "became worse", "better": "became better", "wrong": "still wrong", "right": "right"}
    sure = row.get("confidence")
    lines_ = (("prompt", row.get("prompt")), ("gold", row.get("gold")), ("before", row.get("before")), ("after", row.get("answer")))
    body = "".join(f'<p><span class="who">{who}</span> {text(str(said))}</p>' for who, said in lines_ if said is not None)
    tone = {"worse": "bad", "better": "good"}.get(how, "soft")
    return f'<div class="case" data-is="{how}"><span class="badge {tone}">{words[how]}</span>{f" confidence {percent(sure, 0)}" if sure is not None else ""}{body}</div>'


# -- trust --------------------------------------------------------------------------------------------------------------------


def trust_part(facts: Facts) -> Raw:
    changes = changes_of(facts, "calibration")
    if not changes:
        return section("Trust", _missing(facts, "calibration", "Calibration"))
    points = [Point(r["confidence"], r["accuracy"], f"{when}: {r['rows']} rows", kind) for kind, when in enumerate(("after", "before")) for r in facts.table("calibration", "reliability", when)]
    reliability = scatter("How sure it is, and how often it is right", points, "stated confidence", "share right", ("after", "before"),
                          "On the dashed line confidence and correctness agree; below it the model is too sure.", diagonal=True)  # fmt: skip
    found = facts.numbers("calibration")
    covered = found.get("coverage_at_risk")
    plots = {w: facts.measures.get(w, {}).get("calibration", {}).get("plots", {}).get("risk_coverage", {}) for w in ("after", "before")}
    risk = lines("Errors, if it answers only where it is surest", {w: list(zip(p.get("coverage", []), p.get("risk", []))) for w, p in plots.items() if p}, "share answered", "share wrong", marks=[(covered, "suggested")] if covered else ())
    advice = f"Below a confidence of {percent(found.get('abstain_below'), 0)} let it abstain: it then answers {percent(covered, 0)} of these rows." if covered else "No threshold keeps errors as rare as the recipe allows."
    return section("Trust", paragraphs(advice), columns(reliability, risk), change_table(changes), notes(facts, "calibration"))


# -- weights ------------------------------------------------------------------------------------------------------------------


def weights_part(facts: Facts) -> Raw:
    rows, found = facts.table("weights", "by tensor"), facts.numbers("weights")
    if not rows:
        return section("Where the weights moved", _missing(facts, "weights", "How far the weights moved"))
    blocks, names, grid = _grid(rows)
    facts_ = [("whole update, relative to the weights", percent(found.get("relative_move"), 2)), ("share of weights that changed", percent(found.get("share_changed")))]
    facts_ += [("mean effective rank of the most moved matrices", number(found.get("effective_rank")))]
    intruders = facts.numbers("intruder-dimensions")
    facts_ += [(f"intruder dimensions: {k.replace('_', ' ')}", number(v)) for k, v in intruders.items()] or [("intruder dimensions", "not measured; add `intruder-dimensions` to the measures")]
    most = [(r["name"].removesuffix(".weight"), r["move"], percent(r["relative"], 2), r.get("effective_rank")) for r in rows[:12]]
    chart = heat("Relative change of every tensor", blocks, names, grid, "% of its size", "One row a block; a hatched cell is a tensor that the model does not have.")
    return section("Where the weights moved", table(("", ""), facts_), columns(chart, table(("moved farthest", "by", "relative", "effective rank"), most)), notes(facts, "weights"))


def _grid(rows: list[dict[str, Any]]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Blocks down, kinds of tensor across; tensors outside the blocks are left to the table, unless there are no blocks."""
    inside = [r for r in rows if r["block"] is not None] or [{**r, "block": 0} for r in rows]
    named = {(r["block"], _kind(r["name"])): 100 * r["relative"] for r in inside if r["relative"] is not None and not r["name"].endswith("bias")}
    blocks, kinds = sorted({b for b, _ in named}), list(dict.fromkeys(_kind(r["name"]) for r in sorted(inside, key=lambda r: r["name"]) if not r["name"].endswith("bias")))
    return [str(b) for b in blocks], kinds, [[named.get((b, k)) for k in kinds] for b in blocks]


def _kind(name: str) -> str:
    """A tensor's name without its block's number and the ending `weight`: what is the same thing in every block."""
    words = [w for w in name.split(".") if w not in ("weight", "base_layer")]
    at = max((i for i, w in enumerate(words) if w.isdigit()), default=-1)
    return ".".join(words[at + 1 :][-2:]).replace("_layernorm", " norm").replace("_proj", "").replace("self_attn.", "")


# -- data ---------------------------------------------------------------------------------------------------------------------


def data_part(facts: Facts) -> Raw:
    parts: list[str] = [_flow(stage) for stage in facts.stages]
    for stage, found in list(facts.pools.items())[:4]:
        parts.append(_pool(stage, found))
    return section("The data", *parts) if any(parts) else section("The data", paragraphs("Nothing is known of the rows: the run ended before it had read them."))


def _flow(stage: dict[str, Any]) -> str:
    rows = [(s["step"], s["rows"], ", ".join(f"{k.replace('_', ' ')} {number(v)}" for k, v in (s.get("report") or {}).items() if isinstance(v, (int, float)) and not isinstance(v, bool))) for s in stage.get("rows", [])]
    return table(("what was done", "rows left", "what it reports"), rows, caption=stage.get("stage", "")) if rows else ""


def _pool(stage: str, found: dict[str, Any]) -> str:
    kind = lambda p: 2 if p["suspect"] else 1 if not p["taken"] else 0  # noqa: E731
    score = lambda p: "" if p.get("why") is None else f" (score {number(p['why'])})"  # noqa: E731
    points = [Point(p["x"], p["y"], p["text"] + score(p) + (" (near-duplicate)" if p["near"] else ""), kind(p), size=2.6 if p["taken"] else 2.0) for p in sorted(found.get("points", []), key=lambda p: -kind(p))]
    sampled = f"{found['shown']:,} of {found['rows']:,} rows, about half of them learned from. " if found["sampled"] else ""
    chart = scatter(f"The pool{f' of {stage}' if stage else ''}", points, "", "", ("learned from", "not chosen", "suspicious"), sampled + "Rows that use like words, or look alike, lie together.", numbers=False) if points else ""
    facts = [("rows given", found["rows"]), ("learned from", found["learned"]), ("exact repetitions", found["repeated"]), (f"near-duplicates among {found['shown']:,} rows", found["near"]),
             ("suspicious rows", found["suspicious"]), ("set aside as unreadable", found["set_aside"])]  # fmt: skip
    suspects = [(s["where"], s["reason"], s["text"]) for s in found["suspects"]] + [(s["where"], s["reason"], "") for s in found["aside"]]
    listed = details(f"Suspicious rows: {len(suspects)} listed", table(("where", "why", "text"), suspects)) if suspects else ""
    return columns(chart, Raw(table(("", ""), facts) + listed))


# -- training -----------------------------------------------------------------------------------------------------------------


def training_part(facts: Facts) -> Raw:
    parts = []
    for stage, curve in list(facts.curves.items())[:6]:
        if curve:
            parts.append(columns(*_curves(stage, curve)))
    outcomes = [(s.get("stage", ""), o["steps"], o["tokens"], round(o["seconds"], 1), round(o["tokens"] / o["seconds"]) if o["seconds"] else None, round(o["peak_memory"] / 2**30, 2) if o.get("peak_memory") else None, o.get("reason", ""))
                for s in facts.stages if (o := s.get("outcome"))]  # fmt: skip
    return section("The training", table(("stage", "steps", "tokens", "seconds", "tokens a second", "peak memory, GiB", "ended by"), outcomes) if outcomes else "", *parts) if parts or outcomes else section("The training", paragraphs("There was no step of training."))


def _curves(stage: str, curve: list[dict[str, Any]]) -> list[str]:
    """Loss, gradient norm, throughput, memory and learning rate over the steps, where they were logged."""
    of = f" of {stage}" if stage else ""
    shown = curve if len(curve) <= 600 else curve[:: len(curve) // 600 + 1]
    series = lambda key: [(float(c["step"]), c.get(key)) for c in shown]  # noqa: E731
    positive = all(c.get("loss") is None or c["loss"] > 0 for c in shown)
    wanted = (("Loss", "loss", "loss", positive), ("Gradient norm", "grad_norm", "norm", True), ("Throughput", "tokens_per_second", "tokens a second", False), ("Memory", "memory_gib", "GiB", False), ("Learning rate", "lr", "rate", False))
    return [lines(title + of, {title: series(key)}, "step", name, log=log and _wide(series(key))) for title, key, name, log in wanted if any(v is not None for _, v in series(key))]


def _wide(curve: Sequence[tuple[float, float | None]]) -> bool:
    known = [v for _, v in curve if v is not None and v > 0]
    return bool(known) and max(known) > 8 * min(known)


# -- the rest -----------------------------------------------------------------------------------------------------------------


def other_part(facts: Facts) -> Raw:
    """Measures that have no part of their own."""
    mine = {"task", "forgetting", "calibration", "weights", "intruder-dimensions"}
    parts = []
    for name in facts.measures.get("after", {}):
        if name not in mine:
            rows = [(k.replace("_", " "), facts.numbers(name, "before").get(k), v) for k, v in facts.numbers(name).items()]
            parts.append(Raw(f"<h3>{text(name)}</h3>" + table(("", "before", "after"), rows) + notes(facts, name)))
    return section("Also measured", *parts) if parts else Raw("")


def repeat_part(facts: Facts) -> Raw:
    about = facts.about
    data = [(n, d.get("rows"), d.get("source"), d.get("fingerprint", "")[:16]) for n, d in about.get("data", {}).items()]
    versions = [(k, str(about[k])) for k in ("luthier", "torch", "transformers", "python", "threads", "machine", "seed") if k in about]
    words = paragraphs("The same recipe, data, versions and number of threads give the same weights on one CPU device.")
    again = code(f"luthier tune {facts.folder / 'recipe.yaml'} --run ANOTHER_FOLDER" if facts.status == "finished" else f"luthier tune {facts.folder} --resume")
    return section("How to repeat it" if facts.status == "finished" else "How to go on", words if facts.status == "finished" else "", again, columns(table(("", ""), versions), table(("data", "rows", "source", "fingerprint"), data)), details("The recipe", code(facts.recipe_text)))
