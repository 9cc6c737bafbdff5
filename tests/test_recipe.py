"""Recipes: what is read, what is refused and with which words, what stages inherit, what goes back to YAML."""

import json
import math
import subprocess
import sys
import typing
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import catalog
from luthier._recipe import source
from luthier._recipe.family import family_of
from luthier._recipe.fit import Misfit, fit, types_of
from luthier._recipe.schema import static_types
from luthier.errors import DataError, RecipeError
from luthier.recipe import DEFAULTS, PRESETS, Recipe, Train, check

MINE = '''
from __future__ import annotations
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal
from luthier.adapt import Adapter
from luthier.catalog import register
from luthier.errors import RecipeError
from luthier.measure import Measure
from luthier.objective import Objective, Preference
from luthier.select import Selector
if TYPE_CHECKING:
    from nowhere import Unknown

@register("my-loss")
@dataclass
class MyLoss(Objective):
    """A loss for tests."""
    families = frozenset({"causal-lm"})
    columns = (frozenset({"prompt", "completion"}),)
    kl: float = 0.1
    """How much."""
    steps: int | None = None  # how many
    mode: Literal["a", "b", "off"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    shares: dict[str, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    on: bool = True
    strange: Unknown | None = None
    counter: ClassVar[int] = 0
    state: float = field(default=0.0, init=False)

    def __post_init__(self):
        if self.kl < 0:
            raise RecipeError(f"kl is {self.kl}; it must not be negative.")

@register("my-preference")
@dataclass
class MyPreference(Preference):
    """Another."""

@register("my-vision")
@dataclass
class MyVision(Adapter):
    """For pictures only."""
    families = frozenset({"image-classifier"})

@register("my-adapter")
@dataclass
class MyAdapter(Adapter):
    """Picks rows, though an adapter should not."""
    needs = frozenset({"val"})
    def pick(self, batch, row_scores, ctx):
        return None

@register("my-judge")
@dataclass
class MyJudge(Objective):
    """Needs a helper."""
    needs = frozenset({"judge"})

@register("my-loner")
@dataclass
class MyLoner(Objective):
    """One process only."""
    parallel = frozenset({"single"})

@register("my-grumbler")
@dataclass
class MyGrumbler(Objective):
    """Refuses small batches."""
    def check(self, recipe):
        return "my-grumbler needs train.batch of at least 8." if recipe.train.batch < 8 else None

@register("my-picker")
@dataclass
class MyPicker(Selector):
    """Online."""
    rows: int
    """Required."""
    def pick(self, batch, row_scores, ctx):
        return None

@register("my-measure")
@dataclass
class MyMeasure(Measure):
    """For pictures."""
    families = frozenset({"image-classifier"})

def judge(texts, scale=1):
    return [scale * len(t) for t in texts]
'''


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a user's method file, data and a causal language model's config."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path


def recipe_of(here, text, *overrides):
    (here / "recipe.yaml").write_text(text)
    return Recipe.load(here / "recipe.yaml", overrides)


BASE = "model: ./lm\ndata: train.jsonl\nmeasure: []\n"


def refusal(here, text, *overrides, build=False):
    with pytest.raises(RecipeError) as caught:
        made = recipe_of(here, text, *overrides)
        if build:
            [c.build() for c in made.choices()]
    return str(caught.value).replace(f"{here}/", "")


# -- reading ---------------------------------------------------------------------------------------------------------------


def test_defaults():
    made = Recipe.from_dict({"model": "m", "data": "d.jsonl"})
    assert [c.method for c in made.adapt] == ["lora"] and [c.method for c in made.optimize] == ["adamw"]
    assert [c.method for c in made.measure] == DEFAULTS["measure"]
    assert made.objective == made.select == made.merge == made.decode == made.search == []
    assert made.train == Train(epochs=1, batch=16, tokens_per_micro_batch=512, seed=0, schedule="cosine", warmup=0.03, clip=1.0)
    assert made.data.streams == {"train": "d.jsonl"} and made.data.on_error == "stop" and made.data.train_on == "completion"
    assert made.budget is None and made.merge_of is None


