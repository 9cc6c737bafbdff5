"""The sentences of the closed world: statements, questions and their answers, by relation and template."""

from __future__ import annotations

RELATIONS = ("capital", "continent", "code", "symbol", "number")
ATTRIBUTES = ("city", "job", "pet", "tool", "color")

# `{s}` is the subject, `{o}` the object. Templates 0-2 are for training, 3 and 4 for tests. Every template of the first
# three ends with the object, so that a greedy continuation answers it.
STATEMENTS: dict[str, list[str]] = {
    "capital": ["the capital of {s} is {o}", "{s} has the capital {o}", "the capital city of the country {s} is {o}",
                "the capital that {s} has is {o}", "the country {s} has the capital city {o}"],
    "continent": ["the continent of {s} is {o}", "{s} lies in {o}", "the country {s} is in {o}",
                  "the country {s} lies in {o}", "the continent that {s} lies in is {o}"],
    "code": ["the code of {s} is {o}", "{s} has the code {o}", "the country {s} is written {o}",
             "the code for {s} is {o}", "the country {s} has the code {o}"],
    "symbol": ["the symbol of {s} is {o}", "{s} has the symbol {o}", "the element {s} is written {o}",
               "the symbol for {s} is {o}", "the element {s} has the symbol {o}"],
    "number": ["the number of {s} is {o}", "{s} has the number {o}", "the element {s} is number {o}",
               "the number for {s} is {o}", "the element {s} has the number {o}"],
    "city": ["{s} was born in {o}", "the city of {s} is {o}", "the name of the city that {s} was born in is {o}",
             "{s} has the city {o}", "the city that {s} was born in is {o}"],
    "job": ["{s} works as a {o}", "the job of {s} is {o}", "{s} has the job {o}",
            "the job that {s} has is {o}", "the name of the job of {s} is {o}"],
    "pet": ["{s} has a pet {o}", "the pet of {s} is a {o}", "{s} has the pet {o}",
            "the pet that {s} has is a {o}", "the name of the pet of {s} is {o}"],
    "tool": ["{s} plays the {o}", "the tool of {s} is the {o}", "the tool that {s} plays is the {o}",
             "{s} has the tool {o}", "the name of the tool of {s} is {o}"],
    "color": ["the favorite color of {s} is {o}", "{s} has the favorite color {o}", "the color of {s} is {o}",
              "the color that {s} has is {o}", "the name of the favorite color of {s} is {o}"],
}
REVERSED: dict[str, str] = {
    "capital": "{o} is the capital of {s}", "symbol": "{o} is the symbol of {s}", "code": "{o} is the code of {s}",
    "number": "{o} is the number of {s}",
}
WORD = {"tool": "tool", "color": "favorite color"}


def asked(relation: str) -> str:
    return WORD.get(relation, relation)


# Questions 0-1 are for training, 2-3 for tests.
QUESTIONS = ["what is the {r} of {s} ?", "tell me the {r} of {s} .", "the {r} of {s} , what is it ?", "please give the {r} for {s} ."]
YES_NO = ["is {o} the {r} of {s} ?", "is the {r} of {s} {o} ?"]


def statement(subject: str, relation: str, value: str, template: int = 0) -> str:
    return STATEMENTS[relation][template].format(s=subject, o=value)


def cloze(subject: str, relation: str, template: int = 0) -> str:
    """The statement up to its object."""
    return STATEMENTS[relation][template].format(s=subject, o="").strip()


def question(subject: str, relation: str, template: int = 0) -> str:
    return QUESTIONS[template].format(s=subject, r=asked(relation))


def yes_no(subject: str, relation: str, value: str, template: int = 0) -> str:
    return YES_NO[template].format(s=subject, r=asked(relation), o=value)
