import pytest

from luthier.errors import DataError, RecipeError
from luthier.synthesize.crop_pairs import CropPairs, crop_pairs

WORDS = [f"w{i}" for i in range(100)]


def span(text):
    return [int(w[1:]) for w in text.split()]


def test_crops_are_contiguous_and_of_the_stated_lengths():
    import numpy as np

    rng, starts = np.random.default_rng(0), set()
    for _ in range(300):
        for view in map(span, crop_pairs(WORDS, rng, delete=0.0)):
            assert 5 <= len(view) <= 50 and view == list(range(view[0], view[0] + len(view)))
            starts.add(view[0])
    assert min(starts) < 5 and max(starts) > 85


def test_deletion_keeps_order_and_a_word_at_least():
    import numpy as np

    rng = np.random.default_rng(0)
    kept = [len(span(crop_pairs(WORDS, rng, 0.5, 0.5, 0.4)[0])) for _ in range(200)]
    assert sum(kept) / 200 == pytest.approx(30, rel=0.05)
    assert all(span(v) == sorted(span(v)) for v in crop_pairs(WORDS, rng, 0.5, 0.5, 0.4))
    assert all(len(v.split()) == 1 for _ in range(50) for v in crop_pairs(["a", "b"], rng, 0.5, 0.5, 0.99))


def test_the_inverse_cloze_task_takes_the_span_out():
    import numpy as np

    anchor, positive = map(span, crop_pairs(WORDS, np.random.default_rng(1), mode="inverse-cloze"))
    assert sorted([*anchor, *positive]) == list(range(100)) and not set(anchor) & set(positive)


def test_rows_become_pairs_with_their_other_columns_and_repeat():
    rows = [{"text": " ".join(WORDS), "source": "s"}, {"text": "one"}]
    method = CropPairs(views=3, chunk=40)
    made = method.synthesize(rows)
    assert method.report == {"pairs": len(made), "too short": 1} and len(made) in (9, 12)
    assert all(r["source"] == "s" and set(r) == {"anchor", "positive", "source"} for r in made)
    assert made == CropPairs(views=3, chunk=40).synthesize(rows)
    for row in made:  # both views are of the same chunk
        assert max(span(row["anchor"]) + span(row["positive"])) - min(span(row["anchor"]) + span(row["positive"])) < 40


def test_bad_input():
    with pytest.raises(RecipeError, match="low"):
        CropPairs(low=0.6)
    with pytest.raises(RecipeError, match="mode"):
        CropPairs(mode="mask")
    with pytest.raises(DataError, match="'text', which row 0 lacks"):
        CropPairs().synthesize([{"prompt": "x"}])
