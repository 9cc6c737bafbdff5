"""Reading data: every format, every usual column name, and one clear sentence for everything that can be wrong."""

import copy
import json
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luthier.core.rows import Rows, hold_out, kind_of, load_rows, load_streams, preference_parts
from luthier.errors import DataError, RecipeError

PAIR = {"prompt": "a?", "completion": "b"}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def write(path, rows):
    path.write_text("\n".join(json.dumps(r) if not isinstance(r, str) else r for r in rows) + "\n", encoding="utf-8")
    return path


# -- Rows -------------------------------------------------------------------------------------------------------------------


def test_ids_stay_with_rows_and_nothing_is_changed():
    given = [{"prompt": str(i), "completion": "x", "meta": {"n": i}} for i in range(5)]
    before = copy.deepcopy(given)
    rows = Rows(given, name="train")
    taken = rows.take(np.array([3, 1])).take([1])
    assert (taken[0]["prompt"], taken.ids.tolist(), taken.name) == ("1", [1], "train")
    assert rows[1:3].ids.tolist() == [1, 2]
    assert [r["prompt"] for r in rows[::-2]] == ["4", "2", "0"]
    assert rows[-1]["prompt"] == "4"
    assert rows.take([]).ids.tolist() == []
    assert given == before
    with pytest.raises(ValueError, match="read-only"):
        rows.ids[0] = 7
    assert (rows.kind, rows.columns) == ("prompt-completion", ("prompt", "completion", "meta"))
    assert Rows([{"text": "a", "label": 1}, {"text": "b"}]).columns == ("text",), "what every row has"


def test_rows_of_anything():
    import datasets

    columns = {"text": ["a", "b"], "label": [0, 1]}
    expected = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    for x in (expected, tuple(expected), iter(expected), columns, datasets.Dataset.from_dict(columns), Rows(expected)):
        rows = Rows.of(x, name="pool")
        assert (list(rows), rows.name, rows.kind) == (expected, "pool", "text-label")
    same = Rows(expected, ids=[7, 9], name="train")
    assert Rows.of(same) is same
    assert Rows.of(same, name="test").ids.tolist() == [7, 9]
    for wrong, words in ((["a"], "row 1"), ("file", "not str"), ({"a": [1], "b": [1, 2]}, "differ in length"), (3, "not int")):
        with pytest.raises(DataError, match=words):
            Rows.of(wrong)
    with pytest.raises(ValueError, match="2 rows were given 1 ids"):
        Rows(expected, ids=[1])


def test_fingerprints_are_of_content():
    from PIL import Image

    def mark(**row):
        return Rows([row]).fingerprint

    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert mark(a=1, b="x") == mark(b="x", a=1) == mark(a=np.int64(1), b="x")
    assert mark(a=[1, 2]) == mark(a=(1, 2))
    different = [mark(a=1), mark(a="1"), mark(a=True), mark(a=None), mark(a=[1]), mark(a={"b": 1}), mark(b=1), mark(a=1.5), mark(a=b"1"), mark(a={1: "x"}), mark(a="\ud800")]
    assert len(set(different)) == len(different)
    assert mark(image=image) == mark(image=image.copy()) == mark(image=np.asfortranarray(image))
    assert mark(image=image) != mark(image=image[::-1])
    assert mark(image=image) != mark(image=image.reshape(4, 3))
    assert mark(image=Image.fromarray(image)) == mark(image=Image.fromarray(image)) != mark(image=Image.fromarray(image[::-1]))
    rows = Rows([{"a": 1}, {"a": 2}])
    assert rows.fingerprint != rows.take([1, 0]).fingerprint
    assert Rows([{"a": 1}, {"a": 2}], name="other", ids=[5, 6]).fingerprint == rows.fingerprint
    assert Rows([{"a": 12}]).fingerprint != Rows([{"a": 1}, {"a": 2}]).fingerprint


