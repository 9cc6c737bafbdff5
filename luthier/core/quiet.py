"""Talking to transformers and peft: without bars and reports, without the traces that a GGUF file leaves on a network, refusals as sentences."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from luthier.errors import ModelError


@contextmanager
def quiet() -> Iterator[None]:
    """Errors only; the level and the bars are put back afterwards."""
    import transformers

    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def unquantised(network: Any) -> Any:
    """A network read from a GGUF file holds plain floats; forget that they were packed, else it could not be saved."""
    network.hf_quantizer = None
    if getattr(network.config, "quantization_config", None) is not None:
        del network.config.quantization_config
    network.config.architectures = [type(network).__name__]
    return network


def folded(network: Any, advice: str = "export it as an adapter, or train with another `adapt`") -> Any:
    """A plain network from one that carries a peft adapter: what was learned is in its weights now. It is changed itself."""
    if not hasattr(network, "merge_and_unload"):
        raise ModelError(f"Learned prompts and prefixes are not part of a model's weights, so they cannot be merged into them; {advice}.")
    try:
        return network.merge_and_unload()
    except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
        raise ModelError(f"This adapter cannot be merged into the weights ({first_line(error)}); {advice}.") from error


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
