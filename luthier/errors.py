"""The errors that a user can mend. The command line prints the sentence and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """One clear sentence that says what is wrong and what to do. Never a stack trace for the user."""


class RecipeError(UserError):
    """A recipe that cannot be run, found before anything is loaded."""


class DataError(UserError):
    """A data set or a row that cannot be used."""


class ModelError(UserError):
    """A model or a checkpoint that cannot be loaded or used."""


class TrainingError(UserError):
    """A run that had to stop; what was saved stays."""

    exit_code = 2


class Stopped(TrainingError):
    """A run that was asked to stop, and did so in good order."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest known name, else the empty string."""
    found = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
