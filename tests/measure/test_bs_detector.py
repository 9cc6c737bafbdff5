import numpy as np
import pytest

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.measure.bs_detector import BSDetector, bs_detector, edit_similarity, reflection_of, tertiles
from tests.helpers import tiny_llama


def test_certain_agreement_and_reflection_give_one():
    assert bs_detector("x", ["x"] * 5, [1.0, 1.0]) == pytest.approx(1.0)
    assert bs_detector("x", ["zzz"] * 5, [0.0, 0.0]) == pytest.approx(0.0)


def test_the_formula():
    alike = {("a", "b"): 0.4, ("b", "a"): 0.6, ("a", "a"): 1.0}
    got = bs_detector("a", ["a", "b"], [1.0, 0.5], lambda x, y: alike[x, y], alpha=0.8, beta=0.7)
    observed = ((0.8 * 1 + 0.2 * 1) + (0.8 * 0.5 + 0.2 * 0)) / 2
    assert got == pytest.approx(0.7 * observed + 0.3 * 0.75)


def test_confidence_stays_between_zero_and_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        words = ["".join(rng.choice(list("ab"), 3)) for _ in range(6)]
        assert 0 <= bs_detector(words[0], words[1:], rng.choice([0, 0.5, 1], 2)) <= 1
    assert bs_detector("a", []) == 0.0


def test_replies_are_read():
    assert [reflection_of(t) for t in ("Correct.", "That is incorrect", "I am not sure", "banana", "Yes")] == [1.0, 0.0, 0.5, 0.5, 1.0]
    assert edit_similarity("abc", "abc") == 1.0


def test_tertiles_are_thirds():
    assert tertiles(np.arange(9.0)) == [0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1]


@pytest.mark.parametrize("reflection", ["none", "probability", "ask"])
def test_rows_of_a_model_get_a_confidence_each(reflection):
    ctx = Context(tiny_llama())
    rows = [{"prompt": f"w{i}", "completion": f"w{i + 1}"} for i in range(5)]
    detector = BSDetector(samples=2, max_new_tokens=3, reflection=reflection)
    sure = detector.confidence(rows, ctx)
    assert sure.shape == (5,) and ((sure >= 0) & (sure <= 1)).all()


def test_bad_settings():
    with pytest.raises(RecipeError, match="samples"):
        BSDetector(samples=0)
