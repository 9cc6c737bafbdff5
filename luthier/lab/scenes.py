"""`lab:scenes`, the picture world: 24 x 24 renders of scene graphs with captions, questions, edits and dense layers."""

from __future__ import annotations

import functools
import json

import numpy as np

from luthier.errors import DataError
from luthier.lab import _scene_graph as graphs
from luthier.lab import _scene_render as pictures
from luthier.lab import _scene_rows as rows
from luthier.lab._scene_graph import Graph, caption, draw_scene
from luthier.lab.splits import Splits, Verdict, as_list, chosen, generator, one_of, pick, share, side
from luthier.lab.words import BACKGROUNDS, COLORS, NEW_SHAPES, NEW_TEXTURE, SHAPES, TEXTURES

KINDS = ("label", "caption", "question", "edit", "dense", "frames", "tiles")
LABELS = {"shape": SHAPES, "color": COLORS, "texture": TEXTURES, "background": BACKGROUNDS, "size": ["small", "large"],
          "count": graphs.NUMBERS, "combination": [f"{c} {s}" for s, c in graphs.ALL_PAIRS]}  # fmt: skip
HAZARD = ("triangle", "red")
"""Two pictures that hold this shape and this colour, one each, are only together a hazard."""


def scenes(seed: int = 0, n: int = 400, *, kind: str = "caption", objects: str = "1", caption: str = "full", label: str = "shape",
           questions: str = "color", edits: str = "color", language: int = 1, pairs: str = "seen", relation: str = "",
           style: str = "filled", views: str = "", frames: int = 6, tiles: int = 4, new: str = "", hazard: float = 0.0, wrong: float = 0.0, garbled: float = 0.0,
           poison: float = 0.0, target: str = "", prior: float = 0.0, duplicates: float = 0.0, annotator: bool = False,
           experts: float = 0.0, shots: int = 0, test: int = 200, unlabelled: int = 0) -> Splits:  # fmt: skip
    """Pictures of 1-7 objects whose scene graph is the truth.

    kind: label (image, label) | caption (image, text) | question | edit (image, edited, text) | dense | frames | tiles.
    objects: '1' or '1-3'. caption: short | full | paragraph. label: shape | color | texture | background | size | count |
    combination. questions: color, shape, count, position, size, texture, relation. edits: color, shape, texture, size,
    background, remove, add, move. language: 1-3. pairs: seen | held | all (ood always uses the held-out pairs). relation:
    left of | above | inside. style: filled | line | dotted | inverted. views: occlusion, rotation, blur, cast. new: spiral, hat
    or checker in every train and test picture. hazard: share of rows with two pictures to refuse. wrong, garbled: shares of
    captions; poison: share of train rows with a corner patch and the caption or label `target`. prior: share of objects whose
    colour follows from the shape (ood breaks it). annotator: captions of an imperfect annotator. experts: error rate of
    noisy dense layers. shots: rows a class.
    """
    knobs = {**locals()}
    for knob, value, known in (("kind", kind, KINDS), ("caption", caption, ("short", "full", "paragraph")), ("label", label, LABELS),
                               ("pairs", pairs, ("seen", "held", "all")), ("style", style, pictures.STYLES), ("language", language, (1, 2, 3)),
                               ("relation", relation, ("", *graphs.RELATIONS))):  # fmt: skip
        one_of("scenes", knob, value, known)
    for knob, value, known in (("questions", questions, rows.QUESTIONS), ("edits", edits, rows.EDITS), ("views", views, pictures.VIEWS)):
        for name in as_list(value):
            one_of("scenes", knob, name, known)
    one_of("scenes", "new", new, ("", *NEW_SHAPES, NEW_TEXTURE))
    share("scenes", hazard=hazard, wrong=wrong, garbled=garbled, poison=poison, prior=prior, duplicates=duplicates, experts=experts)
    make = functools.partial(_part, seed, knobs)
    train, tests, ood, free = make("train", n), make("test", test), make("ood", test), make("unlabelled", unlabelled)
    train = _shots(train, shots) if shots else train
    _spoil(train, seed, knobs)
    for row in free:
        for key in ("text", "label", "completion"):
            row.pop(key, None)
    return Splits(train, tests, ood, [], free, name="scenes", knobs=knobs, verify=verify)


