"""Self-Data Distillation for Recovering Quality in Pruned Large Language Models (paper 110)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from luthier.catalog import register
from luthier.errors import DataError, RecipeError
from luthier.synthesize import Synthesizer
from luthier.synthesize._shared import listed

if TYPE_CHECKING:
    from luthier.core.context import Context
    from luthier.core.families import Family

TEMPLATE = (
    "Below are an instruction and a reference answer to it. Write the answer in your own words: keep its content and its final result.\n\n"
    "Instruction:\n{prompt}\n\nReference answer:\n{reference}\n\nYour answer:"
)


def self_data_distillation(
    rows: SequenceOf[Mapping[str, Any]], rewrites: SequenceOf[SequenceOf[str]], right: Callable[[str, Mapping[str, Any]], bool]
) -> tuple[list[dict[str, Any]], list[bool]]:
    """The rows, in order, with the first of their rewrites that is `right` as target, else as they were; and which were rewritten."""
    made, changed = [], []
    for row, candidates in zip(rows, rewrites, strict=True):
        text = next((c for c in candidates if c.strip() and right(c, row)), None)
        made.append(dict(row) if text is None else _with_answer(row, text))
        changed.append(text is not None)
    return made, changed


def _with_answer(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The row with another final answer, in the form in which it has one."""
    if "messages" in row:
        turns = [dict(m) for m in row["messages"]]
        last = max(i for i, m in enumerate(turns) if m["role"] == "assistant")
        turns[last]["content"] = text
        return {**row, "messages": turns[: last + 1]}
    answer = row["completion"]
    return {**row, "completion": text if isinstance(answer, str) else [{"role": "assistant", "content": text}]}


