"""The command line: every command is one call into the library. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from luthier import __version__
from luthier._cli.text import say, say_json, table
from luthier.errors import Stopped, TrainingError, UserError

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for what the user can mend, 130 when stopped."""
    args = _parsed(sys.argv[1:] if arguments is None else list(arguments))
    try:
        with warnings.catch_warnings():
            # What the libraries below say to their own developers helps nobody here.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|accelerate|torch")
            args.command(args)
        sys.stdout.flush()
    except UserError as error:
        if _said_by_another(error):
            return getattr(error, "exit_code", 2)
        again = getattr(args, "again", None) if isinstance(error, TrainingError) else None
        sys.stderr.write(f"{error}\n" + (f"resume with: {again}\n" if again else ""))
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        again = getattr(args, "again", None)
        sys.stderr.write(f"stopped; resume with: {again}\n" if again else "stopped\n")
        return 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _said_by_another(error: UserError) -> bool:
    """Of several processes the first one tells what is wrong; another only what went wrong with itself."""
    if os.environ.get("RANK", "0") == "0":
        return False
    from luthier.core.ranks import PeerFailed

    return isinstance(error, (PeerFailed, Stopped)) or not isinstance(error, TrainingError)


# -- what there is -------------------------------------------------------------------------------------------------------


def _papers(args: argparse.Namespace) -> None:
    from luthier.catalog import AXES
    from luthier.errors import RecipeError, nearest
    from luthier.papers import papers

    if args.axis and args.axis not in AXES:
        raise RecipeError(f"There is no axis '{args.axis}'.{nearest(args.axis, AXES)} The axes are: {', '.join(AXES)}.")
    found = [p for p in papers() if (not args.axis or p.axis == args.axis) and (p.works or not args.works)]
    if args.json:
        say_json([p.to_dict() for p in found])
        return
    say(table(("n", "paper", "axis", "status", "idea"), [(p.n, p.slug, p.axis, p.verdict or p.status, p.idea) for p in found]))
    counts = {s: sum(p.status == s for p in found) for s in ("works", "partly", "planned")}
    say(f"\n{len(found)} papers: " + ", ".join(f"{n} {s}" for s, n in counts.items()) + ". `luthier explain PAPER` says more.")


def _methods(args: argparse.Namespace) -> None:
    from luthier.catalog import entries

    found = entries(args.axis)
    if args.json:
        say_json([{"axis": e.axis, "name": e.name, "idea": e.idea, "papers": e.papers, "wraps": e.wraps} for e in found])
        return
    say(table(("method", "papers", "idea"), [(f"{e.axis}/{e.name}", ",".join(map(str, e.papers)) or "-", e.idea) for e in found]))
    say(f"\n{len(found)} methods. `luthier explain AXIS/NAME` says more.")


def _explain(args: argparse.Namespace) -> None:
    from luthier._cli.explain import as_text, explain

    about = explain(args.what)
    if args.json:
        say_json(about)
    else:
        say(as_text(about))


def _lab(args: argparse.Namespace) -> None:
    from luthier import lab

    if args.action == "make":
        _lab_make(args, lab.make(_needed(args.spec, "lab make needs a task, e.g. `luthier lab make traces`.")))
        return
    if args.action == "build":
        from luthier.lab.build import build

        found = build(_needed(args.spec, "lab build needs a model, e.g. `luthier lab build lm-s`."))
        if args.json:
            say_json(found)
        return
    tasks, models = lab.tasks(), lab.models()
    if args.json:
        say_json({"tasks": tasks, "models": models})
        return
    say(table(("task", "about"), [(f"lab:{k}", t["about"]) for k, t in tasks.items()]))
    say("\nmodels: " + (", ".join(models) or "none yet") + "\n`luthier lab list --json` names every task's knobs.")


def _lab_make(args: argparse.Namespace, splits: Any) -> None:
    """A task's rows as files."""
    import json

    folder = Path(args.out or args.spec.removeprefix("lab:").partition("?")[0])
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in ("train", "test", "ood", "general", "unlabelled"):
        rows = list(getattr(splits, name, None) or [])
        if rows:
            file = folder / f"{name}.jsonl"
            plain = lambda v: v.tolist() if hasattr(v, "tolist") else str(v)  # noqa: E731
            file.write_text("".join(json.dumps(r, ensure_ascii=False, default=plain) + "\n" for r in rows), encoding="utf-8")
            written[str(file)] = len(rows)
    if args.json:
        say_json(written)
    else:
        say("\n".join(f"{file}: {n} rows" for file, n in written.items()))


# -- tuning --------------------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    from luthier.recipe import check

    recipe = _recipe(args)
    notices = check(recipe)
    for notice in notices:
        say(notice)
    for entry in recipe.stage_list():
        for stage in entry.recipes if entry.loop else [entry.recipe]:
            parts = [f"{c.axis} {c.method}" for c in stage.choices()]
            say(f"{entry.name or recipe.name or 'recipe'}{f' (up to {entry.times} times)' if entry.loop else ''}: " + ", ".join(parts))
    say("Nothing speaks against this recipe.")