def test_everything_written_is_read(here):
    made = recipe_of(
        here,
        """
name: trial
model: {id: ./lm, dtype: bf16, trust_remote_code: false}
models: {teacher: {id: some/model}, other: ./lm}
helpers: {judge: ./mine.py:judge, scaled: {call: ./mine.py:judge, scale: 3}}
data: {train: train.jsonl, val: 'lab:traces', ood: [{prompt: a, completion: b}], columns: {prompt: q}, on_error: skip, limit: 3, too_long: cut}
select: {method: ./mine.py:MyPicker, rows: 3, budget: 25%}
objective:
  - {method: ./mine.py:MyLoss, kl: 2e-4, weight: 2}
  - ./mine.py:MyJudge
merge: {method: lines, of: [base, this, ./lm]}
train: {epochs: 2, tracker: tensorboard, clip: null}
measure: none
run: out
""",
    )
    assert made.name == "trial" and made.run == "out" and made.measure == [] and made.budget == "25%"
    assert made.model_spec() == {"id": str(here / "lm"), "dtype": "bf16", "trust_remote_code": False}
    assert made.model_spec("other") == str(here / "lm") and made.model_spec("teacher") == "some/model"
    assert made.data.to_dict()["columns"] == {"prompt": "q"} and made.data.limit == 3 and made.data.too_long == "cut"
    assert [c.weight for c in made.objective] == [2.0, 1.0] and made.objective[0].options == {"kl": 0.0002}
    assert made.objective[0].line == 9 and made.select[0].line == 7
    assert made.merge_of == ["base", "this", str(here / "lm")]
    assert made.train.tracker == ["tensorboard"] and made.train.clip is None and made.train.epochs == 2.0
    loss = made.objective[0].build()
    assert loss.kl == 0.0002 and loss.sizes == (1, 2)
    assert made.select[0].build().rows == 3
    helpers = made.build_helpers()
    assert helpers["judge"](["ab"]) == [2] and helpers["scaled"](["ab"]) == [6]


def test_a_mapping_without_method_changes_the_default():
    made = Recipe.from_dict({"model": "m", "data": "d", "optimize": {"lr": "2e-4"}})
    assert made.optimize[0].method == "adamw" and made.optimize[0].build().lr == 0.0002


def test_build_converts_values_to_the_fields_types(here):
    made = recipe_of(here, BASE + "objective: {method: './mine.py:MyLoss', kl: 1, sizes: [3], shares: {a: '1e-3'}, names: x, mode: off, strange: 7}")
    built = made.objective[0].build()
    assert (built.kl, built.sizes, built.shares, built.names, built.mode, built.strange) == (1.0, (3,), {"a": 0.001}, ["x"], "off", 7)
    assert isinstance(built.kl, float)