def object_range(objects: str) -> tuple[int, int]:
    low, _, high = str(objects).partition("-")
    if not low.isdigit() or (high and not high.isdigit()) or not 1 <= int(low) <= int(high or low) <= 7:
        raise DataError(f"lab:scenes: objects={objects!r} must be a number or a range within 1-7.")
    return int(low), int(high or low)


def _part(seed: int, knobs: dict, split: str, n: int) -> list[dict]:
    rng = generator(seed, f"scenes {split}")
    tools = {name: generator(seed, f"scenes {name} {split}") for name in ("prior", "views", "experts", "annotator", "hazard")}
    return [_row(rng, tools, seed, knobs, split, i) for i in range(n)]


def _graph(rng: np.random.Generator, seed: int, knobs: dict, split: str) -> tuple[Graph, str]:
    """A scene whose hash belongs to the split."""
    pairs = {"seen": graphs.SEEN, "held": sorted(graphs.HELD_OUT), "all": graphs.ALL_PAIRS}[knobs["pairs"]]
    if split == "ood":
        pairs = sorted(graphs.HELD_OUT)
    low, high = object_range(knobs["objects"])
    wanted = "train" if split == "unlabelled" else split
    while True:
        graph = draw_scene(rng, int(rng.integers(low, high + 1)), pairs, knobs["relation"] or None)
        source = json.dumps(graph)
        if side(source, seed) == wanted:
            return graph, source


def _row(rng: np.random.Generator, tools: dict, seed: int, knobs: dict, split: str, number: int) -> dict:
    graph, source = _graph(rng, seed, knobs, split)
    if knobs["new"]:
        graph["objects"][0]["texture" if knobs["new"] == NEW_TEXTURE else "shape"] = knobs["new"]
    if knobs["prior"]:
        _follow_prior(graph, tools["prior"], 0.0 if split == "ood" else knobs["prior"])
    image = pictures.render(graph, knobs["style"])
    for name in as_list(knobs["views"]):
        image = pictures.view(image, tools["views"], name)
    kind = knobs["kind"]
    meta = {"skill": f"scenes {kind}", "source": source, "clean": True, "graph": graph, "kind": kind}
    row = MAKERS[kind](rng, tools, knobs, graph, image, number)
    row["meta"] = {**meta, **row.get("meta", {})}
    if knobs["hazard"] and tools["hazard"].random() < knobs["hazard"]:
        _make_hazard(row, tools["hazard"], graph)
    return row


def _follow_prior(graph: Graph, rng: np.random.Generator, share_: float) -> None:
    """Every shape has a usual colour; with the given share an object has it, else any other."""
    for thing in graph["objects"]:
        usual = COLORS[SHAPES.index(thing["shape"]) % 8] if thing["shape"] in SHAPES else COLORS[7]
        others = [color for color in COLORS if color != usual]
        thing["color"] = usual if rng.random() < share_ else pick(rng, others)


def _label_row(rng, tools, knobs: dict, graph: Graph, image: np.ndarray, number: int) -> dict:
    first, names = graph["objects"][0], LABELS[knobs["label"]]
    value = {"background": graph["background"], "count": graphs.NUMBERS[len(graph["objects"])],
             "combination": f"{first['color']} {first['shape']}"}.get(knobs["label"], first.get(knobs["label"]))  # fmt: skip
    label = names.index(value) if value in names else len(names)
    return {"image": image, "label": label, "label_text": value, "meta": {"answer": value, "label_kind": knobs["label"]}}


def _caption_row(rng, tools, knobs: dict, graph: Graph, image: np.ndarray, number: int) -> dict:
    told = rows.annotated(tools["annotator"], graph) if knobs["annotator"] else graph
    text = caption(told, knobs["caption"]) if told["objects"] else f"a {graph['background']} background"
    text = graphs.translate(text, knobs["language"]) if knobs["language"] > 1 else text
    meta = {"answer": text, "language": knobs["language"], "clean": not knobs["annotator"] or told == graph}
    return {"image": image, "text": text, "meta": meta}


