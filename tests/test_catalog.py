"""The catalogue: methods found in their sources, fields documented from them; papers judged by what is there; a light import."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import luthier
from luthier import catalog
from luthier.errors import RecipeError
from luthier.papers import _judged, _records, evidence_of, paper, papers

ROOT = Path(__file__).parents[1]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- methods ---------------------------------------------------------------------------------------------------------------


def test_entries_are_what_the_whole_sources_say():
    """The quick reading of heads against Python's own parser on every file."""
    for entry in catalog.entries():
        tree = ast.parse(entry.path.read_text(encoding="utf-8"))
        node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == entry.class_name)
        assert entry.idea == (ast.get_docstring(node) or "").strip().split("\n\n")[0].replace("\n", " ")
    registered = sum(p.read_text(encoding="utf-8").count("\n@register(") for a in catalog.AXES for p in (catalog.PACKAGE / a).glob("[!_]*.py"))
    assert len(catalog.entries()) == registered


def test_heads_that_cannot_be_cut_out_are_parsed_whole(tmp_path):
    file = tmp_path / "two.py"
    file.write_text('@register("a", paper=(1, 2))\nclass A:\n    x: int = 1\n\n@register(\n    "b",\n    wraps="lib.f",\n)\nclass B(\n    A,\n):\n    """Idea of b.\n\n    More."""\n')
    a, b = catalog._read("merge", file)
    assert (a.name, a.papers, a.idea) == ("a", (1, 2), "") and (b.name, b.wraps, b.idea) == ("b", "lib.f", "Idea of b.")


def test_names_are_unique_on_an_axis_and_match_their_files():
    names = [(e.axis, e.name) for e in catalog.entries()]
    assert len(set(names)) == len(names)
    assert all(e.path.parent.name == e.axis for e in catalog.entries())


def test_a_wrong_axis_or_name_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="Did you mean 'objective'"):
        catalog.entries("objectives")
    with pytest.raises(RecipeError, match="Did you mean 'sft'"):
        catalog.find("objective", "sftt")
    with pytest.raises(RecipeError, match="It is a method of the axis 'adapt'"):
        catalog.find("objective", "lora")


def test_underscores_are_understood():
    assert catalog.find("objective", "masked_thought").name == "masked-thought"


USERS = '''
from dataclasses import dataclass
from luthier.catalog import register
from luthier.merge import Merger

@dataclass
class Shared(Merger):
    common: int = 0
    """From the base."""

@register("mine")
@dataclass
class Mine(Shared):
    """Adds."""
    a: float = 1.0
    """Under the
    field."""
    b: int = 2  # behind the field, ü
    #: Above the field,
    #: two lines.
    c: str = "x"
    d: bool = False

def plus(x, n=1):
    return x + n
'''


def test_a_users_file(tmp_path):
    file = tmp_path / "users.py"
    file.write_text(USERS)
    cls = catalog.method("merge", f"{file}:Mine")
    assert cls is catalog.method("merge", str(file)) and cls(a=2.0).a == 2.0 and cls.axis == "merge"
    assert catalog.user_object(f"{file}:plus")(1) == 2
    with pytest.raises(RecipeError, match="Did you mean 'plus'"):
        catalog.user_object(f"{file}:plsu")
    with pytest.raises(RecipeError, match="not of 'select'"):
        catalog.method("select", str(file))
    with pytest.raises(RecipeError, match="does not exist"):
        catalog.method("merge", str(tmp_path / "none.py"))
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(RecipeError, match="cannot be imported: ZeroDivisionError"):
        catalog.method("merge", str(tmp_path / "broken.py"))


def test_field_docs_in_all_three_forms(tmp_path):
    file = tmp_path / "documented.py"
    file.write_text(USERS)
    found = catalog.field_docs(catalog.method("merge", f"{file}:Mine"))
    assert found == {"common": "From the base.", "a": "Under the\nfield.", "b": "behind the field, ü", "c": "Above the field, two lines.", "d": ""}


def test_field_docs_name_exactly_the_fields():
    cls = catalog.method("objective", "sft")
    assert set(catalog.field_docs(cls)) == {f.name for f in dataclasses.fields(cls) if f.init} and all(catalog.field_docs(cls).values())


# -- papers ----------------------------------------------------------------------------------------------------------------


def test_every_paper_is_judged_by_what_is_there():
    known = {f"{e.axis}/{e.name}" for e in catalog.entries()}
    found = papers()
    assert len(found) == 169
    for one in found:
        assert set(one.present) == set(one.methods) & known
        assert one.works == (not one.missing) and (one.status == "planned") == (not one.present and not one.works)
        assert {m for m in one.missing if "/" in m} == set(one.methods) - known


def test_a_paper_works_with_methods_preset_and_evidence(tmp_path):
    record = {**_records()[0], "methods": ["select/a", "adapt/b"], "preset": "the-preset", "claim": "001_x"}
    judge = lambda known: _judged(record, known, tmp_path)  # noqa: E731
    assert judge(set()).status == "planned"
    half = judge({"select/a"})
    assert half.status == "partly" and half.missing == ("adapt/b", "preset the-preset", "evidence") and not half.works
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "the_preset.yaml").write_text("name: x")
    both = {"select/a", "adapt/b"}
    assert judge(both).missing == ("evidence",)
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "001_x.json").write_text(json.dumps({"verdict": "not reproduced"}))
    whole = judge(both)
    assert whole.works and whole.status == "works" and whole.verdict == "not reproduced"
    (tmp_path / "evidence" / "001_x.json").write_text("{broken")
    assert judge(both).verdict is None and judge(both).missing == ("evidence",)
    (tmp_path / "evidence" / "001_x.json").write_text(json.dumps({"verdict": None}))
    assert judge(both).status == "partly", "a claim whose seeds are not all in proves nothing"


def test_a_paper_by_number_or_slug():
    assert paper(117).slug == paper("asft").slug == paper("117_asft").slug == "asft"
    with pytest.raises(RecipeError, match="Did you mean 'asft'"):
        paper("asftt")
    assert evidence_of(paper(117)) is None or "verdict" in evidence_of(paper(117))


# -- the package -----------------------------------------------------------------------------------------------------------


def test_importing_luthier_is_light():
    found = run_python("import sys, luthier; dir(luthier); luthier.methods('merge'); print(len(luthier.papers()), 'torch' in sys.modules, 'numpy' in sys.modules)")
    assert found == "169 False False"


def test_public_names():
    assert luthier.Recipe.__name__ == "Recipe" and luthier.method is catalog.method and callable(luthier.check)
    assert [p.n for p in luthier.papers()] == list(range(1, 170)) and luthier.papers.paper(1).n == 1
    assert luthier.__version__ in (ROOT / "pyproject.toml").read_text()
    assert set(luthier.__all__) <= set(dir(luthier))
    with pytest.raises(AttributeError, match="no attribute 'tunee'"):
        luthier.tunee  # noqa: B018