def test_media_files_count_by_their_bytes(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    row = {"image": str(file), "label": 0}
    first = Rows([row]).fingerprint
    (tmp_path / "b.png").write_bytes(b"one")
    assert Rows([{**row, "image": str(tmp_path / "b.png")}]).fingerprint == first
    file.write_bytes(b"two")
    assert Rows([row]).fingerprint != first


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ("prompt completion meta", "prompt-completion"), ("messages", "messages"), ("prompt chosen rejected", "preference"), ("anchor positive", "pairs"),
        ("text label", "text-label"), ("image label text", "image-label"), ("image text", "image-text"), ("text", "text"), ("prompt", "prompt"),
        ("image prompt completion", "prompt-completion"), ("audio label", "audio-label"), ("state action", "other"),
    ],
)  # fmt: skip
def test_kinds(columns, kind):
    assert kind_of(columns.split()) == kind


# -- formats ----------------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [{"prompt": "a, \"b\"\u2028 c?", "completion": "line\nline"}, {"prompt": "é😀", "completion": "7"}]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "c.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "d.json").write_text(json.dumps({k: [r[k] for r in rows] for k in rows[0]}))
    write(tmp_path / "e.json", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    quoted = ['"' + r["prompt"].replace('"', '""') + '"{}"' + r["completion"] + '"' for r in rows]
    (tmp_path / "g.csv").write_bytes(("\ufeffprompt,completion\r\n" + "\r\n".join(q.format(",") for q in quoted)).encode())
    (tmp_path / "h.tsv").write_text("prompt\tcompletion\n" + "\n".join(q.format("\t") for q in quoted))
    (tmp_path / "i.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    prints = {p.name: load_rows(p).fingerprint for p in sorted(tmp_path.iterdir())}
    assert len(prints) == 9
    assert set(prints.values()) == {Rows(rows).fingerprint}, prints
    assert load_rows("a.jsonl", base=tmp_path).source == "a.jsonl"
    assert load_rows(rows).fingerprint == Rows(rows).fingerprint
    assert load_rows([str(tmp_path / "a.jsonl"), tmp_path / "g.csv"]).ids.tolist() == [0, 1, 2, 3]


def test_tables_without_types_and_limits(tmp_path):
    (tmp_path / "a.csv").write_text("text,label,weight,note\none,1,0.5,\ntwo,-2,1,x\n")
    rows = load_rows(tmp_path / "a.csv")
    assert [(r["label"], r["weight"]) for r in rows] == [(1, 0.5), (-2, 1.0)]
    assert "note" not in rows[0]
    (tmp_path / "b.csv").write_text("text,label\none,1\ntwo,x\n")
    assert [r["label"] for r in load_rows(tmp_path / "b.csv")] == ["1", "x"]
    file = write(tmp_path / "c.jsonl", [PAIR] * 5)
    assert len(load_rows(file, limit=3)) == 3
    with pytest.raises(RecipeError, match="limit is 0"):
        load_rows(file, limit=0)


def test_folders_and_their_splits(tmp_path):
    write(tmp_path / "one.jsonl", [PAIR])
    write(tmp_path / "two.jsonl", [PAIR, PAIR])
    assert load_rows(tmp_path).ids.tolist() == [0, 1, 2]
    write(tmp_path / "train-00000-of-00001.jsonl", [PAIR] * 3)
    write(tmp_path / "my_validation.jsonl", [{**PAIR, "prompt": "v"}])
    assert len(load_rows(tmp_path)) == 3
    assert load_rows(tmp_path, "val")[0]["prompt"] == "v"
    with pytest.raises(DataError, match=r"no 'ood' file.*train, val"):
        load_rows(tmp_path, "ood")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        load_rows(tmp_path / "empty")


def test_pictures_are_found_and_decoded(tmp_path):
    import io

    from PIL import Image

    picture = np.zeros((2, 3, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    file = write(tmp_path / "a.jsonl", [{"image": "a.png", "label": 1}])
    assert load_rows(file)[0]["image"] == str(tmp_path / "a.png")
    pq.write_table(pa.Table.from_pylist([{"img": {"bytes": buffer.getvalue(), "path": None}, "label": 1}]), tmp_path / "b.parquet")
    assert load_rows(tmp_path / "b.parquet")[0]["image"].shape == (2, 3, 3)
    for row, words in (({"image": "b.png", "label": 1}, "b.png does not exist. Did you mean 'a.png'"), ({"image": 3, "label": 1}, "a number .3.")):
        with pytest.raises(DataError, match=words):
            load_rows(write(tmp_path / "bad.jsonl", [row]))
    with pytest.raises(DataError, match="no readable picture"):
        load_rows([{"image": b"nothing", "label": 1}])


# -- column names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind", "expected"),
    [
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "prompt-completion", {"prompt": "Add\n\n1 2", "completion": "3"}),
        ({"instruction": "Add", "input": "", "output": "3"}, "prompt-completion", {"prompt": "Add", "completion": "3"}),
        ({"question": "q", "answer": "a"}, "prompt-completion", {"prompt": "q", "completion": "a"}),
        ({"input": "q", "output": "a"}, "prompt-completion", {"prompt": "q", "completion": "a"}),
        ({"query": "q", "response": "a", "system_prompt": "s"}, "prompt-completion", {"prompt": "q", "completion": "a", "system": "s"}),
        ({"prompt": "q", "response": "a"}, "prompt-completion", {"prompt": "q", "completion": "a"}),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}, "messages", {"messages": [USER, ASSISTANT]}),
        ({"messages": [{"role": "Human", "content": "hi"}, ASSISTANT]}, "messages", {"messages": [USER, ASSISTANT]}),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        ({"sentence1": "a", "sentence2": "b", "neg": "c"}, "pairs", {"anchor": "a", "positive": "b", "negative": "c"}),
        ({"query": "a", "pos": "b"}, "pairs", {"anchor": "a", "positive": "b"}),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, "text-label", {"text": "a", "text_pair": "b", "label": 1}),
        ({"premise": "a", "hypothesis": "b", "labels": 1}, "text-label", {"text": "a", "text_pair": "b", "label": 1}),
        ({"sentence": "a", "label": 1}, "text-label", {"text": "a", "label": 1}),
        ({"text": "a", "sentiment": "good"}, "text-label", {"text": "a", "label": "good"}),
        ({"img": [[0]], "caption": "a"}, "image-text", None),
        ({"content": "a"}, "text", {"text": "a"}),
    ],
)
def test_usual_names_are_understood_and_told(row, kind, expected):
    told = []
    before = copy.deepcopy(row)
    rows = load_rows([row], tell=told.append)
    assert rows.kind == kind
    assert expected is None or rows[0] == expected
    assert row == before
    renamed = set(row) - set(rows[0]) - {"input"}
    assert all(any(f"'{name}' as" in t for t in told) for name in renamed)
    assert len(told) == bool(renamed)


