import numpy as np
import pytest
import torch

from luthier.core.context import Context
from luthier.core.families import Decode
from luthier.decode.cascade import (
    Cascade,
    PostHocRule,
    _first_state,
    area,
    best_quantile,
    cascade,
    deferral_curve,
    quantile_features,
)
from luthier.errors import ModelError, RecipeError
from tests.helpers import tiny_llama

LOGPS = [np.log([0.9, 0.5, 0.99]), np.log([0.2]), np.log([0.7] * 10)]


def test_the_three_scores():
    assert np.allclose(cascade(LOGPS, "chow-sum"), [-p.sum() for p in LOGPS])
    assert np.allclose(cascade(LOGPS, "chow-average"), [-p.mean() for p in LOGPS])
    assert np.allclose(cascade(LOGPS, "chow-quantile", 0.0), [-p.min() for p in LOGPS])
    assert np.allclose(cascade(LOGPS, "chow-quantile", 1.0), [-p.max() for p in LOGPS])


def test_one_token_makes_all_scores_alike():
    single = [np.log([p]) for p in (0.1, 0.6, 0.9)]
    scores = [cascade(single, s, q) for s, q in (("chow-sum", 0), ("chow-average", 0), ("chow-quantile", 0.0), ("chow-quantile", 0.7))]
    assert all(np.allclose(s, scores[0]) for s in scores)


def test_features_do_not_depend_on_the_order_of_tokens():
    assert np.allclose(quantile_features([p[::-1] for p in LOGPS]), quantile_features(LOGPS))
    assert quantile_features([np.zeros(0)]).shape == (1, 18)


def test_the_curve_ends_at_both_models_and_chance_is_the_chord():
    rng = np.random.default_rng(0)
    small, large = (rng.random(400) < 0.5).astype(float), (rng.random(400) < 0.8).astype(float)
    curve = deferral_curve(rng.random(400), small, large)
    assert curve[0] == pytest.approx(small.mean()) and curve[-1] == pytest.approx(large.mean())
    chance = np.mean([deferral_curve(np.zeros(400), small, large, seed=s) for s in range(200)], 0)
    assert np.allclose(chance, np.linspace(small.mean(), large.mean(), 21), atol=0.01)
    oracle = deferral_curve(large - small, small, large)
    assert area(oracle) > area(curve) and oracle.max() >= max(small.mean(), large.mean())


@pytest.mark.parametrize("learner", ["mlp", "boosting", "linear"])
@pytest.mark.parametrize("target", ["difference", "better", "wrong"])
def test_a_learnt_rule_beats_chance_where_doubt_is_informative(learner, target):
    rng = np.random.default_rng(1)
    logps = [np.log(rng.uniform(0.05, 1, rng.integers(2, 9))) for _ in range(600)]
    small = np.array([float(p.min() > np.log(0.4)) for p in logps])
    large = np.ones(600)
    x = quantile_features(logps)
    rule = PostHocRule(learner, target).fit(x[:300], small[:300], large[:300])
    learnt = deferral_curve(rule(x[300:]), small[300:], large[300:])
    chord = np.linspace(small[300:].mean(), 1.0, 21)
    assert area(learnt) > area(chord) + 0.05


def test_a_rule_without_anything_to_learn_is_constant():
    rule = PostHocRule().fit(quantile_features(LOGPS), np.ones(3), np.ones(3))
    assert rule(quantile_features(LOGPS)).tolist() == [0.0, 0.0, 0.0]


@pytest.fixture
def models():
    return {"model": tiny_llama(seed=0), "large": tiny_llama(seed=1)}


PROMPTS = [np.array([20 + i, 21, 22][: 1 + i % 3]) for i in range(6)]


def texts(answers):
    return [a[0].text for a in answers]


def test_rates_zero_and_one_are_the_models_themselves(models):
    decode = Decode(max_new_tokens=4)
    small, large = (texts(models[n].generate(PROMPTS, decode)) for n in ("model", "large"))
    assert texts(Cascade(rate=0.0).wrap(models).generate(PROMPTS, decode)) == small
    assert texts(Cascade(rate=1.0).wrap(models).generate(PROMPTS, decode)) == large


def test_half_are_deferred_and_they_are_the_most_doubtful(models):
    answers = Cascade(rate=0.5).wrap(models).generate(PROMPTS, Decode(max_new_tokens=4))
    deferred = [a[0].info["doubt"] for a in answers if a[0].info["deferred"]]
    kept = [a[0].info["doubt"] for a in answers if not a[0].info["deferred"]]
    assert len(deferred) == 3 and min(deferred) >= max(kept)


@pytest.mark.parametrize("embed", ["none", "small", "both"])
def test_a_rule_is_learnt_on_validation_rows(models, embed):
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": "w3"} for i in range(12)]
    wrapped = Cascade(score="post-hoc", learner="linear", embed=embed, max_new_tokens=3).wrap(models).fit(rows)
    answers = wrapped.generate(PROMPTS, Decode(max_new_tokens=3))
    assert all(np.isfinite(a[0].info["doubt"]) for a in answers) and wrapped.threshold is not None


def test_doubt_is_the_models_own_log_probability_of_what_it_said(models):
    wrapped = Cascade(score="chow-sum", rate=0.0).wrap(models)
    answers = wrapped.generate(PROMPTS, Decode(max_new_tokens=5))
    for prompt, (answer,) in zip(PROMPTS, answers):
        with torch.no_grad():
            logp = models["model"].network(torch.tensor(np.concatenate([prompt, answer.ids]))[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(answer.ids) - 1)
        assert answer.info["doubt"] == pytest.approx(-float(logp[at, torch.tensor(answer.ids)].sum()), abs=1e-3)


def test_the_large_models_early_state_is_its_first_blocks_output(models):
    got = _first_state(models["large"], PROMPTS)
    for prompt, state in zip(PROMPTS, got):
        with torch.no_grad():
            wanted = models["large"].decoder(torch.tensor(prompt)[None], output_hidden_states=True).hidden_states[1][0, -1]
        assert np.allclose(state, wanted, atol=1e-5)


def test_the_quantile_can_be_chosen_on_validation_rows(models):
    rng = np.random.default_rng(0)
    logps = [np.log(rng.uniform(0.05, 1, 9)) for _ in range(300)]
    small = np.array([float(np.quantile(p, 0.5) > np.log(0.5)) for p in logps])
    assert best_quantile(logps, small, np.ones(300)) == 0.5
    rows = [{"prompt": f"w{i}", "completion": "w3"} for i in range(6)]
    wrapped = Cascade(quantile=None, max_new_tokens=3).wrap(models).fit(rows)
    assert 0 <= wrapped.quantile <= 1 and wrapped.threshold is not None
    with pytest.raises(RecipeError, match="quantile of 'cascade' is learnt"):
        Cascade(quantile=None).wrap(models, Context())


def test_a_threshold_decides_prompt_by_prompt(models):
    every = Cascade(threshold=-1e9).wrap(models).generate(PROMPTS, Decode(max_new_tokens=3))
    none = Cascade(threshold=1e9).wrap(models).generate(PROMPTS, Decode(max_new_tokens=3))
    assert all(a[0].info["deferred"] for a in every) and not any(a[0].info["deferred"] for a in none)


def test_bad_input(models):
    with pytest.raises(ModelError, match="needs a model 'large'"):
        Cascade().wrap(models["model"])
    with pytest.raises(RecipeError, match="between 0 and 1"):
        Cascade(rate=2)
    with pytest.raises(RecipeError, match="learnt on validation rows"):
        Cascade(score="post-hoc").wrap(models).generate(PROMPTS)