@register("self-data-distillation", paper=110)
@dataclass
class SelfDataDistillation(Synthesizer):
    """Let the original model rewrite the training targets in its own words, keep rewrites whose answer is still right, and tune on these.

    y~ ~ p_teacher(. | rewriting prompt with x and y); the target becomes y~ if the verifier finds the reference's answer in it, else y
    stays, so that prompts, order and number of rows are the same. Targets that the model itself might have written shift its distribution less than
    people's do: it forgets less, which matters most for a pruned model (`compress: depth-prune` in the stage before; the teacher is the
    run's unpruned base). Published with it: LoRA of rank 8, rate 1e-4, one epoch; several such models merged by `merge: slerp`.

    A small model cannot rewrite by instruction: `mode: own` lets it answer by itself, filtered in the same way. `verify: null` checks only that a
    rewrite is there and ended by itself, for open text. The wording of the rewriting prompt is ours. `report` counts rewrites and verbatim copies (many
    copies: the data have not changed), and gives the teacher's loss a token on old and new targets, which must be lower on the new."""

    mode: Literal["rewrite", "own"] = "rewrite"
    """rewrite: the teacher sees the reference; own: it answers the prompt alone."""
    teacher: str = "base"
    """The model that writes: the run's base, or one that `models` names."""
    verify: str | None = "number"
    """Which verifier compares a rewrite with the reference (number, normalised, contains, lab ...); null: none."""
    template: str = TEMPLATE
    """The rewriting prompt; {prompt} and {reference} are filled in."""
    samples: int = 1
    """Rewrites a row; the first that is right counts."""
    temperature: float = 0.0
    """Of the sampling; several samples need one above 0."""
    max_new_tokens: int = 512
    """Longest rewrite; one that is cut is not used."""
    report: dict[str, Any] = field(default_factory=dict, init=False)

    needs = frozenset({"generation"})
    columns = (frozenset({"prompt", "completion"}), frozenset({"messages"}))
    families = frozenset({"causal-lm"})
    toy = {"max_new_tokens": 4, "verify": None}

    def __post_init__(self) -> None:
        from luthier.core.verify import verifier

        if self.mode not in ("rewrite", "own"):
            raise RecipeError(f"mode is '{self.mode}'; it must be 'rewrite' or 'own'.")
        if "{prompt}" not in self.template or "{reference}" not in self.template:
            raise RecipeError("template must contain {prompt} and {reference}, where the row's prompt and its answer stand.")
        if self.samples < 1 or self.max_new_tokens < 1 or self.temperature < 0:
            raise RecipeError(f"samples {self.samples} and max_new_tokens {self.max_new_tokens} must be at least 1, temperature {self.temperature} at least 0.")
        if self.samples > 1 and self.temperature == 0:
            raise RecipeError(f"samples is {self.samples} at temperature 0, so all would be equal; set temperature to 0.7, or samples to 1.")
        self._check = None if self.verify is None else verifier(self.verify)

    def synthesize(self, rows: Any, ctx: Context | None = None) -> Any:
        from luthier.core.rows import answer_of

        if ctx is None:
            raise RecipeError("self-data-distillation lets a model rewrite the targets: give it a context with one.")
        given = listed(rows)
        for i, row in enumerate(given):
            if answer_of(row) is None or not ("messages" in row or {"prompt", "completion"} <= set(row)):
                raise DataError(f"self-data-distillation needs rows with a prompt and its answer; row {i} has {', '.join(sorted(row))}.")
        if not given:
            return given
        name = self.teacher if self.teacher != "base" or ctx.has_model("base") else None
        teacher: Any = ctx.current if name is None else ctx.model(name)
        rewrites = self._written(given, teacher, name, ctx)
        check = self._check
        made, changed = self_data_distillation(given, rewrites, lambda text, row: check is None or bool(check(text, row)))
        self._tell(given, made, changed, teacher, ctx)
        return made

    def _written(self, rows: list[dict[str, Any]], teacher: Any, name: str | None, ctx: Context) -> list[list[str]]:
        """Each row's rewrites that ended by themselves."""
        from luthier.core.families import Decode
        from luthier.core.rows import prompt_ids

        asked = rows if self.mode == "own" else [self._rewriting(r) for r in rows]
        prompts = [prompt_ids(r, teacher.tokenizer) for r in asked]
        answers = ctx.generate(prompts, Decode(max_new_tokens=self.max_new_tokens, temperature=self.temperature), self.samples, name)
        return [[a.text for a in found if a.finished] for found in answers]

    def _rewriting(self, row: Mapping[str, Any]) -> dict[str, Any]:
        from luthier.core.rows import answer_of, prompt_text

        # In one pass, so that braces in a row are text.
        places = {"{prompt}": prompt_text(row), "{reference}": str(answer_of(row))}
        filled = re.sub(r"\{prompt\}|\{reference\}", lambda place: places[place[0]], self.template)
        return {"prompt": filled, **{k: row[k] for k in ("plain", "system") if k in row}}

    def _tell(self, given: list[dict[str, Any]], made: list[dict[str, Any]], changed: list[bool], teacher: Family, ctx: Context) -> None:
        from luthier.core.rows import answer_of

        new = [i for i, c in enumerate(changed) if c]
        copies = sum(str(answer_of(given[i])).strip() == str(answer_of(made[i])).strip() for i in new)
        self.report = {"rows": len(given), "rewritten": len(new), "kept as given": len(given) - len(new), "verbatim copies": copies}
        if new:
            sample = new[:64]
            self.report |= {"teacher nll of given": _nll(teacher, [given[i] for i in sample], ctx), "teacher nll of rewritten": _nll(teacher, [made[i] for i in sample], ctx)}
        else:
            ctx.notice("Not one rewrite kept the reference's answer, so all targets stay as given; see `verify`, or try `mode: own`.")


def _nll(model: Family, rows: list[dict[str, Any]], ctx: Context) -> float | None:
    """Mean negative log-likelihood a supervised token."""
    with model.evaluating():
        logp = [model.score(model.collate(rows[i : i + 16], train_on=ctx.train_on)).logp for i in range(0, len(rows), 16)]
    number = sum(len(p) for p in logp)
    return -sum(float(p.sum()) for p in logp) / number if number else None