def test_explicit_columns():
    row = {"q": "a", "prompt": "other", "out": "b", "id": 3}
    assert load_rows([row], columns={"prompt": "q", "completion": "out"})[0] == {"prompt": "a", "completion": "b", "id": 3}
    assert load_rows([{"text": "a", "label": 3}], columns={"text": "text"}).kind == "text"
    with pytest.raises(DataError, match=r"row 1: the column 'qq'.*Did you mean 'q'"):
        load_rows([row], columns={"prompt": "qq"})


def test_unused_columns_are_told():
    told = []
    load_rows([{**PAIR, "topic": "x", "meta": {}, "id": 1}], tell=told.append)
    assert len(told) == 1
    assert "topic stay with the rows" in told[0]


# -- what can be wrong ----------------------------------------------------------------------------------------------------------

BAD = [
    ("{", r"malformed JSON \(expecting property name"),
    ("[1]", "must be an object with named columns, not a list"),
    ("3", "not a number"),
    ({"prompt": "a", "complettion": "b"}, r"found: prompt, complettion. Is 'complettion' meant to be completion\? Then say `columns: {completion: complettion}`"),
    ({"state": 1}, "fit no known kind"),
    ({}, "row is empty"),
    ({"prompt": "a", "completion": 7}, r"'completion' is a number \(7\), but must be text"),
    ({"prompt": ["x"], "completion": "b"}, "message 1 of 'prompt' is text"),
    ({"prompt": "a", "completion": "  "}, "'completion' is empty"),
    ({"prompt": "", "completion": "b"}, "'prompt' is empty"),
    ({"prompt": "a", "completion": None}, "'completion' of the other rows is missing or null"),
    ({"prompt": "a", "completion": "\ud800"}, "not valid UTF-8"),
    ({**PAIR, "weight": -1}, "'weight' is a number .-1."),
    ({**PAIR, "weight": "x"}, "'weight' is text"),
]
BAD_MESSAGES = [
    ([], "empty"),
    ("hi", "but must be a list"),
    ([USER], "no assistant turn"),
    ([{"role": "usr", "content": "a"}, ASSISTANT], "unknown role 'usr'.*Did you mean 'user'"),
    ([USER, {"role": "assistant", "content": ""}], "content of message 2 .assistant. is empty"),
    ([USER, {"role": "assistant", "content": 3}], "a number .3."),
    ([USER, {"role": "assistant"}], "null"),
    (["hi", ASSISTANT], "message 1 of 'messages' is text"),
]
BAD_OTHERS = [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal"),
    ({"prompt": "a", "chosen": "b", "rejected": [ASSISTANT]}, "both"),
    ({"chosen": "b", "rejected": "c"}, "no common beginning"),
    ({"chosen": "ab", "rejected": "abc"}, "only the beginning"),
    ({"text": "a", "label": 0.5}, "'label' is a number .0.5."),
    ({"text": "a", "label": [1]}, "'label' is a list"),
    ({"text": "a", "label": ""}, "'label' is empty"),
    ({"anchor": "a", "positive": "b", "negatives": ["c", 3]}, "'negatives' is a number"),
    ({"anchor": "a", "positive": ["b"]}, "'positive' is a list"),
]


