"""The rows of the table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench import flops, texts
from bench.case import WORK, Bench, Case, Goal
from bench.flops import Load
from bench.worker import Job

RANK = 16
MERGING = 4 * 4 * 49152 * 576 + 200e6
"""Bytes of four of the largest tensors of SmolLM2-135M in fp32, and 200 MB."""
ELEMENTWISE = "norms, rotary positions, activations and LoRA's additions, which move memory and multiply nothing"
TRL = "TRL 1.16 SFTTrainer"
TRL_SAVES = (
    "Its best on a CPU: rows padded within a micro-batch and sorted by length in every step, sdpa attention, completion-only loss. Packing and padding-free need a "
    "flash kernel to gain anything, and there is none here. TRL 1.16 by itself never holds [tokens x vocabulary] logits (its head runs in tiles), but off CUDA it runs the head over all places, "
    "also those of the prompt, and once more in the backward pass, and it computes entropy and accuracy for its log."
)


def training(bench: Bench, objective: str, rows: texts.Rows, batch: int, **more: Any) -> Job:
    """What both sides of a training row read: one warm-up step, the rest timed."""
    steps = len(rows) // batch
    return {"model": str(bench.model), "objective": objective, "rows": rows, "batch": batch, "warmup": 1, "steps": steps - 1, "rank": RANK, "lr": 1e-4,
            "tokens_per_micro_batch": 512, "sequences": batch, **more}  # fmt: skip


def sft(bench: Bench, system: int = 0) -> Job:
    """Four rows of about 128 tokens a micro-batch on both sides, 70 % of them prompt."""
    writer = texts.Writer(bench.words)
    rows = texts.completions(writer, 8 if bench.quick else 12, 90 - system, 38, system)
    return training(bench, "sft", texts.by_length(rows, 4), 4, micro_batch=4, tokens_per_micro_batch=1024)


def dpo(bench: Bench) -> Job:
    return training(bench, "dpo", texts.preferences(texts.Writer(bench.words), 4 if bench.quick else 6, 200, 50), 2, micro_batch=1)


def grpo(bench: Bench, group: int = 8) -> Job:
    rows = texts.rollouts(texts.Writer(bench.words), 2 if bench.quick else 3, 200, 50, group)
    return training(bench, "grpo", rows, 1, group=group, answer=50, sequences=group, micro_batch=group, tokens_per_micro_batch=1024)


def options(bench: Bench) -> Job:
    """Prompts of about 150 tokens with four candidates of about eight."""
    return {"model": str(bench.model), "rows": texts.questions(texts.Writer(bench.words), 4 if bench.quick else 8, 150, 8, 4), "batch": 8, "micro_batch": 8, "warmup": 1, "steps": 1 if bench.quick else 2}


def contrastive(bench: Bench, batch: int = 256) -> Job:
    batch = batch // 8 if bench.quick else batch
    rows = texts.pairs(texts.Writer(bench.words), 2 * batch, 12, 24)
    return {"model": str(bench.encoder), "objective": "info-nce", "rows": rows, "batch": batch, "chunk": 32, "chunk_tokens": 1024, "warmup": 1, "steps": 1, "rank": 0,
            "lr": 2e-5, "tokens_per_micro_batch": 512}  # fmt: skip


def mig(bench: Bench, number: int, budget: int) -> Job:
    number, budget = (number // 20, budget // 20) if bench.quick else (number, budget)
    return {"number": number, "tags": 1000, "budget": budget, "compared": 50, "warmup": 0, "steps": 1}


def merging(bench: Bench, method: str) -> Job:
    from bench.checkpoints import make

    base, tuned = make(bench.model, WORK / "checkpoints" / bench.model.name, 5)
    return {"method": method, "base": base, "tuned": tuned, "density": 0.2, "folder": str(WORK), "warmup": 0, "steps": 1}


# what must be done --------------------------------------------------------------------------------------------------------
def ids(bench: Bench, text: str) -> list[int]:
    return bench.tokenizer(text)["input_ids"]


def parts(bench: Bench, row: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
    """A row's prompt and its answers as tokens; those that are learned end with an end token."""
    ends = [bench.tokenizer.eos_token_id]
    if "options" in row or "answers" in row:
        return ids(bench, row["prompt"]), [ids(bench, text) for text in row.get("options") or row["answers"]]
    return ids(bench, row["prompt"]), [ids(bench, row[key]) + ends for key in ("completion", "chosen", "rejected") if key in row]


def load_of(bench: Bench, rows: Iterable[dict[str, Any]]) -> Load:
    """Everything that some rows make a network read, what they share once."""
    known = [(prompt, answer) for prompt, answers in (parts(bench, row) for row in rows) for answer in answers]
    return flops.causal([prompt + answer for prompt, answer in known], [len(prompt) for prompt, _ in known])


def training_flops(bench: Bench, job: Job) -> float:
    """The mean of the timed steps; a reference costs one pass without the adapter."""
    batch, found = job["batch"], []
    for at in range(job["warmup"] * batch, len(job["rows"]), batch):
        load = load_of(bench, job["rows"][at : at + batch])
        reference = flops.forward(bench.shape, load) if job["objective"] == "dpo" else 0.0
        found.append(flops.adapter_step(bench.shape, load, job["rank"]) + reference)
    return sum(found) / len(found)


def options_flops(bench: Bench, job: Job) -> float:
    return flops.forward(bench.shape, load_of(bench, job["rows"]))


