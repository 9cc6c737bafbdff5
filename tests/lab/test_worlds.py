"""Facts, sounds, grammar, corpus, rewards, scenes and digits against their definitions and independent libraries."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

import luthier.lab as lab
from luthier.lab import _grammar_world as grammar
from luthier.lab import _scene_graph as graphs
from luthier.lab import corpus, rewards
from luthier.lab._grammar_rows import eda
from luthier.lab._scene_render import dense, render
from luthier.lab.sounds import edit_distance, entries
from luthier.lab.words import SHAPES
from luthier.lab.world import people_facts, real_facts, world


def test_the_world_holds_240_real_facts_and_300_people():
    assert len(real_facts()) == 240 and len(people_facts()) == 1500
    assert world()["countries"]["france"] == {"capital": "paris", "continent": "europe", "code": "F R"}
    assert world()["elements"]["iron"] == {"symbol": "Fe", "number": "2 6"}


def test_seen_deals_out_how_often_a_fact_occurs():
    splits = lab.make("facts", entities=8, seen="0,1,4,16")
    counts = {}
    for row in splits.train:
        counts[row["meta"]["subject"]] = counts.get(row["meta"]["subject"], 0) + 1
    assert sorted(counts.values()) == [5, 5, 20, 20, 80, 80]


def test_edits_change_objects_and_locality_rows_do_not_move():
    splits = lab.make("facts", world="real", entities=60, edits=10)
    truth = {(s, r): o for s, r, o in real_facts()}
    edited = [row for row in splits.test if row["meta"]["kind"] == "rephrased"]
    assert len(edited) == 20 and all(truth[row["meta"]["subject"], row["meta"]["relation"]] == row["meta"]["old"] != row["meta"]["answer"] for row in edited)
    kept = [row for row in splits.test if row["meta"]["kind"] == "locality"]
    assert kept and all(truth[row["meta"]["subject"], row["meta"]["relation"]] == row["meta"]["answer"] for row in kept)


def test_contexts_are_of_their_kind():
    rows = lab.make("facts", world="countries", context="relevant,irrelevant,counterfactual,absent", n=200).train
    for row in rows:
        meta, context = row["meta"], row["prompt"].split(" . ")[:-1]
        text = " . ".join(context)
        if meta["context"] == "irrelevant":
            assert meta["memory"] not in text.split(" : ")[-1].split() and meta["subject"] not in text
        elif meta["context"] == "counterfactual":
            assert meta["answer"] == meta["told"] != meta["memory"] and meta["subject"] in text
        elif meta["context"] == "absent":
            assert "context" not in row["prompt"] and meta["answer"] == meta["memory"]
        else:
            assert meta["answer"] == meta["memory"] and meta["subject"] in text


def test_phoneme_distance_and_tenants():
    assert edit_distance(["K", "AE1", "T"], ["K", "AE1", "T", "S"]) == 1 and edit_distance([], ["K"]) == 1
    assert dict(entries())["aachen"] == ("AA1", "K", "AH0", "N")
    answers = [lab.make("sounds", tenant=str(t), n=200).train for t in range(6)]
    assert all(any(row["completion"] != base["completion"] for row, base in zip(rows, answers[0])) for rows in answers[1:])
    assert not any(ch.isdigit() for row in answers[2] for ch in row["completion"])


def test_log_probabilities_of_all_requests_sum_to_their_share():
    total = 0.0
    for plural, adjective, noun in itertools.product((False, True), ("", *grammar.ADJECTIVES), grammar.NOUNS):
        for determiner in grammar.DETERMINERS[plural]:
            sentence = grammar.Sentence("request", None, "check", grammar.Phrase(determiner, noun, plural, adjective))
            total += math.exp(grammar.log_probability(sentence.write()))
    assert total == pytest.approx(grammar.INTENTS["request"], rel=1e-9)


def test_parse_inverts_write_and_languages_are_bijective():
    rng = np.random.default_rng(0)
    sentences = [grammar.draw_sentence(rng) for _ in range(400)]
    for sentence in sentences:
        assert grammar.parse(sentence.write()) == sentence
    for language in (2, 3, 4):
        assert len({s.write(language) for s in sentences}) == len({s.write() for s in sentences})
        assert not set(sentences[0].write(language).split()) & set(sentences[0].write().split()) - {".", "?"}


def test_safe_augmentation_keeps_the_grammar_and_the_topic():
    rng = np.random.default_rng(0)
    for _ in range(100):
        sentence = grammar.draw_sentence(rng)
        again = grammar.parse(eda(sentence.write(), rng, rate=1.0))
        assert again.nouns() == sentence.nouns() and again.negated == sentence.negated


def test_entailment_labels_are_true():
    for row in lab.make("grammar", label="entail", n=100).train:
        first, second = (grammar.parse(row["meta"][key]) for key in ("premise", "hypothesis"))
        kind = "oppose" if first.negated != second.negated else "neutral" if first.object.noun != second.object.noun else "entail"
        assert row["label_text"] == kind


def test_duplicates_repeat_test_rows_and_drift_turns_the_intents_round():
    splits = lab.make("grammar", n=100, duplicates=0.1)
    texts = {row["text"] for row in splits.test}
    assert sum(row["text"].removesuffix(" .") in texts for row in splits.train) == 10
    pool = lab.make("grammar", label="intent", n=10, unlabelled=400, drift=0.5).unlabelled
    late = [row["meta"]["answer"] for row in pool if row["meta"]["drifted"]]
    assert len(late) == 200 and late.count("complain") > 90


def test_ndcg_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        grades = {i: int(g) for i, g in enumerate(rng.integers(0, 4, 30))}
        ranked = rng.permutation(30).tolist()
        scores = np.zeros((1, 30))
        scores[0, ranked] = -np.arange(30)
        gains = np.array([[2 ** grades[i] - 1 for i in range(30)]])
        assert corpus.ndcg(grades, ranked) == pytest.approx(ndcg_score(gains, scores, k=10))


def test_false_negatives_are_relevant_and_otherwise_absent():
    clean, spoiled = lab.make("corpus", n=60), lab.make("corpus", n=60, false_negatives=1.0)
    for row in clean.train:
        assert all(row["meta"]["grades"].get(i, 0) < 3 for i in row["meta"]["candidates"][1:])
    assert sum(not row["meta"]["clean"] for row in spoiled.train) > 30
    assert {row["meta"]["skill"].split()[1] for row in clean.ood} == {corpus.HELD_OUT_STYLE}


def test_rewards_are_the_stated_formulas():
    assert rewards.near_reward([70] * 10, 70) == 1 and rewards.near_reward([70, 60], 70) == pytest.approx((1 + math.exp(-1)) / 2)
    assert rewards.true_effect([0, 0, 8, 30]) == pytest.approx(1 + 1 + 0.5 - 0.3)
    assert rewards.order_reward([1, 3, 5, 6], 2) == pytest.approx(2 / 3)
    splits = lab.make("rewards", kind="far", n=10, test=5)
    assert splits.verify(splits.train[0], " ".join(["70"] * 10)).score == 1 and splits.verify(splits.train[0], "70").score == 0
    for row in lab.make("rewards", kind="order", n=40, pairs=True).train:
        assert row["meta"]["true_of"][row["chosen"]] >= row["meta"]["true_of"][row["rejected"]]


def test_flips_turn_their_share_of_pairs_round():
    clean, flipped = (lab.make("rewards", kind="order", n=200, pairs=True, flips=f).train for f in (0.0, 0.2))
    turned = sum(a["chosen"] == b["rejected"] for a, b in zip(clean, flipped))
    assert turned == round(0.2 * len(clean))


def test_captions_are_read_back_and_translated_back():
    rng = np.random.default_rng(0)
    for i in range(200):
        graph = graphs.draw_scene(rng, 1 + i % 7, relation="inside" if i % 3 == 0 else None)
        for kind in ("short", "full", "paragraph"):
            text = graphs.caption(graph, kind)
            claimed, unread = graphs.read_caption(text)
            assert not unread and claimed <= graphs.facts(graph)
            assert all(graphs.translate_back(graphs.translate(text, language), language) == text for language in (2, 3))


def test_held_out_pairs_are_only_in_ood():
    splits = lab.make("scenes", kind="label", label="combination", n=200, objects="1-3", test=50)
    for part, inside in ((splits.train, False), (splits.test, False), (splits.ood, True)):
        pairs = {(t["shape"], t["color"]) for row in part for t in row["meta"]["graph"]["objects"]}
        assert all((pair in graphs.HELD_OUT) == inside for pair in pairs)
    assert len(graphs.HELD_OUT) == 6 and len(graphs.SEEN) == 42


def test_pictures_show_their_shapes():
    """Nearest clean template tells the shapes apart, and the dense layers agree with the picture."""
    base = {"color": "white", "texture": "solid", "size": "large", "border": False, "x": 11.5, "y": 11.5, "radius": 8.0}
    masks = {shape: render({"background": "black", "objects": [{**base, "shape": shape}]})[..., 0] > 127 for shape in SHAPES}
    for a, b in itertools.combinations(SHAPES, 2):
        assert (masks[a] ^ masks[b]).sum() > 20
    layers = dense({"background": "black", "objects": [{**base, "shape": "square"}]})
    assert ((layers["classes"] > 0) ^ masks["square"]).sum() < 30 and set(np.unique(layers["depth"])) == {0, 1}


def test_digits_are_split_by_index_and_shifts_do_what_they_say():
    splits = lab.make("digits", shift="invert")
    where = [{row["meta"]["index"] for row in part} for part in (splits.train, splits.test, splits.ood)]
    assert [len(w) for w in where] == [1000, 497, 300] and len(set.union(*where)) == 1797
    plain = {row["meta"]["index"]: row["image"] for row in lab.make("digits").ood}
    assert all(np.allclose(row["image"], 1 - plain[row["meta"]["index"]]) for row in splits.ood)


def test_a_cue_agrees_in_train_and_not_in_ood():
    splits = lab.make("digits", cue="color", correlation=0.95)
    agree = [np.mean([row["meta"]["cue"] == row["label"] for row in part]) for part in (splits.train, splits.ood)]
    assert agree[0] > 0.9 and agree[1] < 0.2


def test_a_prior_makes_colours_follow_shapes():
    splits = lab.make("scenes", kind="question", questions="color", prior=0.9, n=200, test=50)
    usual = {shape: ["red", "green", "blue", "yellow", "purple", "orange"][i] for i, shape in enumerate(SHAPES)}
    share = [np.mean([usual[row["meta"]["graph"]["objects"][0]["shape"]] == row["completion"] for row in part]) for part in (splits.train, splits.ood)]
    assert share[0] > 0.8 and share[1] == 0
