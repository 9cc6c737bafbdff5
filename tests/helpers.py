"""Tiny random models for tests; they live in the library so that users' own tests can use them too."""

from luthier.testing.tiny import *  # noqa: F403
from luthier.testing.tiny import CHAT_TEMPLATE, COMMON, FIRST_WORD, SPECIALS  # noqa: F401
