import pytest
import torch

from luthier.core.context import Clock, Context, Ramp, seed_of
from luthier.core.rows import Rows
from luthier.core.store import Queue, RowTable
from luthier.errors import RecipeError


def test_ramps_reach_their_ends():
    ramp = Ramp(0.0, 0.4, until=0.5)
    assert ramp.at(0) == 0 and ramp.at(0.25) == pytest.approx(0.2) and ramp.at(0.5) == ramp.at(1) == 0.4
    cosine = Ramp(0.95, 0.05, shape="cosine")
    values = [cosine.at(i / 20) for i in range(21)]
    assert values[0] == pytest.approx(0.95) and values[-1] == pytest.approx(0.05) and values == sorted(values, reverse=True)


def test_named_streams_are_independent_and_come_back():
    a = Context(seed=3)
    first = torch.rand(2, generator=a.rng("x"))
    a.numpy("y").random(5)
    state = a.state_dict()
    wanted = torch.rand(2, generator=a.rng("x")), a.numpy("y").random()
    b = Context(seed=3)
    b.load_state_dict(state)
    assert torch.equal(torch.rand(2, generator=b.rng("x")), wanted[0]) and b.numpy("y").random() == wanted[1]
    assert not torch.equal(first, torch.rand(2, generator=Context(seed=3).rng("z")))
    assert seed_of(1, "a") == seed_of(1, "a") != seed_of(1, "b")


def test_drawing_visits_every_row_once_a_lap():
    ctx = Context(seed=0, streams={"gold": Rows.of([{"text": str(i)} for i in range(5)])})
    laps = [[r["text"] for r in ctx.draw("gold", 5)] for _ in range(2)]
    assert sorted(laps[0]) == sorted(laps[1]) == list("01234") and laps[0] != laps[1]


def test_missing_things_are_named():
    ctx = Context(streams={"validation": Rows.of([{"text": "a"}])})
    with pytest.raises(RecipeError, match="no 'valid' rows.*Did you mean 'validation'"):
        ctx.rows("valid")
    with pytest.raises(RecipeError, match="helper 'judge'"):
        ctx.helper("judge")
    with pytest.raises(RecipeError, match="model 'teacher'"):
        ctx.model("teacher")


def test_a_queue_is_first_in_first_out_and_knows_its_rows():
    queue = Queue(4)
    for start in (0, 3):
        queue.push(range(start, start + 3), keys=torch.arange(start, start + 3.0)[:, None])
    assert queue["keys"].flatten().tolist() == [2, 3, 4, 5] and queue.ids.tolist() == [2, 3, 4, 5]
    assert queue.other_than([3]).tolist() == [[True, False, True, True]]
    again = Queue.from_state(queue.state_dict())
    assert torch.equal(again["keys"], queue["keys"])


def test_a_table_remembers_rows_and_who_wrote_them():
    table = RowTable((2,))
    table.write([4, 2], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), step=7)
    values, known = table.read([2, 9])
    assert values.tolist() == [[3, 4], [0, 0]] and known.tolist() == [True, False]
    assert RowTable.from_state(table.state_dict()).written == {4: 7, 2: 7}


def test_the_clock_counts_shares():
    assert Clock(step=5, steps=20).fraction == 0.25 and Clock(step=30, steps=20).fraction == 1.0
