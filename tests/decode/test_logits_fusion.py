import numpy as np
import pytest
import torch

from luthier.core.batch import Sequence
from luthier.core.families import Decode
from luthier.decode.logits_fusion import GRID, LogitsFusion, logits_fusion
from luthier.errors import ModelError, RecipeError
from tests.helpers import tiny_llama


def draw(rows=4, v=12, seed=0, n=3):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(rows, v, generator=g) for _ in range(n)]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def brute(large, small, expert):
    """float64, one row, no vectorising."""
    p, q0, q1 = (softmax(x) for x in (large, small, expert))
    kl = lambda a, b: float((a * np.log(a / b)).sum())  # noqa: E731
    best = min(GRID, key=lambda a: (kl(f := softmax(large + a * (expert - small)), p) - kl(q1, q0)) ** 2 + (kl(p, f) - kl(q0, q1)) ** 2)
    return best


def test_the_search_finds_what_brute_force_finds():
    large, small, expert = draw(rows=20)
    _, alpha = logits_fusion(large, small, [expert])
    wanted = [brute(*(x[i].double().numpy() for x in (large, small, expert))) for i in range(20)]
    assert np.allclose(alpha[:, 0].numpy(), wanted, atol=1e-6)


def test_equal_bases_give_the_expert_itself():
    large, _, expert = draw()
    fused, alpha = logits_fusion(large, large, [expert])
    assert torch.allclose(alpha, torch.ones_like(alpha))
    assert torch.allclose(fused.softmax(-1), expert.softmax(-1), atol=1e-6)


def test_an_expert_that_learned_nothing_changes_nothing():
    large, small, _ = draw()
    fused, alpha = logits_fusion(large, small, [small])
    assert torch.equal(fused, large) and torch.allclose(alpha, torch.ones_like(alpha))


def test_constants_do_not_matter_and_masks_stay():
    large, small, expert = draw()
    _, a = logits_fusion(large, small, [expert])
    _, b = logits_fusion(large + 3, small - 5, [expert + 1])
    assert torch.equal(a, b)
    for x in (large, small, expert):
        x[:, 0] = -torch.inf
    fused, alpha = logits_fusion(large, small, [expert])
    assert (fused[:, 0] == -torch.inf).all() and torch.isfinite(fused[:, 1:]).all() and torch.isfinite(alpha).all()


def test_a_fixed_one_is_proxy_tuning():
    large, small, expert = draw()
    fused, _ = logits_fusion(large, small, [expert], alpha=1.0)
    assert torch.allclose(fused, large + expert - small)


def test_several_experts_one_at_a_time_or_all_combinations():
    large, small, one, two = draw(n=4)
    _, alpha = logits_fusion(large, small, [one, two])
    assert ((alpha > 0).sum(1) <= 1).all()
    _, full = logits_fusion(large, small, [one, two], grid=(0, 0.5, 1), rule="grid")
    assert set(full.flatten().tolist()) <= {0.0, 0.5, 1.0}
    _, same = logits_fusion(large, small, [one], rule="descent")
    assert torch.equal(same, logits_fusion(large, small, [one])[1])


def test_the_full_grid_of_two_experts_is_the_least_of_all():
    large, small, one, two = (x.double().numpy() for x in draw(rows=5, n=4))
    grid = (0.0, 0.4, 0.8, 1.2)
    _, found = logits_fusion(*map(torch.tensor, (large, small)), [torch.tensor(one), torch.tensor(two)], grid=grid, rule="grid")
    kl = lambda a, b: float((a * np.log(a / b)).sum())  # noqa: E731
    for i in range(5):
        p, q0, q1, q2 = (softmax(x[i]) for x in (large, small, one, two))

        def miss(a, i=i, p=p, q0=q0, q=(q1, q2)):
            f = softmax(large[i] + a[0] * (one - small)[i] + a[1] * (two - small)[i])
            return sum((kl(f, p) - kl(t, q0)) ** 2 + (kl(p, f) - kl(q0, t)) ** 2 for t in q)

        best = min(miss((a, b)) for a in grid for b in grid)
        assert miss(found[i].tolist()) == pytest.approx(best, rel=1e-4)


def test_tiny_shifts_are_still_told_apart():
    # the large model is twice as sharp a copy: the weight that moves it as far as the small one moved is not 1
    g = torch.Generator().manual_seed(0)
    small = torch.randn(1, 50, generator=g, dtype=torch.float64)
    expert = small + 1e-3 * torch.randn(1, 50, generator=g, dtype=torch.float64)
    large = small[:, torch.randperm(50, generator=g)] * 2
    _, alpha = logits_fusion(large, small, [expert])
    wanted = brute(*(x[0].float().double().numpy() for x in (large, small, expert)))
    assert wanted != 1 and float(alpha) == pytest.approx(wanted)


