import numpy as np
import pytest
import torch
from scipy.special import rel_entr

from luthier.core.context import Context
from luthier.errors import RecipeError
from luthier.measure.exit_distance import ExitDistance
from tests.helpers import tiny_llama

ROWS = [{"prompt": f"w{i} w{i + 1}", "completion": f"w{i + 2} w{i + 3} w{i}"} for i in range(5)]


def by_hand(model, depth):
    """Distributions and normed states at the supervised tokens of a network that is cut after `depth` blocks."""
    network = model.network
    states, logits = [], []
    for sequence in model.collate(ROWS).sequences:
        ids = torch.tensor(sequence.ids)[None]
        with torch.no_grad():
            hidden = network.model(ids, output_hidden_states=True).hidden_states[depth]
            hidden = hidden if depth == len(network.model.layers) else network.model.norm(hidden)
            places = np.flatnonzero(sequence.mask) - 1
            states.append(hidden[0, places])
            logits.append(network.lm_head(hidden[0, places]))
    return torch.cat(states).double(), torch.cat(logits).double().softmax(-1).numpy()


def test_the_distances_are_those_of_the_cut_network():
    model = tiny_llama(layers=3)
    found = ExitDistance(exits=[1, 2], batch=2).measure(model, ROWS, Context(model))
    table = {row["depth"]: row for row in found.tables["by depth"]}
    assert list(table) == [1, 2, 3]
    last_state, last = by_hand(model, 3)
    for depth in (1, 2):
        state, p = by_hand(model, depth)
        assert table[depth]["kl"] == pytest.approx(rel_entr(last, p).sum(1).mean(), rel=1e-3)
        assert table[depth]["cosine"] == pytest.approx(float(torch.cosine_similarity(state, last_state, dim=1).mean()), rel=1e-4)
        assert table[depth]["agreement"] == pytest.approx((p.argmax(1) == last.argmax(1)).mean())
    assert table[3]["kl"] == pytest.approx(0, abs=1e-6) and table[3]["cosine"] == pytest.approx(1) and table[3]["agreement"] == 1
    assert found.numbers["kl_to_last"] == pytest.approx((table[1]["kl"] + table[2]["kl"]) / 2)


def test_blocks_that_do_nothing_are_seen_to_be_spare():
    model = tiny_llama(layers=3)
    assert ExitDistance().measure(model, ROWS).numbers["depth_in_agreement"] > 1
    for block in model.network.model.layers[1:]:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    found = ExitDistance().measure(model, ROWS)
    assert found.numbers == {"kl_to_last": pytest.approx(0, abs=1e-6), "depth_in_agreement": 1}


def test_without_rows_nothing_is_said_and_bad_settings_are_refused():
    model = tiny_llama(layers=2)
    assert "No test row" in ExitDistance().measure(model, []).notes[0]
    with pytest.raises(RecipeError, match="agree"):
        ExitDistance(agree=0.0)
    with pytest.raises(RecipeError, match="names depth 7; the network has 2 blocks"):
        ExitDistance(exits=[7]).measure(model, ROWS)
