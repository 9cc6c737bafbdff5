"""A claim on made-up numbers: quick to run, with every way to go wrong."""

import os
import time

from luthier.claims import Claim

claim = Claim(paper=1, says="Two is more than one.", published="always", metric="score", smallest=0.05, seeds=(0, 1, 2), equal=("rows",))


@claim.arm("method", grid={"lr": (0.1, 0.2, 0.3)})
def two(trial):
    trial.spend(rows=trial.scaled(90))
    if os.environ.get("TOY_NAN"):
        return {"score": float("nan")}
    return {"score": 0.6 + 0.01 * trial.seed % 1 - abs(trial["lr"] - 0.2), "other": 1.0}


@claim.arm("baseline")
def one(trial):
    shared = trial.once("start", lambda: trial.spend(rows=1000) or trial.seed)
    trial.spend(rows=trial.scaled(90) * (2 if os.environ.get("TOY_UNEQUAL") else 1))
    time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
    return {"score": 0.4 + 0.01 * shared % 1}


@claim.arm()
def third(trial):
    trial.spend(rows=trial.scaled(90))
    if os.environ.get("TOY_FAIL") and trial.seed == 1:
        raise RuntimeError("on purpose")
    return {"score": 0.5}