@pytest.mark.parametrize(("bad", "words"), BAD)
def test_one_sentence_with_the_line(tmp_path, bad, words):
    file = write(tmp_path / "x.jsonl", [PAIR, "", bad, PAIR])
    with pytest.raises(DataError, match=rf"^x\.jsonl:3: .*{words}") as caught:
        load_rows(file)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    rows = load_rows(file, on_error="skip")
    assert (len(rows), rows.ids.tolist(), len(rows.aside), rows.aside[0].where) == (2, [0, 2], 1, "x.jsonl:3")
    assert "1 of 3 rows of x.jsonl were set aside" in " ".join(rows.notices)


@pytest.mark.parametrize(("row", "words"), [({"messages": m}, w) for m, w in BAD_MESSAGES] + BAD_OTHERS)
def test_bad_conversations_preferences_labels_and_pairs(row, words):
    with pytest.raises(DataError, match=rf"^train, row 1: .*{words}"):
        load_rows([row])


def test_how_many_others_are_bad(tmp_path):
    file = write(tmp_path / "x.jsonl", ["{", PAIR, "[]", "4"])
    with pytest.raises(DataError, match=r"x.jsonl:1: .* \(2 more rows are bad as well\)\. .*on_error: skip"):
        load_rows(file)
    with pytest.raises(DataError, match=r"All 1 rows of y.jsonl are bad; the first is y.jsonl:1"):
        load_rows(write(tmp_path / "y.jsonl", ["{"]), on_error="skip")
    with pytest.raises(RecipeError, match="Did you mean 'skip'"):
        load_rows(file, on_error="skipp")


def test_mixed_kinds_name_the_first_that_differs(tmp_path):
    file = write(tmp_path / "x.jsonl", [PAIR, PAIR, {"messages": [USER, ASSISTANT]}])
    for on_error in ("stop", "skip"):
        with pytest.raises(DataError, match=r"x.jsonl:3 is a row of the kind messages, but x.jsonl:1 is prompt-completion"):
            load_rows(file, on_error=on_error)


