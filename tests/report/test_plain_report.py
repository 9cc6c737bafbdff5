from pathlib import Path
from types import SimpleNamespace

from luthier.report import compared, plain_report, verdict


def measures(before, after, better="higher", low=None, high=None):
    numbers = {"exact_match": after, **({"exact_match_low": low, "exact_match_high": high} if low is not None else {})}
    return {"before": {"task": {"numbers": {"exact_match": before}, "better": {"exact_match": better}}},
            "after": {"task": {"numbers": numbers, "better": {"exact_match": better}, "notes": ["A note."]},
                      "forgetting": {"numbers": {"general_score": 0.5, "kl_to_base": None}, "better": {"general_score": "higher", "kl_to_base": "lower"}}}}  # fmt: skip


def test_what_was_gained_and_lost_is_said_in_words():
    given = measures(0.03, 0.65, low=0.55, high=0.74)
    given["before"]["forgetting"] = {"numbers": {"general_score": 0.7}, "better": {"general_score": "higher"}}
    said = " ".join(verdict(compared(given)))
    assert "Gained" in said and "3.0 % before, 65.0 % after" in said and "55.0 % to 74.0 %" in said
    assert "Lost: 20.0 %" in said


def test_missing_numbers_are_missing_never_zero():
    changes = compared(measures(None, 0.5))
    assert changes[0]["before"] is None and all(c["name"] != "forgetting/kl_to_base" for c in changes)
    text, facts = plain_report(SimpleNamespace(measures=measures(None, 0.5), folder=Path("r"), model_path=Path("r/model")), [], 1.0)
    assert "        -" in text and facts["changes"][0]["before"] is None and "A note." in text


def test_a_worse_result_is_called_so():
    assert verdict(compared(measures(0.6, 0.4)))[0].startswith("Not gained")


def test_nothing_measured_is_said():
    assert "Nothing was measured" in verdict(compared({}))[0]
