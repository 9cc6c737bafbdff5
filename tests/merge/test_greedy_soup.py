import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.merge.greedy_soup import GreedySoup, greedy_soup
from luthier.merge.uniform_soup import uniform_soup


def points(values):
    return [{"w": torch.tensor([float(v)])} for v in values]


def near(target):
    return lambda source: -abs(float(source["w"]) - target)


def test_models_are_added_best_first_while_the_score_rises():
    soup = greedy_soup(points([0.0, 3.0, 1.5, 9.0]), near(2.0))
    # Best 1.5 (-.5); with 3.0 the mean is 2.25 (-.25), added; with 0.0 it is 1.5 (-.5); with 9.0 it is 4.5.
    assert soup.chosen == [2, 1] and soup.weights["w"].item() == 2.25 and soup.score == -0.25
    assert [(h["model"], h["added"]) for h in soup.history] == [(2, True), (1, True), (0, False), (3, False)]


def test_never_worse_than_the_best_single_model_and_monotone(state):
    rng = np.random.default_rng(0)
    for trial in range(5):
        tuned = [state(10 * trial + i) for i in range(6)]
        direction = torch.from_numpy(rng.normal(size=(7, 4)))

        def score(s, direction=direction):
            return -float((s["embed.weight"].double() - direction).square().sum())

        soup = greedy_soup(tuned, score)
        rising = [h["score"] for h in soup.history if h["added"]]
        assert rising == sorted(rising) and len(set(rising)) == len(rising)
        assert soup.score >= max(map(score, tuned)) and score(soup.weights) == soup.score
        mean = uniform_soup([tuned[i] for i in sorted(soup.chosen)])
        assert all(torch.allclose(soup.weights[n], mean[n]) for n in mean if n != "steps")


def test_a_tie_is_added_only_when_allowed():
    states = points([1.0, 1.0, 1.0])
    assert greedy_soup(states, near(0.0)).chosen == [0]
    assert greedy_soup(states, near(0.0), strict=False).chosen == [0, 1, 2]


def test_known_scores_save_the_single_evaluations():
    calls = []

    def score(source):
        calls.append(float(source["w"]))
        return near(2.0)(source)

    soup = greedy_soup(points([0.0, 3.0, 1.5]), score, scores=[-2.0, -1.0, -0.5])
    assert calls == [2.25, 1.5] and soup.chosen == [2, 1]
    with pytest.raises(RecipeError, match="2 scores were given for 3"):
        greedy_soup(points([0.0, 3.0, 1.5]), score, scores=[-2.0, -1.0])


def test_the_method_scores_by_the_context():
    method = GreedySoup()
    merged = method.merge(points([2.0])[0], points([0.0, 3.0, 1.5]), Context(evaluator=near(2.0)))
    assert merged["w"].item() == 2.25 and method.report["chosen"] == [2, 1]
    assert GreedySoup(include_base=True).merge(points([2.0])[0], points([0.0, 3.0]), Context(evaluator=near(2.0)))["w"].item() == 2.0


@pytest.mark.parametrize("ctx", [None, Context()])
def test_without_validation_rows_it_says_what_to_do(ctx):
    with pytest.raises(RecipeError, match=r"data: \{val: FILE\}"):
        GreedySoup().merge(None, points([1.0, 2.0]), ctx)