def test_broken_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_bytes(json.dumps(PAIR).encode() + b"\n\xff\xfe\n")
    (tmp_path / "bad.json").write_bytes(b'[{"prompt":\n "a",\n oops}]')
    (tmp_path / "bytes.json").write_bytes(b'[\n"\xff"]')
    (tmp_path / "one.json").write_text("3")
    (tmp_path / "bad.csv").write_bytes(b'prompt,completion\na,b\n"a\nb",c\na\n')
    (tmp_path / "bytes.csv").write_bytes(b"prompt,completion\na,\xff\n")
    (tmp_path / "twice.csv").write_bytes(b"prompt,prompt\na,b\n")
    (tmp_path / "open.csv").write_bytes(b'prompt,completion\na,b\n"a,b\n')
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    (tmp_path / "x.txt").write_text("a")
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": ["b", None]}), tmp_path / "null.parquet")
    for name, words in {
        "empty.jsonl": "empty.jsonl is empty", "bad.jsonl": "bad.jsonl:2: it holds bytes that are not valid UTF-8", "bad.json": r"bad.json:3: malformed JSON",
        "bytes.json": "bytes.json:2: it holds bytes", "one.json": "one.json: the file must hold a list", "bad.csv": "bad.csv:5: the row has 1 cells, but there are 2 columns",
        "bytes.csv": "bytes.csv:2: it holds bytes", "twice.csv": "twice.csv:1: the column 'prompt' occurs twice", "open.csv": "open.csv:.*malformed table",
        "bad.parquet": "no readable parquet", "x.txt": "'.txt' are not understood; use .jsonl", "deep.jsonl": "deep.jsonl:1: malformed JSON",
        "null.parquet": "null.parquet, row 2: .*'completion'", "bed.jsonl": "does not exist. Did you mean 'bad.jsonl'", "no/bad.jsonl": "no folder",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=words):
            load_rows(tmp_path / name)


def test_preferences_with_prompts_said_twice_or_not_at_all():
    other = {"role": "assistant", "content": "no"}
    assert preference_parts({"prompt": "hi", "chosen": [USER, ASSISTANT], "rejected": [USER, other]}) == ([USER], [ASSISTANT], [other])
    assert preference_parts({"chosen": [USER, ASSISTANT], "rejected": [USER, other]}) == ([USER], [ASSISTANT], [other])
    assert preference_parts({"prompt": "hi", "chosen": [ASSISTANT], "rejected": [other]}) == ([USER], [ASSISTANT], [other])
    assert preference_parts({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [other]}) == ([USER], [ASSISTANT], [other])


@pytest.mark.slow  # importing trl takes ten seconds
def test_implicit_prompts_agree_with_trl():
    from trl.data_utils import extract_prompt

    for row in (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "H: a\nA: yes", "rejected": "H: a\nA: no"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "no"}]},
    ):
        theirs = extract_prompt(row)
        assert preference_parts(row) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


# -- streams ------------------------------------------------------------------------------------------------------------------


def test_rows_are_held_out_with_duplicates_on_one_side(tmp_path):
    rows = [{"prompt": str(i % 60), "completion": "x", "id": i} for i in range(100)]
    file, told = write(tmp_path / "x.jsonl", rows), []
    streams = load_streams({"train": "x.jsonl", "on_error": "stop", "train_on": "completion"}, base=tmp_path, tell=told.append)
    train, test = streams["train"], streams["test"]
    assert (len(test), len(train), test.name) == (10, 90, "test")
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in test}
    assert sorted([*train.ids, *test.ids]) == list(range(100))
    assert len(told) == 1
    assert "10 of the 100 rows of x.jsonl were held out" in told[0]
    again = load_streams(str(file))
    assert again["test"].fingerprint == test.fingerprint
    assert load_streams(str(file), seed=1)["test"].fingerprint != test.fingerprint
    assert set(load_streams({"train": str(file), "holdout": 0})) == {"train"}
    assert len(load_streams({"train": str(file), "holdout": 25})["test"]) == 25


@pytest.mark.parametrize(("n", "held"), [(2, 1), (7, 1), (40, 4), (6000, 500)])
def test_a_tenth_at_least_one_at_most_500(n, held):
    train, test = hold_out(Rows([{"text": str(i)} for i in range(n)]))
    assert (len(test), len(train)) == (held, n - held)


def test_equal_rows_cannot_be_split():
    told = []
    assert set(load_streams({"train": [PAIR, {**PAIR, "id": 2}]}, tell=told.append)) == {"train"}
    assert "no two different rows" in told[0]
    train, test = hold_out(Rows([{"text": "a"}] * 8 + [{"text": "b"}] * 2))
    assert {r["text"] for r in test} == {"b"}
    assert len(train) == 8