def test_a_reserved_word_that_is_a_field_goes_to_the_field(tmp_path):
    (tmp_path / "own.py").write_text(MINE.replace("kl: float", "weight: float").replace("self.kl", "self.weight"))
    made = Recipe.from_dict({"objective": {"method": "./own.py:MyLoss", "weight": 0.5}}, base=tmp_path)
    assert made.objective[0].build().weight == 0.5 and made.objective[0].weight == 1.0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("modle: x", "recipe.yaml:1: modle is no key of a recipe. Did you mean 'model'?"),
        ("model: x\nadapt:\n  method: lora\n  rnak: 3", "recipe.yaml:4: adapt.rnak is no field of 'lora'. Did you mean 'rank'?"),
        ("adapt: loar", "recipe.yaml:1: There is no method 'loar' on the axis 'adapt'. Did you mean 'lora'?"),
        ("objective: lora", "recipe.yaml:1: There is no method 'lora' on the axis 'objective'. It is a method of the axis 'adapt'."),
        ("lora: {rank: 3}", "recipe.yaml:1: lora is no key of a recipe. It is a method; write `adapt: lora`."),
        ("adapt:\n  method: lora\n  rank: x", "recipe.yaml:3: adapt.rank is 'x'; it must be a whole number."),
        ("adapt: null", "recipe.yaml:1: adapt cannot be empty; leave the key out for the default 'lora'."),
        ("merge: {alpha: 1}", "recipe.yaml:1: merge names no method; add `method:`. `luthier methods merge` lists them."),
        ("optimize: [adamw, sgd]", "recipe.yaml:1: optimize takes one method, not 2; use stages for several in turn."),
        ("train:\n  schedule: cosin", "recipe.yaml:2: train.schedule is 'cosin'; it must be one of linear, cosine, constant. Did you mean 'cosine'?"),
        ("train:\n  epochs: -1", "recipe.yaml:2: train.epochs is -1.0; it must be above 0."),
        ("train:\n  btach: 2", "recipe.yaml:2: train.btach is no setting of train. Did you mean 'batch'?"),
        ("train: {clip: 0}", "recipe.yaml:1: train.clip is 0.0; it must be above 0 (null for none)."),
        ("data:\n  tset: x", "recipe.yaml:2: data: 'tset' is neither a row stream nor an option. Did you mean 'test'?"),
        ("data:\n  validation: x", "recipe.yaml:2: data: 'validation' is neither a row stream nor an option. Did you mean 'val'?"),
        ("data: {train_on: assistnat}", "recipe.yaml:1: data.train_on is 'assistnat'; it must be one of completion, assistant, last, all. Did you mean 'assistant'?"),
        ("data: {limit: 0}", "recipe.yaml:1: data.limit is 0; it must be at least 1."),
        ("data: {train: {path: x, lmit: 3}}", "recipe.yaml:1: data.train.lmit is no option of a stream of rows. Did you mean 'limit'?"),
        ("model: {id: x, dtyp: fp32}", "recipe.yaml:1: model.dtyp is no option of a model. Did you mean 'dtype'?"),
        ("model: {dtype: fp32}", "recipe.yaml:1: model names no model; add `id:`."),
        ("stages:\n - model: x", "stages[0] cannot have 'model'; it belongs at the top."),
        ("stages:\n - name: a\n - adapt:\n     rankk: 3", "recipe.yaml:4: stages[1].adapt.rankk is no field of 'lora'. Did you mean 'rank'?"),
        ("stages:\n - start: bse", "stages[0].start is 'bse'; it must be 'base' or 'previous'."),
        ("stages: [{loop: {times: 2}}]", "stages[0].loop must have `stages:`, a list, and `times:`."),
        ("stages: [{loop: {stages: [{}], times: 0}}]", "stages[0].loop.times is 0; it must be at least 1."),
        ("stages: [{loop: {stages: [{}], until: often}}]", "stages[0].loop.until is 'often'; write a measure's number and a bound"),
        ("space: {adapt.rank: 4}", "space.adapt.rank is 4; it must be a list of choices."),
        ("space: {adpt.rank: [4]}", "space: 'adpt.rank' is no key of a recipe. Did you mean 'adapt'?"),
        ("helpers: {judge: foo}", "helpers.judge is 'foo'; it must be './FILE.py:FUNCTION'"),
        ("helpers: {judge: './none.py:f'}", "helpers.judge: the file none.py does not exist."),
        ("objective: ./none.py:Loss", "objective: the method file none.py does not exist."),
        ("select: {method: ./mine.py:MyPicker, rows: 1, budget: 0}", "select.budget is 0; it must be a count (400), a share (0.25) or '25%'."),
        ("select: {method: ./mine.py:MyPicker, rows: 1, budget: lots}", "select.budget is 'lots'"),
        ("- a\n- b", "recipe.yaml: a recipe is keys with values, such as `model: smollm2-135m`."),
    ],
)  # fmt: skip
def test_refusals_name_file_line_and_remedy(here, text, sentence):
    assert sentence in refusal(here, text)


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("kll: 1", "recipe.yaml:6: objective.kll is no field of './mine.py:MyLoss'. Did you mean 'kl'?"),
        ("kl: many", "recipe.yaml:6: objective.kl is 'many'; it must be a number."),
        ("kl: true", "objective.kl is True; it must be a number."),
        ("kl: .nan", "objective.kl is nan; it must be a number."),
        ("steps: 1.5", "objective.steps is 1.5; it must be a whole number or nothing (null)."),
        ("mode: c", "objective.mode is 'c'; it must be one of a, b, off."),
        ("sizes: [1, x]", "objective.sizes is [1, 'x']; it must be a list, each entry a whole number."),
        ("shares: [1]", "objective.shares is [1]; it must be keys with values ({key: value})."),
        ("on: 1", "objective.on is 1; it must be true or false."),
        ("names: [1]", "objective.names is [1]; it must be a list, each entry a text (write it in quotes)."),
        ("counter: 1", "objective.counter is no field of './mine.py:MyLoss'."),
        ("state: 1", "objective.state is no field of './mine.py:MyLoss'."),
    ],
)  # fmt: skip
def test_a_users_fields_are_checked_without_running_the_file(here, field, sentence):
    (here / "mine.py").write_text(MINE + "\nraise SystemExit('was run')\n")
    assert sentence in refusal(here, f"model: m\ndata: d\nobjective:\n  # a comment\n  method: ./mine.py:MyLoss\n  {field}")