def _tune(args: argparse.Namespace) -> None:
    recipe = _recipe(args)
    folder = args.run or recipe.run or str(Path("runs") / f"{recipe.name or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}")
    args.again = f"luthier tune {folder} --resume"
    from luthier.run import tune

    tune(recipe, run=folder, resume=args.resume, quiet=args.quiet)
    if args.quiet:
        say(folder)


def _advise(args: argparse.Namespace) -> None:
    from luthier._cli.advise import advise

    advise(args)


def _merge(args: argparse.Namespace) -> None:
    from luthier._cli.merge import merge

    merge(args)


def _compress(args: argparse.Namespace) -> None:
    from luthier._cli.compress import compress

    compress(args)


def _compare(args: argparse.Namespace) -> None:
    from luthier._cli.compare import compare

    compare(args, _recipe)


def _recipe(args: argparse.Namespace) -> Any:
    """The recipe of `RECIPE key=value ...`, of a run's folder, or of --model and --data alone."""
    from luthier.recipe import Recipe

    words = [w for w in args.words if "=" not in w or Path(w).is_file()]
    overrides = [w for w in args.words if w not in words]
    if len(words) > 1:
        raise UserError(f"One recipe at a time, not {' and '.join(words)}. Overrides are written key=value.")
    given = {k: _local(v) for k, v in (("model", args.model), ("data.train", args.data), ("data.test", args.test)) if v}
    named = {*given, *(word.split("=")[0] for word in overrides)}
    if not words and not ("model" in named and named & {"data", "data.train"}):
        raise UserError("Name a recipe (luthier tune recipe.yaml), or a model and data: luthier tune --model smollm2-135m --data train.jsonl")
    if words and Path(words[0]).is_dir() and (Path(words[0]) / "recipe.yaml").is_file():
        args.run = args.run or words[0]
        words = [str(Path(words[0]) / "recipe.yaml")]
    recipe = Recipe.load(words[0], overrides) if words else Recipe.from_dict(_start(given), overrides=overrides)
    return recipe.with_values(given) if given else recipe


def _start(given: dict[str, str]) -> dict[str, Any]:
    """The recipe of a model and data that the command line names."""
    return {"model": given.get("model", ""), **({"data": {"train": given["data.train"]}} if "data.train" in given else {})}


def _local(text: str) -> str:
    """What the command line calls a path lies in the working folder, not beside the recipe."""
    return str(Path(text).expanduser().resolve()) if Path(text).expanduser().exists() else text


def _ask(args: argparse.Namespace) -> None:
    from luthier.run import ask

    answers = ask(args.run, args.prompts, max_new_tokens=args.max_new_tokens)
    if args.json:
        say_json([{"prompt": p, "answer": a} for p, a in zip(args.prompts, answers)])
    else:
        say("\n".join(answers))


def _export(args: argparse.Namespace) -> None:
    from luthier.export import export

    say(str(export(args.run, args.form, args.out)))


def _report(args: argparse.Namespace) -> None:
    from luthier.report.card import as_values, write

    path = write(args.run)
    if args.json:
        say_json(as_values(args.run))
    else:
        say("\n".join([*as_values(args.run)["verdict"], str(path)]))


def _fetch(args: argparse.Namespace) -> None:
    from luthier.core.fetch import fetch

    found = fetch(args.name, tell=lambda sentence: print(sentence, file=sys.stderr, flush=True))
    if args.json:
        say_json({"name": args.name, "path": str(found)})
    else:
        say(str(found))


def _demo(args: argparse.Namespace) -> None:
    from luthier.demo import main as run

    run(args.folder)


# -- writing methods -----------------------------------------------------------------------------------------------------


def _new(args: argparse.Namespace) -> None:
    from luthier.testing import new

    for path in new(args.axis, args.name, args.dir):
        say(str(path))


def _matrix(args: argparse.Namespace) -> None:
    from luthier.catalog import entries
    from luthier.testing import matrix

    axes = tuple(a.strip() for a in (args.axes or "").split(",") if a.strip())
    for axis in axes:
        entries(axis)
    tell = None if args.json else lambda e: say(f"{e['outcome']:8} {e['a']} x {e['b']}" + ("" if e["outcome"] == "runs" else f": {e['why']}"))
    found = matrix(axes, tell, args.cores)
    counts = {o: sum(e["outcome"] == o for e in found) for o in ("runs", "refused", "crashed")}
    if args.json:
        say_json(found)
    else:
        say(f"\n{len(found)} pairs: " + ", ".join(f"{n} {o}" for o, n in counts.items()))
    if counts["crashed"]:
        raise UserError(f"{counts['crashed']} pairs crashed, the first {next(e['a'] + ' x ' + e['b'] for e in found if e['outcome'] == 'crashed')}.")


def _needed(value: str | None, sentence: str) -> str:
    if not value:
        raise UserError(sentence)
    return value