def test_named_streams_and_overlap(tmp_path):
    train, test, told = write(tmp_path / "a.jsonl", [PAIR, {**PAIR, "prompt": "z"}]), write(tmp_path / "b.jsonl", [{**PAIR, "id": 5}]), []
    streams = load_streams({"train": str(train), "test": str(test), "gold": {"path": str(test), "limit": 1}, "val": None}, tell=told.append)
    assert {k: len(v) for k, v in streams.items()} == {"train": 2, "test": 1, "gold": 1}
    assert "1 of the 1 test rows are also training rows" in told[0]
    with pytest.raises(RecipeError, match=r"data.on_eror is 3.*Did you mean 'on_error'"):
        load_streams({"train": str(train), "on_eror": 3})


def test_a_folder_gives_its_splits(tmp_path):
    write(tmp_path / "train.jsonl", [PAIR] * 2)
    write(tmp_path / "test.jsonl", [{**PAIR, "prompt": "t"}])
    write(tmp_path / "dev.jsonl", [{**PAIR, "prompt": "v"}])
    assert {k: len(v) for k, v in load_streams(tmp_path).items()} == {"train": 2, "test": 1, "val": 1}


def splits(**given):
    empty = {s: [] for s in ("train", "test", "ood", "general", "unlabelled")}
    return types.SimpleNamespace(**{**empty, **given})


def test_a_lab_task_gives_all_its_streams(monkeypatch):
    from luthier import lab

    asked = []

    def make(spec):
        asked.append(spec)
        return splits(train=[PAIR] * 4, test=[PAIR], ood=[PAIR] * 2, general=[PAIR] * 3)

    monkeypatch.setattr(lab, "make", make, raising=False)
    streams = load_streams({"train": "lab:traces?skills=sort", "limit": 3})
    assert {k: len(v) for k, v in streams.items()} == {"train": 3, "test": 1, "ood": 2, "general": 3}
    assert asked == ["lab:traces?skills=sort"]
    assert streams["ood"].source == "lab:traces?skills=sort#ood"
    streams = load_streams({"train": "lab:traces", "ood": "lab:facts#test"})
    assert {k: len(v) for k, v in streams.items()} == {"train": 4, "test": 1, "ood": 1, "general": 3}
    assert len(load_rows("lab:traces", "ood")) == 2
    assert len(load_rows("lab:traces#general", "calibration")) == 3
    with pytest.raises(DataError, match=r"no split 'tset'. Did you mean 'test'"):
        load_rows("lab:traces#tset")
    with pytest.raises(DataError, match=r"no 'unlabelled' rows. It has: train, test, ood, general"):
        load_rows("lab:traces#unlabelled")


def test_the_hub(monkeypatch):
    import datasets

    made = datasets.DatasetDict({k: datasets.Dataset.from_dict({"question": [f"{k}{i}" for i in range(n)], "answer": ["a"] * n}) for k, n in (("train", 3), ("validation", 2))})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or made)
    rows = load_rows("someone/some-set")
    assert (len(rows), rows.kind, rows.source) == (3, "prompt-completion", "hub:someone/some-set#train")
    assert load_rows("hub:someone/set:main#validation")[1]["prompt"] == "validation1"
    assert asked == [(("someone/some-set", None), {}), (("someone/set", "main"), {})]
    assert {k: len(v) for k, v in load_streams({"train": "hub:a/b", "holdout": 0}).items()} == {"train": 3, "val": 2}
    with pytest.raises(DataError, match=r"no split 'tests'.*train, validation"):
        load_rows("hub:a/b#tests")

    def fail(*a, **k):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"could not be loaded.*ConnectionError: no network"):
        load_rows("hub:a/b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"'a/b' is no file or folder here.*pip install luthier\[hub\]"):
        load_rows("a/b")


def test_a_mistyped_path_is_not_taken_for_the_hub(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", [PAIR])
    for spec in ("data/trian", "data/trian.jsonl"):
        with pytest.raises(DataError, match="does not exist"):
            load_rows(spec, base=tmp_path)