def test_a_range_from_the_methods_own_check_gets_file_and_line(here):
    assert refusal(here, BASE + "objective:\n  method: ./mine.py:MyLoss\n  kl: -1\n", build=True) == (
        "recipe.yaml:6: objective './mine.py:MyLoss': kl is -1.0; it must not be negative."
    )


def test_a_required_field(here):
    assert "select: './mine.py:MyPicker' needs a value for 'rows'." in refusal(here, BASE + "select: ./mine.py:MyPicker", build=True)


def test_a_file_without_the_class_or_of_another_axis(here):
    assert "Did you mean 'MyLoss'?" in refusal(here, BASE + "objective: ./mine.py:MyLos", build=True)
    assert "is a method of the axis 'adapt', not of 'objective'" in refusal(here, BASE + "objective: ./mine.py:MyAdapter", build=True)


# -- YAML ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml:3: the key 'a' is given twice; the first is at f.yaml:1."),
        ("a: [1", "f.yaml:1: this is no valid YAML"),
        ("a: &x [*x]", "repeat themselves without end"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("? [1]\n: 2", "f.yaml:1: a key must be a plain word."),
        ("a: \x01", "f.yaml: this is no valid YAML"),
        ("[" * 600, "f.yaml"),
    ],
)
def test_bad_yaml(text, part):
    with pytest.raises(RecipeError) as caught:
        value, _ = source.parse(text, "f.yaml")
        assert isinstance(value, dict)
    assert part in str(caught.value)


def test_nested_anchors_do_not_fill_the_memory():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="repeat themselves"):
        source.parse("\n".join(lines), "f.yaml")


@settings(max_examples=40, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text("abc:-'\" \n", max_size=6), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), x, max_size=3), max_leaves=12))
def test_values_are_those_of_the_safe_loader(value):
    text = yaml.safe_dump({"top": value})
    assert source.parse(text, "f")[0] == yaml.safe_load(text)


def test_anchors_merge_keys_and_exponents():
    text = "base: &b {x: 1, y: 2}\nmine: {<<: *b, y: 3}\nn: [2e-4, 1E3, -1.5e-3, '2e-4', 1e, e5]"
    assert source.parse(text, "f")[0] == {"base": {"x": 1, "y": 2}, "mine": {"x": 1, "y": 3}, "n": [0.0002, 1000.0, -0.0015, "2e-4", "1e", "e5"]}


def test_lines_of_nested_values():
    _, marks = source.parse("a:\n  - b: 1\n    c:\n      - 2\n      - 3\n", "f")
    assert marks[("a", 0, "c", 1)] == "f:5" and marks[("a", 0, "c")] == "f:3" and marks[("a", 0, "b")] == "f:2"


# -- values against types --------------------------------------------------------------------------------------------------


@given(st.floats(allow_nan=False))
def test_every_float_text_is_that_float(x):
    assert fit(repr(x), float) == x
    assert fit(x, float | None) == x


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3), st.lists(st.integers(), max_size=3)))
def test_a_value_of_an_alternative_stays_as_it_is(x):
    same = fit(x, bool | int | float | str | list[int] | None)
    assert same == x and type(same) is type(x)


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (3, float, 3.0), (3.0, int, 3), ("x", list[str], ["x"]), ([1, 2], tuple[int, str], None), ([1, "a"], tuple[int, str], (1, "a")), (True, int, None),
        (None, float, None), ("1", int, None), (False, Literal["off", "on"], "off"), (1, Literal[1, 2], 1), (True, Literal[1, 2], None),
        ({"a": 1}, dict[str, float], {"a": 1.0}), ({1: 1}, dict[str, float], None), ("25%", int | float | str, "25%"), ([1], "Unknown", [1]),
        ([[1], [2]], list[tuple[int, ...]], [(1,), (2,)]), (float("nan"), float, None), ("nan", float, None), (1, str | None, None),
    ],
)  # fmt: skip
def test_fit(value, hint, wanted):
    if wanted is None:
        with pytest.raises(Misfit):
            fit(value, hint)
    else:
        assert fit(value, hint) == wanted and type(fit(value, hint)) is type(wanted)