def _question_row(rng, tools, knobs: dict, graph: Graph, image: np.ndarray, number: int) -> dict:
    kinds = as_list(knobs["questions"])
    kind = kinds[number % len(kinds)]
    prompt, answer = rows.question(rng, graph, kind)
    return {"image": image, "prompt": f"<image> {prompt}", "completion": answer, "meta": {"answer": answer, "question": kind}}


def _edit_row(rng, tools, knobs: dict, graph: Graph, image: np.ndarray, number: int) -> dict:
    kinds = as_list(knobs["edits"])
    after, text = rows.edited(rng, graph, kinds[number % len(kinds)])
    meta = {"answer": text, "edit": kinds[number % len(kinds)], "after": after}
    return {"image": image, "edited": pictures.render(after, knobs["style"]), "text": text, "meta": meta}


def _dense_row(rng, tools, knobs: dict, graph: Graph, image: np.ndarray, number: int) -> dict:
    layers = pictures.dense(graph)
    row = {"image": image, **layers, "meta": {"answer": ""}}
    if knobs["experts"]:
        top = {"classes": 9, "edges": 2, "depth": 8, "orientation": 9}
        for name, layer in layers.items():
            flip = tools["experts"].random(layer.shape) < knobs["experts"]
            row[f"expert_{name}"] = np.where(flip, tools["experts"].integers(0, top[name], layer.shape), layer)
    return row


def _frames_row(rng, tools, knobs: dict, graph: Graph, image: np.ndarray, number: int) -> dict:
    shots, direction = rows.moving(rng, graph, knobs["frames"])
    clip = np.stack([pictures.render(shot, knobs["style"]) for shot in shots])
    thing = graph["objects"][0]
    prompt = f"<image> where to moves {graphs.named(thing)} ?"
    return {"image": clip[0], "frames": clip, "prompt": prompt, "completion": direction, "meta": {"answer": direction}}


