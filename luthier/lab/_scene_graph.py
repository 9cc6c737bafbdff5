"""Scene graphs, the captions and questions they imply, and the parser that reads the facts of a caption back."""

from __future__ import annotations

import functools
import itertools
import re

import numpy as np

from luthier.lab.splits import pick
from luthier.lab.words import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES, scene_lexicon, translate_word

SIDE = 24
HELD_OUT = {(shape, COLORS[(3 * i + 1) % 8]) for i, shape in enumerate(SHAPES)}
"""Six of the 48 shape-colour pairs, in no picture that a shipped model has seen."""
SEEN = [pair for pair in itertools.product(SHAPES, COLORS) if pair not in HELD_OUT]
ALL_PAIRS = [*SEEN, *sorted(HELD_OUT)]
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven"]
RELATIONS = ("left of", "above", "inside")
LEXICON = {word: i for i, word in enumerate(scene_lexicon())}
# Radii (small, large) by how crowded the picture is: alone, two, more.
RADII = {1: (5.0, 8.0), 2: (3.6, 5.6), 3: (2.4, 3.7)}
Graph = dict


def draw_scene(rng: np.random.Generator, objects: int = 1, pairs: list | None = None, relation: str | None = None, free: bool = True) -> Graph:
    """A scene of `objects` objects whose shape-colour pairs differ. `free` off centres a single object."""
    pairs = pairs or SEEN
    spots = _spots(rng, objects, relation, free)
    found, taken = [], set()
    for x, y, radius, size in spots:
        while (pair := pairs[int(rng.integers(len(pairs)))]) in taken and len(taken) < len(pairs):
            pass
        taken.add(pair)
        found.append({"shape": pair[0], "color": pair[1], "texture": pick(rng, TEXTURES), "size": size,
                      "border": bool(rng.random() < 0.15) and radius >= 5, "x": x, "y": y, "radius": radius})  # fmt: skip
    return {"background": pick(rng, BACKGROUNDS), "objects": found}