@pytest.mark.parametrize("axis", ["objective", "optimize"])
def test_fields_read_from_source_are_the_fields_of_the_class(axis):
    """The source reader against typing and dataclasses on the imported classes."""
    for entry in catalog.entries(axis)[:12]:
        cls = entry.load()
        read = static_types(entry.path, entry.class_name)
        hints = types_of(cls)
        assert read is None or {k: h for k, h in read.items() if h is not typing.Any} == {
            f.name: hints[f.name] for f in catalog.fields_of(cls) if read.get(f.name) is not typing.Any
        }


# -- overrides -------------------------------------------------------------------------------------------------------------


def test_overrides(here):
    made = recipe_of(
        here, BASE + "objective: {method: ./mine.py:MyLoss, kl: 1, weight: 3}\ntrain: {batch: 4}",
        "adapt.rank=8", "train.batch=32", "optimize.lr=2e-4", "objective.kl=5e-1", "measure=task,weights", "data.test=pairs.jsonl", "train.clip=null", "train.tracker=tensorboard,wandb",
        "objective.names=a,b", "model.dtype=bf16", 'name="a,b"',
    )  # fmt: skip
    assert made.adapt[0].method == "lora" and made.adapt[0].options == {"rank": 8}
    assert made.train.batch == 32 and made.train.clip is None and made.train.tracker == ["tensorboard", "wandb"]
    assert made.optimize[0].options == {"lr": 0.0002} and made.objective[0].options == {"kl": 0.5, "names": ["a", "b"]}
    assert [c.method for c in made.measure] == ["task", "weights"] and made.data.streams == {"train": "train.jsonl", "test": "pairs.jsonl"}
    assert made.model == {"id": "./lm", "dtype": "bf16"} and made.name == "a,b"


def test_another_method_drops_the_fields_of_the_former(here):
    made = recipe_of(here, BASE + "objective: {method: ./mine.py:MyLoss, kl: 1, weight: 3}", "objective.method=sft")
    assert made.objective[0].options == {} and made.objective[0].weight == 3.0


def test_overrides_of_lists(here):
    text = BASE + "objective: [{method: ./mine.py:MyLoss}, sft]\nstages: [{name: a}, {optimize: {lr: 1e-3}}]"
    made = recipe_of(here, text, "objective.sft.weight=2", "objective.0.kl=3", "stages.1.optimize.lr=5", "stages.0.train.steps=7")
    assert made.objective[1].weight == 2.0 and made.objective[0].options["kl"] == 3
    assert made.stages[1].recipe.optimize[0].options == {"lr": 5} and made.stages[0].recipe.train.steps == 7
    assert recipe_of(here, text, "objective.1=dpo").objective[1].method == "dpo"
    assert "this axis has 2 entries" in refusal(here, text, "objective.kl=3")
    assert "'7' is no entry of a list of 2" in refusal(here, text, "stages.7.name=x")


def test_refused_overrides_say_which(here):
    assert refusal(here, BASE, "adapt.rnak=8") == "adapt.rnak=8: adapt.rnak is no field of 'lora'. Did you mean 'rank'?"
    assert refusal(here, BASE, "trian.batch=8").startswith("trian.batch=8: trian is no key of a recipe.")
    assert "is no override; write key=value" in refusal(here, BASE, "batch")


# -- stages ----------------------------------------------------------------------------------------------------------------

STAGES = """
name: top
model: ./lm
data: train.jsonl
measure: []
objective: {method: ./mine.py:MyLoss, kl: 1, mode: b}
optimize: {lr: 1e-3}
train: {batch: 4, seed: 3}
stages:
  - name: first
    objective: {kl: 2}
    train: {batch: 8}
  - start: base
    objective: sft
    data: {train_on: all}
    curate: null
  - name: rounds
    loop:
      times: 3
      start: base
      until: task/exact_match >= 0.9
      stages: [{name: play, optimize: sgd}, {}]
"""


