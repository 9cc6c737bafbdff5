"""Our side of the multiple-choice row: the candidates of a question share the pass over it."""

from __future__ import annotations

from bench.parts import Parts
from bench.worker import Job, Memory, main, matmul_rate, timed
from luthier.core.models import load


def score(job: Job) -> Job:
    """Seconds and log-probabilities of all questions' options."""
    family = load(job["model"])
    questions = job["rows"]
    found: list[float] = []

    def run() -> None:
        found.clear()
        for at in range(0, len(questions), job["batch"]):
            part = questions[at : at + job["batch"]]
            scores = family.options([q["prompt"] for q in part], [q["options"] for q in part])  # type: ignore[attr-defined]
            found.extend(value for s in scores for value in s.tolist())

    with Memory() as memory:
        seconds = timed(run, job["warmup"], job["steps"], matmul_rate)
    parts, check = Parts(), list(found)
    parts.start()
    run()
    parts.stop()
    return {**seconds, "check": check, "extra_bytes": memory.extra, "flops_per_second": seconds["between"], "parts": parts.found}


if __name__ == "__main__":
    main(score)