def test_masks_of_only_some_models():
    large, small, expert = draw()
    small[:, 1] = -torch.inf
    fused, alpha = logits_fusion(large, small, [expert])
    assert torch.equal(fused[:, 1], large[:, 1]) and torch.isfinite(alpha).all()
    kept = [x[:, [0, *range(2, 12)]] for x in (large, small, expert)]
    assert torch.equal(alpha, logits_fusion(kept[0], kept[1], kept[2:])[1])
    large, small, expert = draw()
    expert[:, 2] = -torch.inf
    fused, _ = logits_fusion(large, small, [expert], alpha=1.0)
    assert (fused.softmax(-1)[:, 2] == 0).all() and torch.isfinite(fused).all()
    gone = torch.full_like(large, -torch.inf)
    assert not logits_fusion(large, gone, [gone])[0].isnan().any()


@pytest.fixture
def models():
    return {"model": tiny_llama(seed=0, layers=3), "small": tiny_llama(seed=1), "expert": tiny_llama(seed=2)}


@pytest.mark.parametrize("alpha", ["dynamic", 1.0])
def test_generation_equals_doing_it_without_caches(models, alpha):
    method = LogitsFusion(alpha=alpha)
    prompts = [np.array([20, 21, 22, 23, 24]), np.array([30, 31]), np.array([40])]
    answers = method.wrap(models).generate(prompts, Decode(max_new_tokens=6))
    for prompt, answer in zip(prompts, answers):
        ids = prompt.tolist()
        for token in answer[0].ids.tolist():
            with torch.no_grad():
                raw = [models[n].network(torch.tensor([ids])).logits[:, -1].float() for n in ("model", "small", "expert")]
            fused, _ = logits_fusion(raw[0], raw[1], raw[2:], None if alpha == "dynamic" else alpha)
            assert int(fused.argmax()) == token
            ids.append(token)


def test_scores_are_of_the_fused_distribution(models):
    wrapped = LogitsFusion().wrap(models)
    ids = np.array([20, 21, 22, 23, 24, 25])
    with wrapped.evaluating():
        scores = wrapped.score([Sequence(ids, np.arange(6) >= 3)])
        raw = [models[n].network(torch.tensor(ids)[None]).logits[0, 2:5].float() for n in ("model", "small", "expert")]
        wanted = logits_fusion(raw[0], raw[1], raw[2:])[0].log_softmax(-1)
        assert torch.allclose(scores.logp, wanted.gather(1, torch.tensor(ids[3:])[:, None])[:, 0], atol=1e-4)
        assert torch.allclose(scores.entropy, -(wanted.exp() * wanted).sum(-1), atol=1e-4)


def test_answers_tell_the_weights_and_companions_do_not_drop_out(models):
    torch.manual_seed(0)
    noisy = {k: tiny_llama(seed=i, attention_dropout=0.5) for i, k in enumerate(models)}
    noisy["small"].network.train(), noisy["expert"].network.train()
    prompts = [[20, 21, 22], [30]]
    wrapped = LogitsFusion().wrap(noisy)
    a, b = (wrapped.generate(prompts, Decode(max_new_tokens=5)) for _ in range(2))
    for x, y in zip(a, b):
        assert x[0].ids.tolist() == y[0].ids.tolist() and x[0].info["alpha"].shape == (len(x[0].ids), 1)
        assert set(np.round(x[0].info["alpha"] * 10).astype(int).ravel()) <= set(range(21))
    assert noisy["small"].network.training
    several = wrapped.generate(prompts, Decode(max_new_tokens=3, temperature=1.0), n=3)
    assert [len(group) for group in several] == [3, 3] and all("alpha" in x.info for group in several for x in group)


def test_experts_may_be_given_as_a_list(models):
    wrapped = LogitsFusion(alpha=0.5).wrap({"model": models["model"], "small": models["small"], "experts": [models["expert"], models["small"]]})
    assert len(wrapped.companions) == 3
    one = LogitsFusion(alpha=0.5).wrap(models)
    prompts = [[20, 21]]
    assert wrapped.generate(prompts, Decode(max_new_tokens=4))[0][0].ids.tolist() == one.generate(prompts, Decode(max_new_tokens=4))[0][0].ids.tolist()


def test_an_adapted_expert_is_read_with_its_adapter_and_a_prompt_tuned_one_is_refused(models):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    expert = models["expert"]
    expert.network = get_peft_model(expert.network, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match="prompt-tuned"):
        LogitsFusion().wrap(models)
    lora = tiny_llama(seed=1)
    lora.network = get_peft_model(lora.network, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora.eval()
    got = LogitsFusion(alpha=1.0).wrap({**models, "expert": lora}).generate([[20, 21]], Decode(max_new_tokens=1))[0][0].ids[0]
    with torch.no_grad():
        raw = [f.network(input_ids=torch.tensor([[20, 21]])).logits[0, -1] for f in (models["model"], lora, models["small"])]
    assert int(got) == int((raw[0] + raw[1] - raw[2]).argmax())


def test_bad_input(models):
    with pytest.raises(RecipeError, match="'dynamic' or a number"):
        LogitsFusion(alpha="dynamik")
    with pytest.raises(ModelError, match="needs a model 'small'"):
        LogitsFusion().wrap(models["model"])
    with pytest.raises(ModelError, match="one vocabulary"):
        LogitsFusion().wrap({**models, "expert": tiny_llama(vocab=50)})
    with pytest.raises(RecipeError, match="at least one expert"):
        LogitsFusion(experts=[])
