"""lm-eval's side of the multiple-choice row: its Hugging Face model scores every (question, option) as a row of its own."""

from __future__ import annotations

from lm_eval.models.huggingface import HFLM

from bench.worker import Job, Memory, main, timed


def score(job: Job) -> Job:
    """Seconds and log-probabilities of all questions' options."""
    model = HFLM(pretrained=job["model"], device="cpu", dtype="float32", batch_size=job["micro_batch"])
    tokens = lambda text: model.tok_encode(text, add_special_tokens=False)  # noqa: E731
    requests = [((q["prompt"], option), tokens(q["prompt"]), tokens(option)) for q in job["rows"] for option in q["options"]]
    found: list[float] = []

    def run() -> None:
        found[:] = [value for value, _ in model._loglikelihood_tokens(requests, disable_tqdm=True)]

    with Memory() as memory:
        seconds = timed(run, job["warmup"], job["steps"])
    return {**seconds, "check": found, "extra_bytes": memory.extra}


if __name__ == "__main__":
    main(score)
