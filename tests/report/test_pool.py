import json

import numpy as np

from luthier.core.dataset import Aside, Rows
from luthier.report.pool import SHOWN, pool


def rows(n, word="row"):
    return [{"prompt": f"{word} {i} of {'abcdef'[i % 6]} words about {['sea', 'sky', 'sun'][i % 3]}", "completion": f"answer {i}"} for i in range(n)]


def test_what_was_learned_from_is_marked_by_id_or_by_content():
    given = Rows.of(rows(40))
    some = pool(given, given.take([3, 5]))
    assert [i for i, p in enumerate(some["points"]) if p["taken"]] == [3, 5] and some["taken"] == some["learned"] == 2
    made = Rows.of([given[7], {"prompt": "new", "completion": "one"}])  # its ids are 0 and 1
    other = pool(given, made, changed=True)
    assert [i for i, p in enumerate(other["points"]) if p["taken"]] == [7] and other["learned"] == 2 and other["taken"] == 1
    json.dumps(some)


def test_repetitions_near_duplicates_and_contradictions_are_found():
    given = rows(30)
    given += [dict(given[4]), {**given[5], "completion": "something else"}, {"prompt": "left open", "completion": "  "}, {"prompt": "long", "completion": "x" * 5000}]
    made = Rows(given, aside=[Aside("f:9", "not json")])
    found = pool(made, made)
    assert found["repeated"] == 1 and found["near"] >= 1 and found["set_aside"] == 1
    reasons = {s["where"].rpartition(" ")[2]: s["reason"] for s in found["suspects"]}
    assert "row 6 asks the same and answers 'answer 5', this one 'something else'" in reasons["32"]
    assert reasons["33"] == "the answer is empty" and "5000 characters" in reasons["34"] and found["suspicious"] == 3
    clean = Rows.of(rows(30))
    assert pool(clean, clean)["suspicious"] == 0


def test_a_large_pool_is_sampled_with_what_was_learned_from_in_it():
    given = Rows.of(rows(SHOWN * 3))
    found = pool(given, given.take(range(20)))
    assert found["sampled"] and found["shown"] == SHOWN == len(found["points"]) and sum(p["taken"] for p in found["points"]) == 20
    assert found == pool(given, given.take(range(20))), "the same sample every time"


def test_pictures_have_a_map_and_other_things_have_none():
    rng = np.random.default_rng(0)
    pictures = Rows.of([{"image": rng.random((4, 4)).astype(np.float32), "label": i % 2} for i in range(12)])
    assert len(pool(pictures, pictures)["points"]) == 12
    for other in ([{"image": np.zeros((i + 2, 3), np.float32), "label": 0} for i in range(4)], [{"x": 1.0}] * 5, rows(2)):
        made = Rows.of(other)
        assert pool(made, made)["points"] == []


def test_the_score_of_a_selector_is_kept():
    given = Rows.of(rows(5))
    assert [p["why"] for p in pool(given, given, why={0: 0.5, 3: 2.0})["points"]] == [0.5, None, None, 2.0, None]