def test_stages_inherit_from_the_top(here):
    made = recipe_of(here, STAGES)
    first, second, rounds = made.stage_list()
    assert first.name == "first" and first.start == "previous" and not first.loop
    assert first.recipe.objective[0].options == {"kl": 2, "mode": "b"} and first.recipe.train == Train(batch=8, seed=3)
    assert second.start == "base" and second.recipe.objective[0].method == "sft" and second.recipe.train.batch == 4
    assert second.recipe.data.train_on == "all" and second.recipe.data.streams == {"train": "train.jsonl"}
    assert rounds.loop and rounds.name == "rounds" and (rounds.times, rounds.start) == (3, "base") and rounds.until == "task/exact_match >= 0.9"
    assert [r.optimize[0].method for r in rounds.recipes] == ["sgd", "adamw"] and rounds.recipes[1].optimize[0].options == {"lr": 1e-3}
    assert len(made.stage_recipes()) == 4 and made.objective[0].options == {"kl": 1, "mode": "b"}


def test_one_stage_without_stages():
    made = Recipe.from_dict({"model": "m", "data": "d"})
    (only,) = made.stage_list()
    assert only.recipe is made and not only.loop


def test_a_stages_choice_knows_its_line(here):
    assert recipe_of(here, STAGES).stages[1].recipe.objective[0].line == 14


# -- writing and changing --------------------------------------------------------------------------------------------------


def summary(recipe):
    return [(c.axis, Path(c.spec).name, c.options, c.extras) for r in [recipe, *recipe.stage_recipes()] for c in r.choices()]


def test_yaml_means_the_same_anywhere(here, tmp_path):
    made = recipe_of(here, STAGES + "helpers: {judge: ./mine.py:judge}\nmodels: {other: ./lm}")
    text = made.to_yaml()
    other = tmp_path / "elsewhere" / "recipe.yaml"
    other.write_text(text)
    again = Recipe.load(other)
    assert summary(again) == summary(made) and again.train == made.train and again.model_spec() == made.model_spec() == str(here / "lm")
    assert again.data.streams == {"train": str(here / "train.jsonl")} and again.build_helpers()["judge"](["abc"]) == [3]
    assert again.to_yaml() == text
    assert again.stages[0].recipe.objective[0].build().kl == 2.0


def test_to_dict_gives_the_recipe_back(here):
    made = recipe_of(here, STAGES, "train.steps=9")
    again = Recipe.from_dict(made.to_dict(), base=here)
    assert again == made and again.train.steps == 9


def test_from_dict_leaves_its_input_alone():
    values = {"model": "m", "data": {"train": "d"}, "optimize": {"lr": 1.0}}
    before = json.loads(json.dumps(values))
    Recipe.from_dict(values, overrides=["optimize.lr=2", "data.test=x", "adapt.rank=3"])
    assert values == before


def test_with_values_and_without(here):
    made = recipe_of(here, BASE + "search: grid\nspace: {adapt.rank: [4, 8], optimize.lr: [1e-4, 1e-3]}")
    point = made.without("search").with_values({"adapt.rank": 4, "optimize.lr": 1e-4})
    assert point.search == [] and point.adapt[0].options == {"rank": 4} and point.optimize[0].options == {"lr": 1e-4}
    assert made.search and "rank" not in made.adapt[0].options
    with pytest.raises(RecipeError, match=r"adapt\.rank is 'x'"):
        made.with_values({"adapt.rank": "x"})


def test_rows_and_models_in_memory():
    rows = [{"prompt": str(i), "completion": "x"} for i in range(20)]
    one, same = (Recipe.from_dict({"model": "m", "data": {"train": rows}}) for _ in range(2))
    other = Recipe.from_dict({"model": "m", "data": {"train": [*rows[:-1], {"prompt": "z", "completion": "x"}]}})
    assert one.data.streams["train"] == rows
    assert one.to_yaml() == same.to_yaml() != other.to_yaml() and "20 rows in memory" in one.to_yaml()
    torch = pytest.importorskip("torch")

    class Model:
        kind, source = "causal-lm", "tiny"

        def __init__(self):
            self.network = torch.nn.Linear(2, 2)

    model = Model()
    made = Recipe.from_dict({"model": model, "data": {"train": rows}})
    before = made.to_yaml()
    assert made.model_spec() is model and made.with_values({"train.batch": 2}).model_spec() is model
    model.network.weight.data += 1
    assert made.to_yaml() != before


