"""Greedy answers in batches: prompts of one length share a batch, so there is no padding and the cache stays exact."""

from __future__ import annotations

from collections import defaultdict

import torch

from luthier.lab.tokenizer import tokenizer

EOS = 2


@torch.no_grad()
def greedy(model: torch.nn.Module, prompts: list[str], max_new: int = 24, batch: int = 256, ids: list[list[int]] | None = None) -> list[str]:
    """The model's greedy continuation of every prompt, up to `<eos>`."""
    tok = tokenizer()
    encoded = ids or [tok(prompt)["input_ids"] for prompt in prompts]
    groups: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(encoded):
        groups[len(row)].append(i)
    answers = [""] * len(encoded)
    was_training = model.training
    model.eval()
    for places in groups.values():
        for start in range(0, len(places), batch):
            some = places[start : start + batch]
            rows = _continue(model, torch.tensor([encoded[i] for i in some]), max_new)
            for place, row in zip(some, rows):
                answers[place] = tok.decode(row[: row.index(EOS)] if EOS in row else row)
    model.train(was_training)
    return answers


def _continue(model: torch.nn.Module, tokens: torch.Tensor, max_new: int) -> list[list[int]]:
    done = torch.zeros(len(tokens), dtype=torch.bool)
    made, cache = [], None
    for _ in range(max_new):
        out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, tokens = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        made.append(tokens)
        done |= tokens[:, 0] == EOS
        if done.all():
            break
    return torch.cat(made, 1).tolist()
