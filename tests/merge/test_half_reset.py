import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from luthier.core.source import TensorSource
from luthier.errors import RecipeError
from luthier.merge.half_reset import HalfReset, half_reset, pieces
from tests.helpers import tiny_llama


def moved(network, by=1.0):
    return {n: t + by if t.is_floating_point() else t for n, t in network.state_dict().items()}


def test_every_matrix_is_wholly_one_or_the_other_and_each_kind_is_halved_in_every_block():
    network = tiny_llama().network
    base = {n: t.clone() for n, t in network.state_dict().items()}
    found = half_reset(base, moved(network), seed=3)
    kept = {n: torch.equal(found[n], base[n] + 1) for n in base}
    assert all(kept[n] or torch.equal(found[n], base[n]) for n in base)
    for block in range(network.config.num_hidden_layers):
        at = [n for n in base if f"layers.{block}." in n]
        assert sum(kept[n] for n in at if "self_attn" in n and n.endswith("weight")) == 2
        assert sum(kept[n] for n in at if "mlp" in n) in (1, 2)
        assert sum(kept[n] for n in at if "norm" in n) == 1
    assert kept["model.embed_tokens.weight"] and kept["model.norm.weight"]


def test_nothing_to_reset_gives_the_base_and_the_ends_are_the_models():
    network = tiny_llama().network
    base, tuned = network.state_dict(), moved(network)
    assert all(torch.equal(t, base[n]) for n, t in half_reset(base, base).items())
    assert all(torch.equal(t, tuned[n]) for n, t in half_reset(base, tuned, keep=1.0).items())
    assert all(torch.equal(t, base[n]) for n, t in half_reset(base, tuned, keep=0.0, embed=True).items())


def test_the_parts_of_a_fused_matrix_are_drawn_apart():
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2))
    base = {n: t.clone() for n, t in network.state_dict().items()}
    name = next(n for n in base if n.endswith("c_attn.weight"))
    seen = set()
    for seed in range(12):
        change = (half_reset(base, moved(network), seed=seed)[name] - base[name]).round()
        thirds = [set(part.unique().tolist()) for part in change.chunk(3, dim=1)]
        assert all(len(t) == 1 for t in thirds)
        seen.add(tuple(t.pop() for t in thirds))
    assert len(seen) > 2
    assert {f"{name.rpartition('.')[0]}[{part}]" for part in ("query", "key", "value")} <= set(pieces(TensorSource.of(base)))


def test_it_is_lazy_and_repeats_from_its_seed(state, counting):
    base, tuned = counting(state(0)), counting(state(1))
    merged = HalfReset(seed=1).merge(base, [tuned])
    assert not base.read and not tuned.read
    again = HalfReset(seed=1).merge(state(0), [state(1)])
    assert all(torch.equal(t, again[n]) for n, t in merged.items())


def test_bad_input(state):
    with pytest.raises(RecipeError, match="keep"):
        HalfReset(keep=1.5)
    with pytest.raises(RecipeError, match="granularity"):
        HalfReset(granularity="block")
    with pytest.raises(RecipeError, match="2 and a base"):
        HalfReset().merge(state(0), [state(1), state(2)])
