import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.core.batch import Batch, Sequence
from luthier.core.context import Context
from luthier.core.families import CausalLM
from luthier.errors import ModelError, RecipeError
from luthier.merge.learned_soup import LearnedSoup, _Scorer, batch_loss, learned_soup
from luthier.merge.uniform_soup import uniform_soup


def test_no_step_is_the_uniform_soup_and_equal_models_stay(state):
    tuned = [state(i) for i in (1, 2, 3)]
    mix = learned_soup(tuned, lambda s: s["norm.weight"].sum(), epochs=0)
    mean = uniform_soup(tuned)
    assert all(torch.allclose(mix.weights[n], mean[n]) for n in mean)
    same = learned_soup([state(1)] * 3, lambda s: s["norm.weight"].square().sum(), epochs=3)
    assert all(torch.allclose(same.weights[n], state(1)[n]) for n in mean)


def test_the_first_step_of_adam_moves_every_coefficient_by_the_learning_rate():
    states = [{"a": torch.tensor([1.0]), "b": torch.tensor([0.0])}, {"a": torch.tensor([0.0]), "b": torch.tensor([2.0])}]
    mix = learned_soup(states, lambda s: s["a"].sum() + s["b"].sum(), lr=0.05, epochs=1)
    low, high = 1 / (1 + np.exp(0.1)), 1 / (1 + np.exp(-0.1))
    np.testing.assert_allclose(mix.coefficients["a"], [low, high], rtol=1e-5)
    np.testing.assert_allclose(mix.coefficients["b"], [high, low], rtol=1e-5)
    assert mix.losses == [pytest.approx(1.5)]


@pytest.mark.parametrize("by", ["layer", "block", "global"])
def test_it_finds_the_best_convex_combination(by):
    g = torch.Generator().manual_seed(0)
    names = ["embed", "layers.0.w", "layers.0.v", "layers.1.w"]
    states = [{n: torch.randn(40, generator=g) for n in names} for _ in range(2)]
    share = {"embed": 0.2, "layers.0.w": 0.7, "layers.0.v": 0.7, "layers.1.w": 0.9} if by != "global" else dict.fromkeys(names, 0.35)
    goal = {n: share[n] * states[0][n] + (1 - share[n]) * states[1][n] for n in names}
    mix = learned_soup(states, lambda s: sum((s[n] - goal[n]).square().sum() for n in names), by=by, epochs=300)
    for n in names:
        assert mix.coefficients[n][0] == pytest.approx(share[n], abs=0.01)
        torch.testing.assert_close(mix.weights[n], goal[n], atol=0.05, rtol=0)
    if by == "block":
        assert mix.coefficients["layers.0.w"] == mix.coefficients["layers.0.v"]


def test_temperature_is_learned_and_not_part_of_the_weights():
    x, y = torch.eye(3) * 0.5, torch.arange(3)
    states = [{"w": torch.eye(3), "n": torch.tensor(4)}] * 2

    def loss(s, beta):
        return torch.nn.functional.cross_entropy(x @ s["w"] * beta, y)

    mix = learned_soup(states, loss, epochs=20, temperature=True)
    assert mix.temperature == pytest.approx(2.0, abs=0.05) and torch.allclose(mix.weights["w"], torch.eye(3)) and mix.weights["n"] == 4
    assert mix.losses[-1] < mix.losses[0]


def test_several_batches_are_one_step_each(state):
    seen = []
    losses = [lambda s, i=i: (seen.append(i), s["norm.weight"].sum())[1] for i in range(3)]
    mix = learned_soup([state(1), state(2)], losses, epochs=2)
    assert seen == [0, 1, 2, 0, 1, 2] and len(mix.losses) == 6


# with a network ---------------------------------------------------------------------------------------------------------
class Toy(CausalLM):
    def collate(self, rows, ids=None, train_on="completion"):
        sequences = [Sequence(r["ids"], np.arange(len(r["ids"])) > 1, row=i) for i, r in enumerate(rows)]
        return Batch(list(rows), np.arange(len(rows)), sequences)


def network(seed, tied=True):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=tied
    )
    return LlamaForCausalLM(config)


def rows(n=6):
    rng = np.random.default_rng(0)
    return [{"ids": rng.integers(0, 12, 5)} for _ in range(n)]


def test_the_loss_is_the_networks_at_those_weights_and_so_is_its_gradient():
    family = Toy(network(0, tied=False), None)
    other = {k: v.clone().requires_grad_() for k, v in network(1, tied=False).state_dict().items()}
    batch = family.collate(rows())
    with family.evaluating(grad=True):
        before = {k: v.clone() for k, v in family.network.state_dict().items()}
        loss = batch_loss(_Scorer(family), batch)(other, torch.tensor(1.0))
        loss.backward()
    assert all(torch.equal(v, before[k]) for k, v in family.network.state_dict().items())
    oracle = network(1, tied=False)
    total = sum(
        torch.nn.functional.cross_entropy(oracle(torch.from_numpy(r["ids"])[None]).logits[0, 1:-1], torch.from_numpy(r["ids"][2:]), reduction="sum") for r in rows()
    )
    (total / 18).backward()
    torch.testing.assert_close(loss, total / 18)
    for name, p in oracle.named_parameters():
        torch.testing.assert_close(other[name].grad, p.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [True, False])
def test_the_method_lowers_the_validation_loss_of_a_tied_network(temperature):
    family = Toy(network(0), None)
    base = family.network.state_dict()
    tuned = [{k: v.clone() for k, v in network(i).state_dict().items()} for i in (1, 2)]
    ctx = Context(family, streams={"val": rows()})
    method = LearnedSoup(epochs=4, batch=4, temperature=temperature)
    merged = method.merge(base, tuned, ctx)
    assert method.report["losses"][-1] < method.report["losses"][0] and len(method.report["losses"]) == 8
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert (method.report["temperature"] == 1.0) != temperature
    shares = np.array(list(method.report["coefficients"].values()))
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-5)
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = method.report["coefficients"][name]
    torch.testing.assert_close(merged[name], a * tuned[0][name] + b * tuned[1][name])
    assert len(family.network.state_dict()) == len(base) and next(family.network.parameters()).grad is None


def test_rows_without_supervised_tokens_do_no_harm():
    family = Toy(network(0), None)
    empty = [{"ids": np.array([1, 2])}]
    method = LearnedSoup(epochs=1)
    method.merge(None, [dict(network(i).state_dict()) for i in (1, 2)], Context(family, streams={"val": empty}))
    assert method.report["losses"] == [0.0]


def test_bad_input(state):
    with pytest.raises(RecipeError, match="`lr` of learned-soup is 0"):
        LearnedSoup(lr=0)
    with pytest.raises(RecipeError, match=r"data: \{val: FILE\}"):
        LearnedSoup().merge(None, [state(1)])
    ctx = Context(Toy(network(0), None), streams={"val": rows()})
    with pytest.raises(ModelError, match="not in the checkpoints"):
        LearnedSoup().merge(None, [state(1), state(2)], ctx)
    with pytest.raises(RecipeError, match="no 'val' rows"):
        LearnedSoup().merge(None, [dict(network(1).state_dict())], Context(Toy(network(0), None)))
