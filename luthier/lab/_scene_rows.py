"""Questions, edits and imperfect annotators of scenes."""

from __future__ import annotations

import copy

import numpy as np

from luthier.lab import _scene_graph as graphs
from luthier.lab._scene_graph import NUMBERS, Graph, named, place, relation
from luthier.lab.splits import pick
from luthier.lab.words import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES

QUESTIONS = ("color", "shape", "count", "position", "size", "texture", "relation")
EDITS = ("color", "shape", "texture", "size", "background", "remove", "add", "move")
NOTICE, FIX, ERROR = 0.35, 0.5, 0.02


def question(rng: np.random.Generator, graph: Graph, kind: str) -> tuple[str, str]:
    """One question about the scene and its answer; the thing asked about is named by what is not asked."""
    things = graph["objects"]
    thing = pick(rng, things)
    if kind == "count":
        return "how many objects are there ?", NUMBERS[len(things)]
    if kind == "color":
        same = [other for other in things if other["shape"] == thing["shape"]]
        ask = f"the {thing['shape']}" if len(same) == 1 else f"the object at the {place(thing)}"
        return f"what color is {ask} ?", thing["color"]
    if kind == "shape":
        same = [other for other in things if other["color"] == thing["color"]]
        ask = f"the {thing['color']} object" if len(same) == 1 else f"the object at the {place(thing)}"
        return f"what shape is {ask} ?", thing["shape"]
    if kind == "relation" and len(things) > 1:
        first, second = (things[int(i)] for i in rng.permutation(len(things))[:2])
        return f"where is {named(first)} to {named(second)} ?", relation(first, second) or "no"
    if kind in ("size", "texture"):
        return f"what {kind} is {named(thing)} ?", thing[kind]
    return f"where is {named(thing)} ?", place(thing)


def edited(rng: np.random.Generator, graph: Graph, kind: str) -> tuple[Graph, str]:
    """The scene after one of eight typed edits, and the sentence that describes the edit."""
    made = copy.deepcopy(graph)
    things = made["objects"]
    thing = things[int(rng.integers(len(things)))]
    before = named(thing)
    if kind == "background":
        made["background"] = pick(rng, [b for b in BACKGROUNDS if b != graph["background"]])
        return made, f"make the background {made['background']}"
    if kind == "remove" and len(things) > 1:
        things.remove(thing)
        return made, f"remove {before}"
    if kind in ("add", "remove"):
        free = [cell for cell in range(9) if all(np.hypot(8 * (cell % 3) + 3.5 - t["x"], 8 * (cell // 3) + 3.5 - t["y"]) > t["radius"] + 3 for t in things)]
        cell = int(pick(rng, free)) if free else 8
        used = {(t["shape"], t["color"]) for t in things}
        shape, color = pick(rng, [pair for pair in graphs.SEEN if pair not in used])
        new = {"shape": shape, "color": color, "texture": "solid", "size": "small", "border": False,
               "x": 8 * (cell % 3) + 3.5, "y": 8 * (cell // 3) + 3.5, "radius": 3.0}  # fmt: skip
        things.append(new)
        return made, f"add {graphs.noun_phrase(new)} at the {place(new)}"
    if kind == "move":
        thing["x"], thing["y"] = 23 - thing["x"], 23 - thing["y"]
        return made, f"move {before} to the {place(thing)}"
    pool = {"color": COLORS, "shape": SHAPES, "texture": TEXTURES, "size": SIZES}[kind]
    used = {(t["shape"], t["color"]) for t in things if t is not thing}
    options = [v for v in pool if v != thing[kind] and ({**thing, kind: v}["shape"], {**thing, kind: v}["color"]) not in used]
    thing[kind] = pick(rng, options)
    if kind == "size":
        small, large = graphs.RADII[min(len(things), 3)]
        thing["radius"] = small if thing["size"] == "small" else large
    return made, f"make {before} {thing[kind]}"


def annotated(rng: np.random.Generator, graph: Graph, draft: Graph | None = None) -> Graph:
    """What an imperfect annotator writes down: notices an object with p .35, each attribute wrong with p .02; with a
    draft, a wrong attribute is corrected with p .5."""
    known = {(t["x"], t["y"]): copy.deepcopy(t) for t in (draft["objects"] if draft else [])}
    for thing in graph["objects"]:
        spot = (thing["x"], thing["y"])
        if spot in known:
            for key in ("color", "shape", "texture", "size"):
                if known[spot][key] != thing[key] and rng.random() < FIX:
                    known[spot][key] = thing[key]
        elif rng.random() < NOTICE:
            known[spot] = copy.deepcopy(thing)
            for key, pool in (("color", COLORS), ("shape", SHAPES), ("texture", TEXTURES), ("size", SIZES)):
                if rng.random() < ERROR:
                    known[spot][key] = pick(rng, [v for v in pool if v != thing[key]])
    return {"background": graph["background"], "objects": list(known.values())}


def garbled(rng: np.random.Generator, text: str) -> str:
    words = text.split()
    return " ".join(words[int(i)] for i in rng.permutation(len(words)))


def false_caption(rng: np.random.Generator, graph: Graph, kind: str) -> str:
    """The caption of a scene in which one attribute of one object is another."""
    return graphs.caption(edited(rng, graph, pick(rng, ("color", "shape", "texture", "size")))[0], kind)


def moving(rng: np.random.Generator, graph: Graph, frames: int) -> tuple[list[Graph], str]:
    """One object moves in a straight line through `frames` pictures; the answer is its direction."""
    direction, (dx, dy) = pick(rng, [("left", (-2, 0)), ("right", (2, 0)), ("top", (0, -2)), ("bottom", (0, 2))])
    start = copy.deepcopy(graph)
    thing, middle = start["objects"][0], (graphs.SIDE - 1) / 2
    thing["x"], thing["y"] = middle - dx * frames / 2, middle - dy * frames / 2
    found = []
    for step in range(frames):
        shot = copy.deepcopy(start)
        shot["objects"][0]["x"] += dx * step
        shot["objects"][0]["y"] += dy * step
        found.append(shot)
    return found, direction