def test_an_absent_objective_follows_rows_and_model():
    made = Recipe.from_dict({"model": "m", "data": "d"})
    chosen = {kind: made.objective_for(family, kind)[0].method for family, kind in (("causal-lm", "prompt-completion"), ("image-classifier", "image-label"), ("causal-lm", "preference"), ("text-encoder", "pairs"))}
    assert chosen == {"prompt-completion": "sft", "image-label": "classify", "preference": "dpo", "pairs": "info-nce"}


def presets():
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("name", presets())
def test_presets_load_by_name(name):
    known = {f"{e.axis}/{e.name}" for e in catalog.entries()}
    text = (PRESETS / f"{name}.yaml").read_text()
    try:
        made = Recipe.load(name.replace("_", "-"))
    except RecipeError as error:
        # Its methods may not all be in the catalogue yet; anything else is a mistake.
        if "There is no method" in str(error):
            pytest.skip(str(error))
        raise
    assert {f"{c.axis}/{c.method}" for r in made.stage_recipes() for c in r.choices()} <= known and made.model is None and text


def test_a_wrong_preset_name():
    with pytest.raises(RecipeError, match="There is no recipe file no-such-thing"):
        Recipe.load("no-such-thing")


# -- impossible combinations -----------------------------------------------------------------------------------------------


def clash(here, text, *overrides, kind=RecipeError):
    made = recipe_of(here, text, *overrides)
    with pytest.raises(kind) as caught:
        check(made)
    return str(caught.value).replace(f"{here}/", "")


def test_a_sound_recipe_passes(here):
    assert check(recipe_of(here, BASE + "objective: ./mine.py:MyLoss")) == []
    assert check(recipe_of(here, BASE)) == []


def test_model_and_data_are_needed(here):
    assert "names no model" in clash(here, "data: train.jsonl")
    assert "has no 'train' rows" in clash(here, "model: ./lm")


def test_two_definers_of_one_hook(here):
    text = BASE + "data: {train: train.jsonl, val: train.jsonl}\n".replace("data: train.jsonl\n", "")
    text = text.replace("data: train.jsonl\n", "") + "select: {method: ./mine.py:MyPicker, rows: 1}\nadapt: ./mine.py:MyAdapter\n"
    assert clash(here, text) == "recipe.yaml:5: Both select './mine.py:MyPicker' and adapt './mine.py:MyAdapter' decide 'pick'; keep one of them."


def test_no_family_serves_all(here):
    said = clash(here, BASE + "adapt: ./mine.py:MyVision\nobjective: ./mine.py:MyLoss\n")
    assert said == "recipe.yaml:5: adapt './mine.py:MyVision' serves image-classifier, but objective './mine.py:MyLoss' serves causal-lm; no model is both. Change one of them."


def test_the_models_family_from_its_config(here):
    said = clash(here, BASE + "adapt: ./mine.py:MyVision\nobjective: {method: ./mine.py:MyJudge}\n")
    assert "adapt './mine.py:MyVision' serves image-classifier; the model is of the family 'causal-lm'." in said


def test_a_measure_that_does_not_serve_the_model_is_left_out(here):
    assert "measure './mine.py:MyMeasure' serves image-classifier; the model is of the family 'causal-lm', so it is left out." in check(
        recipe_of(here, BASE, "measure=./mine.py:MyMeasure")
    )


def test_needs(here):
    assert "adapt './mine.py:MyAdapter' needs 'val' rows; add `data: {val: FILE}`." in clash(here, BASE + "adapt: ./mine.py:MyAdapter")
    assert "needs 'judge'; add `helpers: {judge: ./mine.py:FUNCTION}`." in clash(here, BASE + "objective: ./mine.py:MyJudge")
    assert check(recipe_of(here, BASE + "objective: ./mine.py:MyJudge\nhelpers: {judge: ./mine.py:judge}")) == []


def test_a_methods_own_check(here):
    assert clash(here, BASE + "objective: ./mine.py:MyGrumbler\ntrain: {batch: 4}") == "recipe.yaml:4: my-grumbler needs train.batch of at least 8."
    assert check(recipe_of(here, BASE + "objective: ./mine.py:MyGrumbler")) == []


