"""Pairs of a given answer and the model's own: the data of Self-Play Fine-Tuning (paper 166)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.catalog import register
from luthier.errors import DataError, RecipeError
from luthier.synthesize import Synthesizer
from luthier.synthesize._shared import listed

if TYPE_CHECKING:
    from luthier.core.context import Context


def self_play(rows: list[dict[str, Any]], own: list[str], drop_equal: bool = True) -> list[dict[str, Any]]:
    """Rows `prompt/chosen/rejected`: the given answer against the model's own. Equal pairs teach nothing and are left out."""
    pairs = []
    for row, mine in zip(rows, own):
        gold = row["completion"]
        if mine.strip() and not (drop_equal and mine.strip() == gold.strip()):
            pairs.append({"prompt": row["prompt"], "chosen": gold, "rejected": mine, **({"weight": row["weight"]} if "weight" in row else {})})
    return pairs


@register("self-play", paper=166)
@dataclass
class SelfPlay(Synthesizer):
    """Turn supervised rows into preference pairs: the given answer is chosen, an answer sampled from the round's opponent is rejected.

    In a loop the opponent is the model that the round before left, `ctx.model("round")` (the stage's own start in the first round), sampled at
    temperature 1 as the theory asks: a greedy opponent is degenerate. From the second round on the pairs of the round before are
    kept as well; their reference scores are computed anew, against the current opponent. With the objective `dpo` and the stage's start
    as reference this is one iteration of SPIN (preset `spin`). Answers are cut at `max_new_tokens`; cut ones can be left out, lest
    length alone tell the two apart."""

    temperature: float = 1.0
    """Of the opponent's sampling."""
    max_new_tokens: int = 256
    """Longest own answer."""
    keep_rounds: int = 2
    """Pairs of how many rounds are trained on, the newest included."""
    drop_unfinished: bool = False
    """Leave out own answers that did not end by themselves."""
    drop_equal: bool = True
    """Leave out own answers equal to the given one."""
    report: dict[str, Any] = field(default_factory=dict, init=False)

    needs = frozenset({"generation"})
    columns = (frozenset({"prompt", "completion"}), frozenset({"messages"}))
    families = frozenset({"causal-lm"})
    toy = {"max_new_tokens": 4}

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.max_new_tokens < 1 or self.keep_rounds < 1:
            raise RecipeError("self-play needs temperature >= 0, max_new_tokens >= 1 and keep_rounds >= 1.")

    def synthesize(self, rows: Any, ctx: Context | None = None) -> Any:
        if ctx is None:
            raise RecipeError("self-play samples from a model: give it a context with one.")
        given = _supervised(listed(rows))
        own, finished = self._sample(given, ctx)
        kept = [i for i in range(len(given)) if finished[i] or not self.drop_unfinished]
        fresh = self_play([given[i] for i in kept], [own[i] for i in kept], self.drop_equal)
        rounds = ctx.store.setdefault("self-play/rounds", [])
        rounds = [*rounds, fresh][-self.keep_rounds :]
        ctx.store["self-play/rounds"] = rounds
        self.report = {"given": len(given), "new pairs": len(fresh), "equal or dropped": len(given) - len(fresh), "pairs of earlier rounds": sum(map(len, rounds[:-1]))}
        pairs = [pair for part in rounds for pair in part]
        if not pairs:
            raise DataError("self-play found no pair: the model already answers every row as given. Stop here, or raise the temperature.")
        return pairs

    def _sample(self, rows: list[dict[str, Any]], ctx: Context) -> tuple[list[str], list[bool]]:
        from luthier.core.families import Decode
        from luthier.core.rows import prompt_ids

        name = "round" if ctx.has_model("round") else None
        tokenizer = (ctx.model("round") if name else ctx.current).tokenizer  # type: ignore[union-attr]
        prompts = [prompt_ids(r, tokenizer) for r in rows]
        answers = ctx.generate(prompts, Decode(max_new_tokens=self.max_new_tokens, temperature=self.temperature), 1, name)
        return [a[0].text for a in answers], [a[0].finished for a in answers]


def _supervised(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from luthier.core.rows import answer_of, prompt_text

    made = []
    for i, row in enumerate(rows):
        if answer_of(row) is None or "anchor" in row:
            raise DataError(f"self-play needs rows with a prompt and its right answer; row {i} has {', '.join(sorted(row))}.")
        if "completion" in row and "prompt" in row:
            made.append(row)
        else:
            answer = answer_of(row)
            if answer is None:
                raise DataError(f"self-play needs rows with a given answer, as prompt + completion or messages; these have {', '.join(sorted(row))}.")
            made.append({**row, "prompt": row["messages"][:-1] if "messages" in row else prompt_text(row), "completion": answer})
    return made
