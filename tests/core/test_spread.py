"""Losses of the whole batch: every process has all rows, each computes the vectors of its share."""

import json
import os
import socket
import subprocess
import sys

import pytest

CODE = """
import json
import torch
from luthier.core import ranks
ranks.start()
torch.manual_seed(0)
table = torch.nn.Parameter(torch.randn(7, 3))
scale = torch.nn.Parameter(torch.ones(()))
seen = []
def vectors(items):
    seen.append(list(items))
    return torch.stack([table[i].tanh() for i in items])
found = {}
for n in (7, 4, 1):
    table.grad = scale.grad = None
    with ranks.spreading(True):
        all_of = ranks.spread(range(n), vectors)
    loss = torch.logsumexp(scale * all_of @ all_of.T, 1).sum() / ranks.size()
    loss.backward()
    ranks.sum_gradients([table, scale])
    found[n] = [all_of.tolist(), table.grad.tolist(), float(scale.grad), seen[-1]]
with ranks.spreading(False):
    ranks.spread(range(5), vectors)
found["off"] = seen[-1]
print(json.dumps(found))
"""


def run(processes, port):
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", CODE], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True) for r in range(processes)]
    return [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in started]


def flat(nested):
    return [x for part in nested for x in flat(part)] if isinstance(nested, list) else [nested]


def test_vectors_and_gradients_are_those_of_one_process():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (alone,), several = run(1, port), run(2, port)
    for number, one in enumerate(several):
        for n in ("7", "4", "1"):
            assert flat(one[n][:3]) == pytest.approx(flat(alone[n][:3]), abs=1e-5)
        assert one["7"][3] == list(range(7))[number::2] and one["1"][3] == [0] and one["off"] == list(range(5))
