"""The commands: what they print, their exit codes, and that the cheap ones stay cheap."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from luthier import catalog, cli
from luthier._cli.explain import explain
from luthier.errors import TrainingError

ROOT = Path(__file__).parents[1]


def luthier(*arguments, cwd=ROOT):
    """A command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "luthier", *arguments], capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture
def call(capsys):
    """A command in this process: exit code, output, error output."""

    def run(*arguments):
        code = cli.main(list(arguments))
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def fake(monkeypatch):
    """A stand-in for a module that the command line calls into; it notes its calls."""

    def make(name, **functions):
        calls = []
        module = types.ModuleType(name)
        for key, function in functions.items():
            setattr(module, key, lambda *a, _f=function, _k=key, **kw: (calls.append((_k, a, kw)), _f(*a, **kw))[1])
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return make


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "recipe.yaml").write_text("name: r\nmodel: ./lm\ndata: train.jsonl\nmeasure: []\nobjective: sft\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# -- processes -------------------------------------------------------------------------------------------------------------


def test_help_version_and_a_wrong_command():
    done = luthier("--help")
    assert done.returncode == 0 and all(c in done.stdout for c in ("papers", "methods", "explain", "check", "tune", "ask", "export", "fetch", "new", "matrix", "lab"))
    assert luthier("--version").stdout.startswith("luthier 0.")
    assert luthier("tunee").returncode == 2


@pytest.mark.parametrize("arguments", [["--help"], ["methods"], ["methods", "adapt", "--json"], ["papers", "--json"]])
def test_listings_load_no_torch(arguments):
    code = (
        "import sys\nfrom luthier.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write(str(sorted({'torch', 'numpy', 'rich', 'transformers'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "[]" and len(done.stdout) > 100


def test_a_mistake_is_one_sentence_and_exit_code_2(here):
    (here / "bad.yaml").write_text("model: x\nadapt:\n  rnak: 3\n")
    done = luthier("check", "bad.yaml", cwd=here)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == "bad.yaml:3: adapt.rnak is no field of 'lora'. Did you mean 'rank'?\n"


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(f"'{sys.executable}' -m luthier papers --json | head -c 10", shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == '[\n {\n  "n"'[:10] and done.stderr == ""


# -- listings --------------------------------------------------------------------------------------------------------------


def test_papers(call):
    code, out, _ = call("papers", "--json")
    found = json.loads(out)
    assert code == 0 and len(found) == 169 and {"n", "slug", "status", "missing", "works", "verdict"} <= set(found[0])
    select = json.loads(call("papers", "--axis", "select", "--json")[1])
    assert select == [p for p in found if p["axis"] == "select"] and select
    assert json.loads(call("papers", "--works", "--json")[1]) == [p for p in found if p["works"]]
    text = call("papers")[1]
    assert all(p["slug"] in text for p in found) and "169 papers" in text
    code, _, err = call("papers", "--axis", "selekt")
    assert code == 2 and "Did you mean 'select'?" in err


def test_methods(call):
    found = json.loads(call("methods", "--json")[1])
    assert [(m["axis"], m["name"]) for m in found] == [(e.axis, e.name) for e in catalog.entries()]
    assert {m["axis"] for m in json.loads(call("methods", "objective", "--json")[1])} == {"objective"}
    text = call("methods", "objective")[1]
    assert "objective/sft " in text and "adapt/" not in text
    assert call("methods", "objectiv")[0] == 2


def test_explain_a_method(call):
    about = json.loads(call("explain", "objective/asft", "--json")[1])
    fields = {f["name"]: f for f in about["fields"]}
    assert fields["kl"]["type"] == "float" and fields["kl"]["default"] == 0.1 and "KL" in fields["kl"]["doc"]
    assert fields["weighting"]["type"] == "Literal['dft', 'none']"
    assert about["papers"][0]["slug"] == "asft" and about["families"] == ["causal-lm"] and ["completion", "prompt"] in about["columns"]
    assert about["doc"].startswith(about["idea"][:20]) and "kl: 0.1" in about["recipe"]
    text = call("explain", "objective/asft")[1]
    assert all(part in text for part in ("Fields", "kl: float = 0.1", "Requirements", "families: causal-lm", "Recipe", "Evidence", "paper 117" if about["relations"] else "asft"))


def test_an_explained_recipe_is_one(call):
    """What explain prints under Recipe builds the method with its defaults."""
    import yaml

    from luthier.recipe import Recipe

    about = explain("objective/asft")
    made = Recipe.from_dict(yaml.safe_load(about["recipe"]))
    assert made.objective[0].build() == catalog.method("objective", "asft")()


def test_explain_a_paper_by_slug_and_number(call):
    by_slug, by_number = (json.loads(call("explain", w, "--json")[1]) for w in ("asft", "117"))
    assert by_slug == by_number and by_slug["kind"] == "paper" and by_slug["methods"][0]["method"] == "objective/asft"
    text = call("explain", "117")[1]
    assert "Anchored Supervised Fine-Tuning" in text and "Status:" in text and "Methods" in text


def test_explain_a_method_by_its_name_alone(call):
    assert json.loads(call("explain", "lora", "--json")[1])["axis"] == "adapt"


@pytest.mark.parametrize(("what", "meant"), [("asftt", "asft"), ("objective/sftt", "sft"), ("masked-thougt", "masked-thought")])
def test_explain_suggests_the_nearest(call, what, meant):
    code, _, err = call("explain", what)
    assert code == 2 and f"Did you mean '{meant}'?" in err


def test_evidence_is_shown(call, monkeypatch, tmp_path):
    from luthier import papers

    monkeypatch.setattr(papers.catalog, "PACKAGE", tmp_path)
    (tmp_path / "evidence").mkdir()
    (tmp_path / "papers.yaml").write_text((ROOT / "luthier" / "papers.yaml").read_text())
    arm = {"role": "method", "means": {"score": 0.5, "kept": 0.25}, "seconds": 12.0}
    found = {"slug": "117_asft", "says": "It helps.", "published": "By 3 points.", "departs": "", "metric": "score", "verdict": "reproduced", "reason": "", "flags": [],
             "waiting": [], "repeated": None, "effect": {"mean": 0.1, "low": 0.05, "high": 0.15, "n": 5}, "arms": {"asft": arm}}  # fmt: skip
    (tmp_path / "evidence" / "117_asft.json").write_text(json.dumps(found))
    text = call("explain", "117")[1]
    assert "Verdict: reproduced   +0.1 (+0.05 to +0.15, 5 seeds) score" in text and "12 s" in text and "kept 0.25" in text and "By 3 points." in text


def test_lab(call, tmp_path):
    found = json.loads(call("lab", "list", "--json")[1])
    assert "traces" in found["tasks"] and "seed" in found["tasks"]["traces"]["knobs"]
    assert "lab:traces" in call("lab", "list")[1]
    code, out, _ = call("lab", "make", "traces?n=6&test=3", "--out", str(tmp_path / "made"))
    rows = [json.loads(line) for line in (tmp_path / "made" / "train.jsonl").read_text().splitlines()]
    assert code == 0 and len(rows) == 6 and "train.jsonl: 6 rows" in out
    assert call("lab", "make")[0] == 2


# -- tuning ----------------------------------------------------------------------------------------------------------------


def test_check(call, here):
    code, out, _ = call("check", "recipe.yaml", "adapt.rank=8")
    assert code == 0 and out.endswith("Nothing speaks against this recipe.\n") and "adapt lora, objective sft" in out
    code, _, err = call("check", "recipe.yaml", "objective=dpo")
    assert code == 2 and "needs the columns" in err
    assert call("check", "recipe.yaml", "other.yaml")[0] == 2


def test_tune_passes_the_recipe_on(call, here, fake):
    calls = fake("luthier.run", tune=lambda *a, **kw: None)
    assert call("tune", "recipe.yaml", "--quiet", "train.batch=4", "--run", "out", "adapt.rank=2", "--resume") == (0, "out\n", "")
    _, (recipe,), options = calls[0]
    assert recipe.train.batch == 4 and recipe.adapt[0].options == {"rank": 2} and options == {"run": "out", "resume": True, "quiet": True}


def test_tune_with_a_model_and_data_alone(call, here, fake):
    calls = fake("luthier.run", tune=lambda *a, **kw: None)
    assert call("tune", "--model", "lm", "--data", "train.jsonl", "--test", "lab:traces", "train.steps=3")[0] == 0
    recipe = calls[0][1][0]
    assert recipe.model_spec() == str(here / "lm") and recipe.data.streams == {"train": str(here / "train.jsonl"), "test": "lab:traces"}
    assert recipe.train.steps == 3 and calls[0][2]["run"].startswith("runs/run-") and calls[0][2]["quiet"] is False


def test_the_command_lines_paths_lie_in_the_working_folder(call, here, fake, monkeypatch):
    calls = fake("luthier.run", tune=lambda *a, **kw: None)
    (here / "sub").mkdir()
    (here / "sub" / "other.jsonl").write_text("{}\n")
    monkeypatch.chdir(here / "sub")
    assert call("tune", "../recipe.yaml", "--data", "other.jsonl")[0] == 0
    recipe = calls[0][1][0]
    assert recipe.data.streams["train"] == str(here / "sub" / "other.jsonl") and recipe.model_spec() == str(here / "lm")


def test_tune_needs_something(call, fake):
    code, _, err = call("tune")
    assert code == 2 and "--model" in err
    assert call("tune", "--model", "x")[0] == 2 and call("tune", "model=x")[0] == 2


def test_tune_takes_model_and_data_among_the_overrides(call, here, fake):
    calls = fake("luthier.run", tune=lambda *a, **kw: None)
    assert call("tune", "model=lm", "data=lab:traces", "train.steps=3")[0] == 0
    recipe = calls[0][1][0]
    assert recipe.data.streams == {"train": "lab:traces"} and recipe.train.steps == 3


def test_stopping_says_how_to_go_on(call, here, fake):
    def stopped(*a, **kw):
        raise KeyboardInterrupt

    calls = fake("luthier.run", tune=stopped)
    code, _, err = call("tune", "recipe.yaml", "--run", "out")
    assert code == 130 and err == "stopped; resume with: luthier tune out --resume\n" and calls


def test_that_command_goes_on(call, here, fake):
    """A run's folder in place of a recipe: its own recipe, in the same folder."""
    from luthier.recipe import Recipe

    (here / "out").mkdir()
    (here / "out" / "recipe.yaml").write_text(Recipe.load("recipe.yaml").to_yaml())
    calls = fake("luthier.run", tune=lambda *a, **kw: None)
    assert call("tune", "out", "--resume")[0] == 0
    recipe, options = calls[0][1][0], calls[0][2]
    assert options["run"] == "out" and options["resume"] and recipe.model_spec() == str(here / "lm") and recipe.objective[0].method == "sft"


def test_a_failed_run_says_how_to_go_on_and_other_errors_show(call, here, fake):
    def failed(*a, **kw):
        raise TrainingError("The loss is not finite.")

    fake("luthier.run", tune=failed)
    assert call("tune", "recipe.yaml", "--run", "out")[::2] == (2, "The loss is not finite.\nresume with: luthier tune out --resume\n")

    def broken(*a, **kw):
        raise ZeroDivisionError

    fake("luthier.run", tune=broken)
    with pytest.raises(ZeroDivisionError):
        call("tune", "recipe.yaml")


def test_an_unknown_option_is_refused(here):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", "recipe.yaml", "--fast"])
    assert stopped.value.code == 2


def test_ask_export_and_fetch(call, fake):
    calls = fake("luthier.run", ask=lambda run, prompts, max_new_tokens: [p.upper() for p in prompts])
    exports = fake("luthier.export", export=lambda run, form, out: Path("there") / form)
    assert call("ask", "run", "hello", "you", "--max-new-tokens", "3") == (0, "HELLO\nYOU\n", "")
    assert calls[0] == ("ask", ("run", ["hello", "you"]), {"max_new_tokens": 3})
    assert json.loads(call("ask", "run", "a", "--json")[1]) == [{"prompt": "a", "answer": "A"}]
    assert call("export", "run", "--gguf", "--out", "x")[1] == "there/gguf\n" and exports[-1][1] == ("run", "gguf", "x")
    with pytest.raises(SystemExit):
        call("export", "run")
    models = fake("luthier.core.fetch", fetch=lambda name, tell: Path("/cache") / name)
    assert call("fetch", "minilm")[1] == "/cache/minilm\n" and json.loads(call("fetch", "minilm", "--json")[1])["path"] == "/cache/minilm"
    assert models[0][1] == ("minilm",)


# -- methods of one's own --------------------------------------------------------------------------------------------------


def test_new(call, tmp_path):
    code, out, _ = call("new", "objective", "my-very-own", "--dir", str(tmp_path))
    assert code == 0 and (tmp_path / "my_very_own.py").is_file() and str(tmp_path / "my_very_own.py") in out
    assert call("new", "objectiv", "x", "--dir", str(tmp_path))[0] == 2


def test_matrix(call, fake):
    pairs = [{"a": "adapt/lora", "b": "objective/sft", "outcome": "runs", "why": "causal-lm", "seconds": 1}]

    def run(axes, tell, cores):
        for pair in pairs if tell else []:
            tell(pair)
        return pairs

    calls = fake("luthier.testing", matrix=run)
    assert json.loads(call("matrix", "--axes", "adapt,objective", "--json")[1]) == pairs and calls[0][1][0] == ("adapt", "objective")
    assert "runs     adapt/lora x objective/sft\n" in call("matrix")[1]
    assert call("matrix", "--axes", "adapt,objectiv")[0] == 2