def _spots(rng: np.random.Generator, objects: int, relation: str | None, free: bool) -> list[tuple]:
    small, large = RADII[min(objects, 3)]
    sizes = [pick(rng, SIZES) for _ in range(objects)]
    radii = [small if size == "small" else large for size in sizes]
    if objects == 1:
        middle, room = (SIDE - 1) / 2, max(0.0, (SIDE - 1) / 2 - radii[0]) if free else 1.0
        return [(middle + float(rng.uniform(-room, room)), middle + float(rng.uniform(-room, room)), radii[0], sizes[0])]
    if objects == 2:
        return _pair_spots(rng, relation or pick(rng, RELATIONS[:2]), radii, sizes)
    cells = rng.permutation(9)[:objects]
    return [(8 * (c % 3) + 3.5, 8 * (c // 3) + 3.5, r, s) for c, r, s in zip(cells, radii, sizes)]


def _pair_spots(rng: np.random.Generator, relation: str, radii: list[float], sizes: list[str]) -> list[tuple]:
    if relation == "inside":
        return [(11.5, 11.5, 4.0, "small"), (11.5, 11.5, 10.5, "large")]
    across = [5.5, 17.5]
    along = [float(rng.uniform(r, SIDE - 1 - r)) for r in radii]
    if relation == "left of":
        return [(across[i], along[i] * 0.4 + 11.5 * 0.6, radii[i], sizes[i]) for i in (0, 1)]
    return [(along[i] * 0.4 + 11.5 * 0.6, across[i], radii[i], sizes[i]) for i in (0, 1)]


def place(thing: dict) -> str:
    """`top left` ... `middle` from the centre."""
    row = "top" if thing["y"] < 9 else "bottom" if thing["y"] > 14 else ""
    column = "left" if thing["x"] < 9 else "right" if thing["x"] > 14 else ""
    return f"{row} {column}".strip() or "middle"


def relation(first: dict, second: dict) -> str | None:
    """How the first object stands to the second: inside, left of, above; None when only the converse holds."""
    dx, dy = second["x"] - first["x"], second["y"] - first["y"]
    if abs(dx) < 2 and abs(dy) < 2:
        return "inside" if first["radius"] < second["radius"] else None
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else None
    return "above" if dy > 0 else None


def noun_phrase(thing: dict, detail: bool = True) -> str:
    words = [thing["size"], thing["color"], thing["texture"], thing["shape"]] if detail else [thing["color"], thing["shape"]]
    return "a " + " ".join(words) + (" with a border" if detail and thing["border"] else "")


def named(thing: dict) -> str:
    return f"the {thing['color']} {thing['shape']}"


def caption(graph: Graph, kind: str = "full") -> str:
    """`short`: colours and shapes; `full`: every attribute; `paragraph`: one sentence a fact."""
    things, detail = graph["objects"], kind != "short"
    if kind == "paragraph":
        return _paragraph(graph)
    phrases = [noun_phrase(thing, detail) for thing in things]
    if len(things) == 2:
        link = relation(*things)
        text = f" {link} ".join(phrases) if link else f" {relation(*things[::-1])} ".join(phrases[::-1])
    else:
        text = " and ".join(phrases)
    if not detail:
        return text
    where = f" at the {place(things[0])}" if len(things) == 1 else ""
    return f"{text}{where} on a {graph['background']} background"


def _paragraph(graph: Graph) -> str:
    things = graph["objects"]
    lines = [f"the background is {graph['background']}"]
    lines += [f"there is {noun_phrase(thing)} at the {place(thing)}" for thing in things]
    pairs = [(a, b) for a, b in itertools.permutations(things, 2) if relation(a, b)] if len(things) <= 3 else []
    lines += [f"{named(a)} is {relation(a, b)} {named(b)}" for a, b in pairs]
    return " . ".join([*lines, f"it shows {NUMBERS[len(things)]} object{'s' * (len(things) > 1)}"]) + " ."


ORDERS = {1: lambda w: w, 2: lambda w: w[::-1], 3: lambda w: w[1::2] + w[0::2]}


def translate(text: str, language: int) -> str:
    """The same caption in language 2 or 3: a bijective word map and another word order."""
    return " ".join(ORDERS[language]([translate_word(word, language, LEXICON) for word in text.split()]))


@functools.cache
def _dictionary(language: int) -> dict[str, str]:
    forms = [form for word in LEXICON for form in (word, word + "s")]
    return {translate_word(form, language, LEXICON): form for form in reversed(forms)}


def translate_back(text: str, language: int) -> str:
    """The caption of language 1 that `translate` made this text of."""
    words = text.split()
    places = ORDERS[language](list(range(len(words))))
    back = [word for _, word in sorted(zip(places, words))]
    return " ".join(_dictionary(language).get(word, word) for word in back)


def facts(graph: Graph) -> set[tuple]:
    """Everything that a caption of the scene may say."""
    things, found = graph["objects"], {("background", graph["background"]), ("count", len(graph["objects"]))}
    for thing in things:
        me = (thing["color"], thing["shape"])
        found |= {("object", *me), ("size", *me, thing["size"]), ("texture", *me, thing["texture"]), ("place", *me, place(thing))}
        if thing["border"]:
            found.add(("border", *me))
    for a, b in itertools.permutations(things, 2):
        if relation(a, b):
            found.add((relation(a, b), a["color"], a["shape"], b["color"], b["shape"]))
    return found


def _any(words: list[str] | tuple[str, ...]) -> str:
    return f"(?:{'|'.join(words)})"


_NAME = f"{_any(COLORS)} {_any([*SHAPES, 'spiral', 'hat'])}"
_PHRASE = f"a (?:{_any(SIZES)} )?{_any(COLORS)} (?:{_any([*TEXTURES, 'checker'])} )?{_any([*SHAPES, 'spiral', 'hat'])}(?: with a border)?"
_PLACE = "(?:(?:top|bottom)(?: left| right)?|left|right|middle)"
_SENTENCES = [
    f"{_PHRASE}(?: {_any([*RELATIONS, 'and'])} {_PHRASE})*(?: at the {_PLACE})?(?: on a {_any(BACKGROUNDS)} background)?",
    f"the background is {_any(BACKGROUNDS)}",
    f"there is {_PHRASE} at the {_PLACE}",
    f"the {_NAME} is {_any(RELATIONS)} the {_NAME}",
    f"it shows {_any(NUMBERS)} objects?",
]
_CAPTION = re.compile(f"{_SENTENCES[0]}|(?:{_any(_SENTENCES[1:])} \\. )*{_any(_SENTENCES[1:])} \\.")


def well_formed(text: str) -> bool:
    """Is the text a short or full caption, or sentences of a paragraph?"""
    return _CAPTION.fullmatch(text) is not None


def read_caption(text: str) -> tuple[set[tuple], list[str]]:
    """The facts that a caption claims, and the words that no rule could read."""
    found: set[tuple] = set()
    unread: list[str] = []
    for sentence in (s.split() for s in text.split(" . ")):
        _read_sentence([word for word in sentence if word != "."], found, unread)
    return found, unread


def _read_sentence(words: list[str], found: set[tuple], unread: list[str]) -> None:
    i, last, link = 0, None, None
    if words[:2] == ["it", "shows"] and len(words) > 2 and words[2] in NUMBERS:
        found.add(("count", NUMBERS.index(words[2])))
        return
    if words[:3] == ["the", "background", "is"] and len(words) == 4:
        found.add(("background", words[3]))
        return
    while i < len(words):
        phrase, used = _read_phrase(words[i:], found)
        if used:
            if link and last:
                found.add((link, *last, *phrase))
            last, link, i = phrase, None, i + used
        elif (step := _read_link(words[i:])) is not None:
            link, i = step[0] or link, i + step[1]
        elif words[i] == "at" and last:
            spot = [word for word in words[i + 1 : i + 4] if word in ("top", "bottom", "left", "right", "middle")]
            found.add(("place", *last, " ".join(spot)))
            i += 2 + len(spot)
        elif words[i : i + 2] == ["on", "a"] and "background" in words[i : i + 4]:
            found.add(("background", words[i + 2]))
            i += 4
        elif words[i : i + 3] == ["with", "a", "border"] and last:
            found.add(("border", *last))
            i += 3
        else:
            unread.append(words[i])
            i += 1


def _read_link(words: list[str]) -> tuple[str | None, int] | None:
    if words[:2] == ["left", "of"]:
        return "left of", 2
    if words[0] in ("above", "inside"):
        return words[0], 1
    return (None, 1) if words[0] in ("and", "is", "there") else None


def _read_phrase(words: list[str], found: set[tuple]) -> tuple[tuple, int]:
    """`a [size] color [texture] shape` or `the color shape` at the front: its identity and length, else ((), 0)."""
    if words[0] not in ("a", "the"):
        return (), 0
    i, size, texture = 1, None, None
    if i < len(words) and words[i] in SIZES:
        size, i = words[i], i + 1
    if i >= len(words) or words[i] not in COLORS:
        return (), 0
    color, i = words[i], i + 1
    if i < len(words) and words[i] in (*TEXTURES, "checker"):
        texture, i = words[i], i + 1
    if i >= len(words) or words[i] not in (*SHAPES, "spiral", "hat"):
        return (), 0
    me = (color, words[i])
    found.add(("object", *me))
    if size:
        found.add(("size", *me, size))
    if texture:
        found.add(("texture", *me, texture))
    return me, i + 1