# -- the parser ----------------------------------------------------------------------------------------------------------


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """Overrides (key=value) may stand anywhere among the options."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    loose = [w for w in rest if not w.startswith("-")] if hasattr(args, "words") else []
    if len(loose) != len(rest):
        parser.error(f"unrecognized arguments: {' '.join(w for w in rest if w not in loose)}")
    if loose:
        args.words = [*args.words, *loose]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="luthier", description="A workshop for fine-tuning: published methods that compose in one recipe, with evidence.")
    parser.add_argument("--version", action="version", version=f"luthier {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_listings(commands)
    _add_tuning(commands)
    _add_writing(commands)
    return parser


def _add(commands: Any, name: str, run: Command, about: str, json: bool = False) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    made.set_defaults(command=run)
    if json:
        made.add_argument("--json", action="store_true", help="print JSON")
    return made


def _add_listings(commands: Any) -> None:
    one = _add(commands, "papers", _papers, "list the papers and what is there of each", json=True)
    one.add_argument("--axis", help="only papers of this axis")
    one.add_argument("--works", action="store_true", help="only papers whose methods, preset and evidence are all there")
    one = _add(commands, "methods", _methods, "list the methods", json=True)
    one.add_argument("axis", nargs="?", help="only this axis")
    one = _add(commands, "explain", _explain, "say all about a paper or a method", json=True)
    one.add_argument("what", metavar="PAPER|METHOD", help="a paper's number or slug, or AXIS/NAME")
    one = _add(commands, "lab", _lab, "list the lab's tasks and models, or write a task's rows", json=True)
    one.add_argument("action", choices=("list", "make", "build"))
    one.add_argument("spec", nargs="?", help="make: a task, e.g. 'traces?n=500&seed=3'; build: a model, e.g. lm-s")
    one.add_argument("--out", help="make: the folder to write to")
    from luthier._cli.claims import add_arguments, claims

    add_arguments(_add(commands, "claims", claims, "run the papers' claims and see what came of them", json=True))


def _add_tuning(commands: Any) -> None:
    for name, run, about in (("check", _check, "say whether a recipe can run, without loading a model"), ("tune", _tune, "run a recipe")):
        one = _add(commands, name, run, about)
        one.add_argument("words", nargs="*", metavar="RECIPE|key=value", help="a recipe file, a preset's name or a run's folder; and values to change, e.g. adapt.rank=8")
        one.add_argument("--model", help="an embedded name, a hub id or a folder")
        one.add_argument("--data", help="training rows: a file, a folder, lab:TASK or a hub id")
        one.add_argument("--test", help="test rows")
        one.add_argument("--run", help="the folder to write to")
    one.add_argument("--resume", action="store_true", help="continue an interrupted run")
    one.add_argument("--quiet", action="store_true", help="print only the run's folder")
    from luthier._cli.advise import add_arguments as add_advise_arguments
    from luthier._cli.compare import add_arguments

    add_advise_arguments(_add(commands, "advise", _advise, "look at data and a model, and propose recipes with reasons", json=True))
    add_arguments(_add(commands, "compare", _compare, "run recipes with the same seeds and say what differs by more than chance", json=True))
    one = _add(commands, "ask", _ask, "ask a run's model", json=True)
    one.add_argument("run", metavar="RUN")
    one.add_argument("prompts", nargs="+", metavar="PROMPT")
    one.add_argument("--max-new-tokens", type=int, default=64)
    one = _add(commands, "export", _export, "write a run's model for use elsewhere")
    one.add_argument("run", metavar="RUN")
    form = one.add_mutually_exclusive_group(required=True)
    for word, about in (("merged", "a whole model for transformers"), ("adapter", "an adapter for peft"), ("gguf", "a file for llama.cpp")):
        form.add_argument(f"--{word}", dest="form", action="store_const", const=word, help=about)
    one.add_argument("--out", help="where to write")
    from luthier._cli.merge import add_arguments as add_merge_arguments

    add_merge_arguments(_add(commands, "merge", _merge, "combine checkpoints of any size, tensor by tensor", json=True))
    from luthier._cli.compress import add_arguments as add_compress_arguments

    add_compress_arguments(_add(commands, "compress", _compress, "make a finished model lighter, and say what that changed of its size, speed and quality", json=True))
    one = _add(commands, "report", _report, "write a run's report card again, also of one that has not finished", json=True)
    one.add_argument("run", metavar="RUN")
    one = _add(commands, "fetch", _fetch, "download a model", json=True)
    one.add_argument("name", help="smollm2 or minilm")
    one = _add(commands, "demo", _demo, "tune a small chat model on real data and see what came of it")
    one.add_argument("folder", nargs="?", default="runs/demo")


def _add_writing(commands: Any) -> None:
    one = _add(commands, "new", _new, "write a method's skeleton and its test")
    one.add_argument("axis")
    one.add_argument("name")
    one.add_argument("--dir", help="where to write")
    one = _add(commands, "matrix", _matrix, "run every pair of methods at toy size", json=True)
    one.add_argument("--axes", help="only pairs between these, e.g. adapt,objective")
    one.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="pairs at a time; default: all cores")


if __name__ == "__main__":
    raise SystemExit(main())
