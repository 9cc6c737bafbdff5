import pytest
import torch
from torch.distributions import RelaxedBernoulli

from luthier.core.at_weights import at_weights, batches_of, covers, log_likelihoods, merit, pull_back
from luthier.core.mask_learning import concrete_gate, density, largest, learn, rescaled, sigmoid_gate, uniform_like
from luthier.errors import ModelError
from luthier.testing import tiny, toys


def test_the_sigmoid_gate_starts_at_its_mask_and_ends_at_the_opposite():
    start = torch.tensor([True, False, True])
    assert torch.equal(sigmoid_gate(torch.full((3,), -1e4), start), start.float())
    assert torch.equal(sigmoid_gate(torch.full((3,), 1e4), start), (~start).float())
    s = torch.tensor([0.3, -2.0, 5.0])
    expected = start * (1 - 1 / (1 + torch.exp(2 - s))) + ~start / (1 + torch.exp(2 - s))
    torch.testing.assert_close(sigmoid_gate(s, start, bias=2.0), expected)


def test_the_concrete_gate_is_a_relaxed_bernoulli_sample():
    logits = torch.linspace(-3, 3, 7)
    gates = concrete_gate(logits.expand(20000, 7), uniform_like(logits.expand(20000, 7), torch.Generator().manual_seed(0)), 0.5)
    # P(gate > x) = 1 - CDF(x) of torch's own distribution; at one half it is the Bernoulli probability
    theirs = RelaxedBernoulli(torch.tensor(0.5), logits=logits)
    torch.testing.assert_close((gates > 0.5).float().mean(0), torch.sigmoid(logits), atol=0.02, rtol=0)
    torch.manual_seed(0)
    torch.testing.assert_close(gates.mean(0), theirs.sample((20000,)).mean(0), atol=0.02, rtol=0)


def test_rescaling_keeps_the_mean_and_an_empty_mask_empty():
    gate = torch.rand(50)
    assert rescaled(gate).mean() == pytest.approx(1.0)
    assert torch.equal(rescaled(torch.ones(5)), torch.ones(5)) and torch.equal(rescaled(torch.zeros(5)), torch.zeros(5))


def test_the_largest_entries_of_all_tensors():
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 2.0]]), "b": torch.tensor([5.0, 0.0])}
    masks = largest(scores, 3)
    assert masks["a"].tolist() == [[True, False], [True, False]] and masks["b"].tolist() == [True, False]
    assert density(masks) == 0.5


@pytest.mark.parametrize("tied", [False, True])
def test_a_pass_at_other_weights_and_its_gradient_are_the_other_models(tied):
    here, there = tiny.tiny_llama(tie_word_embeddings=tied), tiny.tiny_llama(seed=1, tie_word_embeddings=tied)
    batch = here.collate(toys.rows(frozenset({"prompt", "completion"}), 4))
    expected = -there.score(batch).logp.mean()
    expected.backward()
    before = {n: p.detach().clone() for n, p in here.network.named_parameters()}
    shift = {n: torch.zeros_like(p, requires_grad=True) for n, p in there.network.named_parameters()}
    weights = {n: p.detach() + shift[n] for n, p in there.network.named_parameters()}
    half = [lambda: -here.score(batch).logp.mean() / 2] * 2
    with here.evaluating(grad=True):
        assert pull_back(here.network, weights, half) == pytest.approx(expected.item(), rel=1e-5)
    for name, p in there.network.named_parameters():
        torch.testing.assert_close(shift[name].grad, p.grad, atol=1e-6, rtol=1e-4)
    assert all(torch.equal(p, before[n]) and p.grad is None and p.requires_grad for n, p in here.network.named_parameters())


def test_frozen_networks_stay_frozen_and_errors_restore_them():
    family = tiny.tiny_llama()
    family.network.requires_grad_(False)
    name = "model.norm.weight"
    before = family.network.model.norm.weight.clone()
    with pytest.raises(ZeroDivisionError), at_weights(family.network, {name: before + 1}):
        assert torch.equal(family.network.model.norm.weight, before + 1)
        raise ZeroDivisionError
    assert torch.equal(family.network.model.norm.weight, before) and not any(p.requires_grad for p in family.network.parameters())
    with pytest.raises(ModelError, match=r"\[32\] in the network and \[3\]"), at_weights(family.network, {name: torch.zeros(3)}):
        pass


def test_learning_descends_through_the_weights():
    layer = torch.nn.Linear(3, 1, bias=False)
    x, goal = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([[2.0, 0.0, -1.0]])
    scores = {"weight": torch.zeros(1, 3, requires_grad=True)}
    change = torch.tensor([[2.0, 4.0, -1.0]])
    seen = []
    losses = learn(
        scores, lambda: {"weight": torch.sigmoid(scores["weight"]) * change}, layer, [[lambda: (layer(x) - x @ goal.T).square().mean()]] * 200,
        torch.optim.Adam(scores.values(), lr=0.1), before=lambda i: seen.append(scores["weight"].grad.clone()), after=lambda i: seen.append(i),
    )  # fmt: skip
    assert losses[-1] < losses[0] / 50 and (torch.sigmoid(scores["weight"]) > 0.5).tolist() == [[True, False, True]]
    assert len(seen) == 400 and seen[1] == 0 and layer.weight.requires_grad


def test_likelihood_and_merit_of_both_kinds_of_model():
    lm, classifier = tiny.tiny_llama(), tiny.tiny_vit()
    rows = toys.rows(frozenset({"prompt", "completion"}), 5)
    batches = batches_of(lm, rows, range(5), 2)
    assert [len(b) for b in batches] == [2, 2, 1]
    expected = torch.cat([lm.score(b).logp for b in batches]).mean()
    assert merit(lm, batches) == pytest.approx(expected.item(), rel=1e-5)
    pictures = toys.rows(frozenset({"image", "label"}), 6)
    batch = classifier.collate(pictures)
    with torch.no_grad():
        logits = classifier.classify(batch)
        chosen = log_likelihoods(classifier, batch)
    labels = torch.tensor([r["label"] for r in pictures])
    torch.testing.assert_close(chosen, -torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
    assert merit(classifier, [batch]) == pytest.approx(float((logits.argmax(-1) == labels).float().mean()))



def test_a_checkpoint_that_lacks_parameters_is_refused():
    family = tiny.tiny_llama()
    names = list(family.network.state_dict())
    covers(family.network, names, "graft")
    with pytest.raises(ModelError, match="graft runs .* 1 of its tensors"):
        covers(family.network, names[1:], "graft")
