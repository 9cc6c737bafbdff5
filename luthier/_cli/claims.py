"""`luthier claims ...`: what the papers say, and what came of it here."""

from __future__ import annotations

import argparse
from typing import Any

from luthier._cli.text import paragraph, say, say_json, table
from luthier.errors import UserError

ACTIONS = ("list", "run", "status", "show", "table")


class Stale(UserError):
    """Some evidence no longer belongs to the code."""

    exit_code = 1


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("action", choices=ACTIONS, help="list claims; run some; status: is evidence stale; show one; table: all 169 papers")
    one.add_argument("claims", nargs="*", metavar="CLAIM", help="a paper's number or slug, or your own claim file; none: all claims")
    one.add_argument("--quick", action="store_true", help="one seed, a third of the steps, only the arms that matter")
    one.add_argument("--seeds", help="other seeds than the declared ones, e.g. 10,11,12")
    one.add_argument("--cores", type=int, help="how many arms run at once; default: all cores")


def claims(args: argparse.Namespace) -> None:
    found = {"list": _list, "run": _run, "status": _status, "show": _show, "table": _table}[args.action](args)
    if args.json and found is not None:
        say_json(found)


def _chosen(args: argparse.Namespace) -> list[Any]:
    from luthier.claims import find, names

    return [find(which) for which in (args.claims or names())]


def _list(args: argparse.Namespace) -> Any:
    found = [{"claim": c.slug, "paper": c.paper, "says": c.says, "metric": c.metric, "arms": list(c.arms), "seeds": len(c.seeds)} for c in _chosen(args)]
    if not args.json:
        say(table(("claim", "metric", "arms", "says"), [(c["claim"], c["metric"], len(c["arms"]), c["says"]) for c in found]))
    return found


def _run(args: argparse.Namespace) -> Any:
    import sys

    from luthier.claims.work import run

    try:
        seeds = [int(s) for s in args.seeds.split(",")] if args.seeds else None
    except ValueError:
        raise UserError(f"--seeds takes numbers, e.g. 10,11,12, not '{args.seeds}'.") from None
    if seeds is not None and len(set(seeds)) < 3 and not args.quick:
        raise UserError(f"A claim needs three or more seeds; --seeds gives {len(set(seeds))}. One seed shows nothing; `--quick` tries the code on one.")
    chosen = [str(c.file) for c in _chosen(args)]
    run(chosen, args.quick, seeds, args.cores, lambda line: print(line, file=sys.stderr if args.json else sys.stdout, flush=True))
    args.claims = chosen
    return _summaries(args, say_them=not args.json and not args.quick)


def _summaries(args: argparse.Namespace, say_them: bool) -> list[dict[str, Any]]:
    from luthier.claims.evidence import Store

    found = [Store(c).summary() for c in _chosen(args)]
    if say_them:
        say(table(("claim", "verdict", "effect", "metric"), [(f["slug"], f["verdict"] or "-", effect_text(f), f["metric"]) for f in found]))
    return [{k: v for k, v in f.items() if k not in ("records", "grids")} for f in found]


def _status(args: argparse.Namespace) -> Any:
    from luthier.claims.evidence import is_stale

    words = {None: "no evidence yet", False: "fresh", True: "stale"}
    found = {c.slug: words[is_stale(c)] for c in _chosen(args)}
    if args.json:
        say_json(found)
    else:
        say(table(("claim", "evidence"), list(found.items())))
    old = [slug for slug, word in found.items() if word == "stale"]
    if old:
        raise Stale(f"{len(old)} of {len(found)} claims have stale evidence: {', '.join(old)}. Run `luthier claims run {' '.join(old)}`.")
    return None


def _show(args: argparse.Namespace) -> Any:
    if len(args.claims) != 1:
        raise UserError("`luthier claims show` takes one claim, e.g. `luthier claims show mig`.")
    (found,) = _summaries(args, say_them=False)
    if args.json:
        return found
    say("\n".join(told(found)))
    return None


def told(found: dict[str, Any]) -> list[str]:
    """A claim and what came of it, in words and a table."""
    lines = [paragraph(f"{found['slug']}: {found['says']}"), paragraph(f"Published: {found['published']}")]
    if found["departs"]:
        lines.append(paragraph(f"Here: {found['departs']}"))
    lines += ["", f"Verdict: {found['verdict'] or 'none yet'}   {effect_text(found)} {found['metric']}"]
    if found["arms"] and found["waiting"]:
        lines.append(f"  Not all seeds are in; waiting for {', '.join(map(str, found['waiting']))}.")
    lines += [paragraph(line, "  ") for line in (found["reason"], *found["flags"]) if line]
    if found["repeated"]:
        again = found["repeated"]
        lines.append(f"Repeated on seeds {', '.join(map(str, again['seeds']))}: {again['verdict']}   {effect_text({'effect': again})}")
    rows = [(name, a["role"] or "-", number(a["means"].get(found["metric"])), f"{a['seconds']:.0f} s", extras(a["means"], found["metric"])) for name, a in found["arms"].items()]
    return [*lines, "", table(("arm", "role", found["metric"], "time", "also"), rows)] if rows else lines


def extras(means: dict[str, Any], metric: str) -> str:
    return ", ".join(f"{k} {number(v)}" for k, v in means.items() if k != metric)


def number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def effect_text(found: dict[str, Any]) -> str:
    e = found.get("effect")
    return "-" if not e else f"{e['mean']:+.3g} ({e['low']:+.3g} to {e['high']:+.3g}, {e['n']} seeds)"


def _table(args: argparse.Namespace) -> Any:
    from luthier.papers import evidence_of, papers

    found: list[dict[str, Any]] = []
    for paper in papers():
        e = evidence_of(paper) or {}
        cost = e.get("cost") or {}
        found.append({"n": paper.n, "paper": paper.slug, "status": paper.status, "verdict": e.get("verdict"), "effect": e.get("effect"), "metric": e.get("metric"),
                      "published": e.get("published"), "time": cost.get("time"), "memory": cost.get("memory")})  # fmt: skip
    if not args.json:
        rows = [(f["n"], f["paper"], f["status"], f["verdict"] or "-", effect_text(f), times(f["time"]), times(f["memory"]), f["published"] or "-") for f in found]
        say(table(("n", "paper", "status", "verdict", "effect", "time", "memory", "published"), rows))
    return found


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