def contrastive_flops(bench: Bench, job: Job) -> float:
    """With cached gradients every text passes once without a gradient and once with one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bench.encoder)
    rows = job["rows"][job["warmup"] * job["batch"] :]
    load = flops.bidirectional(len(tokenizer(row[key])["input_ids"]) for row in rows for key in ("anchor", "positive"))
    shape = bench.encoder_shape
    return (flops.forward(shape, load) + flops.full_step(shape, load)) / job["steps"]


CASES = {
    case.name: case
    for case in (
        Case("sft", "SFT with LoRA, 4 rows of about 128 tokens a step, 70 % of them prompt", "ours_train", sft, Goal(speed=1.5, memory=0.5), f"{ELEMENTWISE}; the padding of unequal rows",
             TRL, "peer_trl", TRL_SAVES, training_flops),
        Case("sft-system", "SFT with LoRA, the same, every prompt beginning with the same 40 tokens", "ours_train", lambda b: sft(b, 40), Goal(speed=1.9), f"{ELEMENTWISE}",
             TRL, "peer_trl", TRL_SAVES, training_flops),
        Case("dpo", "DPO with LoRA, 2 pairs a step, prompt 200 + 2 x 50 tokens, reference scores included", "ours_train", dpo, Goal(speed=2.0), f"{ELEMENTWISE}; what attention by parts copies of shared keys and values",
             "TRL 1.16 DPOTrainer", "peer_trl", "One pair (two rows) a micro-batch on both sides; the reference is the network without its adapter on both sides. TRL's head runs in tiles, never as [tokens x vocabulary], but off CUDA over all places, the prompt's as well, and once more in the backward pass.", training_flops),
        Case("grpo", "GRPO's update with LoRA, 8 given rollouts of 50 tokens on a prompt of 200", "ours_train", grpo, Goal(speed=2.9), f"{ELEMENTWISE}; the mask that a kernel for causal rows computes and throws away",
             "TRL 1.16 GRPOTrainer", "peer_trl", "All eight answers in one micro-batch on both sides, rollouts given, no KL term. TRL's head runs in tiles, never as [tokens x vocabulary], but off CUDA over all places, the prompt's as well, and once more in the backward pass; it also computes entropies for its log.", training_flops),
        Case("options", "Multiple-choice evaluation, 8 questions of about 150 tokens with 4 options of about 8", "ours_options", options, Goal(speed=2.5), f"{ELEMENTWISE}; padding of bins of unequal questions",
             "lm-eval 0.4.13 HFLM", "peer_lm_eval", "Eight (question, option) rows a batch, sorted by length, as it does by itself; it shares a pass only between options that differ in their last token alone.", options_flops, unit="pass"),
        Case("contrastive", "Contrastive tuning of all of MiniLM, batch 256, gradients cached in chunks", "ours_train", contrastive, Goal(speed=1.2), "attention among few tokens, norms and GELU of a small network, a gradient of the whole vocabulary for each chunk, the optimizer's pass over all weights",
             "sentence-transformers 6.2 CachedMultipleNegativesRankingLoss", "peer_sentence_transformers", "Gradients cached, so its memory does not grow with the batch either; mini-batches packed by tokens (1024), its fastest setting; dropout off on both sides so that the losses can be compared.", contrastive_flops),
        Case("mig", "MIG, 5,000 of 100,000 rows with 1,000 tags", "ours_mig", lambda b: mig(b, 100_000, 5_000), Goal(speed=50), "grouping rows by their tags, and the greedy choice itself",
             "dense greedy, as released", "peer_dense_mig", "Timed over its first 50 picks, each of which costs the same; making its matrix is not counted, while all of our set-up is.", None, "counting every tag once", 0.0, "pick"),
        Case("mig-million", "MIG, 50,000 of 1,000,000 rows with 1,000 tags", "ours_mig", lambda b: mig(b, 1_000_000, 50_000), Goal(seconds=600, bytes=12e9), "grouping rows by their tags, and the greedy choice itself",
             floor="counting every tag once", unit="pick"),
        Case("merge", "TIES of 5 fine-tunes of SmolLM2-135M, fp32, from folders to a file", "ours_merge", lambda b: merging(b, "ties"), Goal(speed=1.0, bytes=MERGING), "finding each update's largest entries, and the election of signs",
             "mergekit 0.1.5 ties", "peer_mergekit", "The same density within every tensor, lazy reading, no tokenizer and no model card.", None, "reading the six checkpoints or writing one, whichever takes longer", 1e-4, "merge"),
        Case("merge-linear", "The mean of 5 fine-tunes of SmolLM2-135M, fp32, from folders to a file", "ours_merge", lambda b: merging(b, "linear"), Goal(speed=1.0, bytes=MERGING), "adding up, and writing to a disk that is safe against a crash (fsync)",
             "mergekit 0.1.5 linear", "peer_mergekit", "Lazy reading, no tokenizer and no model card.", None, "reading the five checkpoints or writing one, whichever takes longer", 1e-4, "merge"),
        Case("help", "Start-up: `luthier --help`", "ours_startup", lambda b: {"arguments": ["--help"], "times": 1 if b.quick else 5}, Goal(seconds=0.3), "imports of the command line", floor="a Python that does nothing", unit="start"),
        Case("methods", "Start-up: `luthier methods`", "ours_startup", lambda b: {"arguments": ["methods"], "times": 1 if b.quick else 5}, Goal(seconds=0.3), "imports, and reading the catalogue", floor="a Python that does nothing", unit="start"),
    )
}  # fmt: skip
