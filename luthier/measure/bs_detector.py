"""BSDetector: how sure a language model is of a given answer, from its own samples and its reflection (used by paper 24)."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from luthier.catalog import register
from luthier.errors import RecipeError
from luthier.measure import Measure, Measures
from luthier.measure._shared import auroc

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

REFLECTIONS = (
    "Question: {prompt}\nProposed answer: {answer}\nIs the proposed answer correct, incorrect, or are you not sure? Answer: ",
    "Question: {prompt}\nA student answered: {answer}\nWas the student right? Say correct, incorrect or unsure. Answer: ",
)


def bs_detector(
    answer: str,
    samples: SequenceOf[str],
    reflections: SequenceOf[float] = (),
    similarity: Callable[[str, str], float] | None = None,
    alpha: float = 0.8,
    beta: float = 0.7,
) -> float:
    """Confidence in [0, 1] that the *given* answer is right.

    Observed consistency O = mean_i(alpha s_i + (1 - alpha) [answer = sample_i]), s_i the similarity (1 - P(contradiction), averaged over
    both orders); self-reflection S = mean of the reflections (1 correct, 0.5 unsure, 0 incorrect); conf = beta O + (1 - beta) S.
    Without reflections it is O alone."""
    alike = similarity or edit_similarity
    pairs = [((alike(answer, s) + alike(s, answer)) / 2, float(answer.strip() == s.strip())) for s in samples]
    observed = float(np.mean([alpha * s + (1 - alpha) * r for s, r in pairs])) if pairs else 0.0
    return observed if not len(reflections) else beta * observed + (1 - beta) * float(np.mean(reflections))


def edit_similarity(a: str, b: str) -> float:
    """2 M / T of the two texts' matching characters: stands in for an entailment model where answers are short."""
    return SequenceMatcher(None, a.strip(), b.strip(), autojunk=False).ratio()


def reflection_of(reply: str) -> float:
    """1 for correct, 0 for incorrect, 0.5 for unsure or anything else."""
    text = reply.casefold()
    if "incorrect" in text or "wrong" in text or "not correct" in text:
        return 0.0
    if "unsure" in text or "not sure" in text:
        return 0.5
    return 1.0 if "correct" in text or text.strip().startswith(("yes", "right")) else 0.5


@register("bs-detector")
@dataclass
class BSDetector(Measure):
    """How sure the model is of each row's stored answer: agreement with answers it samples itself, and what it says when asked.

    k = 5 answers at temperature 1; similarity by the helper `nli` (a callable giving P(contradiction) of two texts) if the recipe names one, else
    by edit similarity; alpha 0.8, beta 0.7. `reflection: ask` asks twice in two wordings; `probability` takes the answer's mean token
    probability, squashed to 0, 0.5 and 1 by tertiles over the rows, for models that cannot be asked; `none` leaves it out.
    As a measure it reports the mean confidence and, where rows say whether they are `clean`, the AUROC of telling wrong answers."""

    samples: int = 5
    """k, answers sampled a row."""
    temperature: float = 1.0
    """Of the sampling."""
    alpha: float = 0.8
    """Weight of similarity against exact agreement."""
    beta: float = 0.7
    """Weight of observed consistency against reflection."""
    reflection: Literal["ask", "probability", "none"] = "ask"
    """How the model reflects on the answer."""
    max_new_tokens: int = 48
    """Length of a sampled answer."""
    limit: int = 200
    """At most so many rows, as a measure."""

    families = frozenset({"causal-lm"})
    toy = {"max_new_tokens": 4, "samples": 2}

    def __post_init__(self) -> None:
        if self.samples < 1 or self.temperature <= 0 or not 0 <= self.alpha <= 1 or not 0 <= self.beta <= 1:
            raise RecipeError("bs-detector needs samples >= 1, temperature > 0, and alpha and beta between 0 and 1.")

    def confidence(self, rows: SequenceOf[Any], ctx: Context, model: str | None = None) -> np.ndarray:
        """The confidence of every row's stored answer, by the current model or a named one."""
        from luthier.core.families import Decode
        from luthier.core.rows import answer_of, prompt_ids

        family: Any = ctx.current if model is None else ctx.model(model)
        answers = [answer_of(r) or "" for r in rows]
        prompts = [prompt_ids(r, family.tokenizer) for r in rows]
        drawn = ctx.generate(prompts, Decode(max_new_tokens=self.max_new_tokens, temperature=self.temperature), self.samples, model)
        reflected = self._reflect(rows, answers, family, ctx, model)
        similarity = self._similarity(ctx)
        return np.array(
            [
                bs_detector(y, [a.text for a in own], reflected[i] if reflected else (), similarity, self.alpha, self.beta)
                for i, (y, own) in enumerate(zip(answers, drawn))
            ]
        )

    def _similarity(self, ctx: Context) -> Callable[[str, str], float]:
        if not ctx.has_helper("nli"):
            return edit_similarity
        nli = ctx.helper("nli")
        return lambda a, b: 1.0 - float(nli(a, b))

    def _reflect(self, rows: SequenceOf[Any], answers: list[str], family: Any, ctx: Context, model: str | None) -> list[list[float]] | None:
        from luthier.core.families import Decode
        from luthier.core.rows import prompt_ids, prompt_text

        if self.reflection == "none":
            return None
        if self.reflection == "probability":
            return [[v] for v in tertiles(_mean_probability(rows, family, ctx))]
        out: list[list[float]] = [[] for _ in rows]
        for wording in REFLECTIONS:
            asked = [prompt_ids({"prompt": wording.format(prompt=prompt_text(r), answer=y)}, family.tokenizer) for r, y in zip(rows, answers)]
            for i, reply in enumerate(ctx.generate(asked, Decode(max_new_tokens=8), 1, model)):
                out[i].append(reflection_of(reply[0].text))
        return out

    def measure(self, model: Family, rows: Any, ctx: Context | None = None) -> Measures:
        if ctx is None or rows is None or not len(rows):
            return Measures(notes=["There are no rows whose answers could be doubted."])
        part = [rows[i] for i in range(min(self.limit, len(rows)))]
        sure = self.confidence(part, ctx)
        out = Measures({"confidence": float(sure.mean())})
        clean = [r.get("meta", {}).get("clean") if isinstance(r.get("meta"), dict) else None for r in part]
        if all(c is not None for c in clean):
            out.numbers["auroc"] = auroc(sure, np.array(clean, bool))
            out.better["auroc"] = "higher"
        return out


def tertiles(values: np.ndarray) -> list[float]:
    """0 for the lowest third, 0.5 for the middle, 1 for the highest."""
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    return [0.0 if v < low else 1.0 if v > high else 0.5 for v in values]


def _mean_probability(rows: SequenceOf[Any], family: Any, ctx: Context) -> np.ndarray:
    found: list[float] = []
    with family.evaluating():
        for start in range(0, len(rows), 32):
            found += family.score(family.collate(rows[start : start + 32], train_on=ctx.train_on)).rows("mean").exp().tolist()
    return np.array(found)