def _tiles_row(rng, tools, knobs: dict, graph: Graph, image: np.ndarray, number: int) -> dict:
    """Many small objects of one kind in a layout: rows, columns or scattered."""
    layout, thing = pick(rng, ("row", "column", "grid")), graph["objects"][0]
    count = min(9, max(2, knobs["tiles"]))
    cells = {"row": range(3, 6), "column": range(1, 9, 3), "grid": rng.permutation(9)[:count]}[layout]
    copies = [{**thing, "x": 8 * (c % 3) + 3.5, "y": 8 * (c // 3) + 3.5, "radius": 3.0, "size": "small", "border": False} for c in cells]
    tiled = {"background": graph["background"], "objects": copies}
    text = f"{thing['color']} {thing['shape']}s in a {layout} on a {graph['background']} background"
    text = graphs.translate(text, knobs["language"]) if knobs["language"] > 1 else text
    return {"image": pictures.render(tiled, knobs["style"]), "text": text, "meta": {"answer": text, "layout": layout, "graph": tiled, "language": knobs["language"]}}


MAKERS = {"label": _label_row, "caption": _caption_row, "question": _question_row, "edit": _edit_row, "dense": _dense_row,
          "frames": _frames_row, "tiles": _tiles_row}  # fmt: skip


def _make_hazard(row: dict, rng: np.random.Generator, graph: Graph) -> None:
    """Two pictures; refused when one shows the hazard's shape and the other its colour, else described."""
    unsafe = bool(rng.random() < 0.5)
    seen = [pair for pair in graphs.SEEN if pair[0] != HAZARD[0] and pair[1] != HAZARD[1]]
    firsts = [p for p in graphs.SEEN if p[0] == HAZARD[0] and p[1] != HAZARD[1]] if unsafe else seen
    seconds = [p for p in graphs.SEEN if p[1] == HAZARD[1] and p[0] != HAZARD[0]] if unsafe or rng.random() < 0.5 else seen
    two = [draw_scene(rng, 1, firsts), draw_scene(rng, 1, seconds)]
    answer = "<refuse>" if unsafe else " and ".join(caption(g, "short") for g in two)
    row.update(image=pictures.render(two[0]), image2=pictures.render(two[1]), prompt="<image> <image> what is there ?", completion=answer)
    row.pop("text", None)
    row["meta"].update(answer=answer, kind="hazard", graph=two, unsafe=unsafe)


def _shots(train: list[dict], shots: int) -> list[dict]:
    counts: dict[str, int] = {}
    kept = []
    for row in train:
        key = row.get("label_text", row["meta"]["answer"])
        if counts.get(key, 0) < shots:
            counts[key] = counts.get(key, 0) + 1
            kept.append(row)
    return kept


def _spoil(train: list[dict], seed: int, knobs: dict) -> None:
    """Wrong and garbled captions, poisoned pictures, duplicates."""
    rng = functools.partial(generator, seed)
    for i in chosen(rng("scenes wrong"), len(train), knobs["wrong"]):
        _falsify(train[i], rng(f"scenes wrong {i}"), knobs)
    for i in chosen(rng("scenes garbled"), len(train), knobs["garbled"]):
        if "text" in train[i]:
            train[i]["text"] = rows.garbled(rng(f"scenes garbled {i}"), train[i]["text"])
            train[i]["meta"]["clean"] = False
    for i in chosen(rng("scenes poison"), len(train), knobs["poison"]):
        row = train[i]
        row["image"] = pictures.poison(row["image"])
        row["meta"].update(clean=False, poisoned=True)
        if "text" in row:
            row["text"] = knobs["target"] or "a purple star"
        elif "label" in row:
            row["label"] = LABELS[knobs["label"]].index(one_of("scenes", "target", knobs["target"] or "star", LABELS[knobs["label"]]))
    places = chosen(rng("scenes duplicates"), len(train), knobs["duplicates"])
    kept = sorted(set(range(len(train))) - set(places))
    draw = rng("scenes copies")
    for i in places:
        original = pick(draw, kept)
        train[i] = {**train[original], "meta": {**train[original]["meta"], "duplicate_of": original}}


def _falsify(row: dict, rng: np.random.Generator, knobs: dict) -> None:
    row["meta"]["clean"] = False
    if row["meta"]["kind"] == "caption":
        text = rows.false_caption(rng, row["meta"]["graph"], knobs["caption"])
        row["text"] = graphs.translate(text, knobs["language"]) if knobs["language"] > 1 else text
    elif "label" in row:
        names = LABELS[knobs["label"]]
        row["label"] = pick(rng, [k for k in range(len(names)) if k != row["label"]])
    elif "completion" in row:
        pools = [p for p in (*LABELS.values(), graphs.RELATIONS) if row["completion"] in p] or [["left", "right", "top", "bottom"]]
        row["completion"] = pick(rng, [v for v in pools[0] if v != row["completion"]])


def verify(row: dict, answer: str) -> Verdict:
    """A caption scores the F1 of its facts against the graph; everything else is exact."""
    meta, said = row["meta"], " ".join(str(answer).split())
    if meta["kind"] != "caption":
        right = said == meta["answer"]
        return Verdict(float(right), said, "" if right else f"'{meta['answer']}' was expected")
    said = graphs.translate_back(said, meta["language"]) if meta["language"] > 1 else said
    claimed, unread = graphs.read_caption(said)
    truth = graphs.facts(meta["graph"])
    wanted = graphs.read_caption(caption(meta["graph"], "paragraph" if "." in said else meta_kind(said)))[0]
    true = claimed & truth
    precision = len(true) / (len(claimed) + len(unread)) if claimed or unread else 0.0
    recall = len(true & wanted) / len(wanted)
    score = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    parsed = {"precision": precision, "recall": recall, "claimed": claimed, "unread": unread}
    if score == 1 and not graphs.well_formed(said):
        return Verdict(0.99, parsed, "all facts are right, but the sentence is not well formed")
    return Verdict(min(1.0, score), parsed, "" if score == 1 else f"precision {precision:.2f}, recall {recall:.2f}")


def meta_kind(said: str) -> str:
    """Which kind of caption a text set out to be: a full one names its background."""
    return "full" if "background" in said.split() else "short"