def test_one_process_only(here, monkeypatch):
    made = recipe_of(here, BASE + "objective: ./mine.py:MyLoner")
    assert check(made) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="runs in one process only, but 2 were started"):
        check(made)


def test_a_stage_is_checked_too(here):
    assert "needs train.batch" in clash(here, BASE + "objective: ./mine.py:MyGrumbler\nstages: [{}, {train: {batch: 2}}]")


def test_columns_of_the_first_row(here):
    said = clash(here, BASE + "objective: ./mine.py:MyPreference")
    assert "needs the columns chosen + prompt + rejected or chosen + rejected; the training rows have completion, prompt, so chosen, rejected is missing" in said
    assert check(recipe_of(here, BASE + "objective: ./mine.py:MyPreference", "data=pairs.jsonl")) == []
    (here / "odd.jsonl").write_text(json.dumps({"frage": "a", "antwort": "b"}) + "\n")
    assert "odd.jsonl" in clash(here, BASE + "objective: ./mine.py:MyLoss", "data=odd.jsonl", kind=DataError)
    assert check(recipe_of(here, BASE + "objective: ./mine.py:MyLoss", "data.train=odd.jsonl", "data.columns={prompt: frage, completion: antwort}")) == []


def test_missing_files(here):
    assert clash(here, "model: ./ml\ndata: train.jsonl").endswith("ml does not exist. Did you mean 'lm'?")
    said = clash(here, "model: ./lm\ndata:\n  train: trian.jsonl")
    assert said.startswith("recipe.yaml:3: data.train: the file ") and said.endswith("Did you mean 'train.jsonl'?")
    (here / "empty").mkdir()
    assert "holds no model" in clash(here, "model: ./empty\ndata: train.jsonl")


def test_search_needs_a_space(here):
    assert "A search needs `space:`" in clash(here, BASE + "search: grid")
    assert "adapt.rank is 'x'" in clash(here, BASE + "search: grid\nspace: {adapt.rank: [4, x]}")


def test_notices(here):
    text = "model: {id: ./lm, trust_remote_code: true}\ndata: {train: train.jsonl, holdout: 0}\nmeasure: []"
    remote, rows = check(recipe_of(here, text))
    assert "code that comes with ./lm will run" in remote and "no test rows" in rows


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "causal-lm"), ({"architectures": ["GPT2LMHeadModel"]}, "causal-lm"),
        ({"architectures": ["ViTForImageClassification"]}, "image-classifier"), ({"architectures": ["BertForMaskedLM"]}, "text-encoder"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "text-encoder"), ({"architectures": ["CLIPModel"], "model_type": "clip"}, "dual-encoder"),
        ({"architectures": ["MysteryNet"], "model_type": "mystery"}, None), ({}, None),
    ],
)  # fmt: skip
def test_family_of_a_config(tmp_path, config, family):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert family_of(tmp_path) == family
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert family_of(adapter) == family


def test_family_of_models_that_come_along(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    assert family_of("smollm2") == family_of({"id": "smollm2-135m"}) == "causal-lm" and family_of("minilm") is None
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    assert family_of("minilm") == "text-encoder" and family_of("some/hub-id") is None and family_of("lab:no-such-model") is None


def test_loading_a_recipe_imports_neither_torch_nor_a_method(here):
    (here / "recipe.yaml").write_text(BASE + "objective: {method: asft, kl: 0.05}\n")
    code = f"import sys; from luthier.recipe import Recipe; Recipe.load({str(here / 'recipe.yaml')!r}); print(sorted({{'torch', 'numpy', 'luthier.objective.asft'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]", done.stderr


def test_train_ranges():
    assert math.isclose(Train(warmup=0.1).warmup, 0.1)
    for bad in ({"batch": 0}, {"steps": 0}, {"warmup": -1}, {"clip": -1.0}, {"epochs": math.inf}, {"threads": 0}, {"save_every": -1}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            Train(**bad)


def test_a_tokenizer_and_a_template_are_found_beside_the_recipe(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: {id: smollm2-135m, tokenizer: words, template: chat.jinja}\ndata: {train: x.jsonl}\n")
    spec = Recipe.load(recipe).model_spec()
    assert spec["tokenizer"] == str(tmp_path / "words") and spec["template"] == str(tmp_path / "chat.jinja")
