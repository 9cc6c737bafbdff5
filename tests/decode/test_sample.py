import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from luthier.core.families import Decode
from luthier.decode.sample import Sample, sample
from luthier.errors import RecipeError
from tests.helpers import tiny_llama


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(0.7, 1.0, 0), (1.3, 0.8, 0), (1.0, 0.9, 5), (0.5, 1.0, 3)])
def test_the_distribution_is_transformers_own(temperature, top_p, top_k):
    logits = torch.randn(6, 20)
    steps = [TemperatureLogitsWarper(temperature), *([TopKLogitsWarper(top_k)] if top_k else []), TopPLogitsWarper(top_p)]
    wanted = LogitsProcessorList(steps)(None, logits.clone()).softmax(-1)
    assert torch.allclose(sample(logits, temperature, top_p, top_k), wanted, atol=1e-6)


def test_draws_are_seeded():
    model = tiny_llama()
    prompts = [[20, 21], [22]]
    a, b, c = (Sample(temperature=2.0, seed=s).wrap(model).generate(prompts, Decode(max_new_tokens=8)) for s in (1, 1, 2))
    texts = [[x[0].text for x in y] for y in (a, b, c)]
    assert texts[0] == texts[1] != texts[2]


def test_bad_temperature():
    with pytest.raises(RecipeError, match="temperature > 0"):
        Sample(temperature=0)
