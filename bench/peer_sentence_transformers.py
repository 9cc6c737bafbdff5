"""sentence-transformers' side of the contrastive row: its cached loss, mini-batches packed by tokens, which is its fastest setting."""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import TrainerCallback

from bench.worker import Clock, Job, Memory, main, without_dropout


class Watch(TrainerCallback):
    """Notes the end of every step."""

    def __init__(self, warmup: int) -> None:
        self.clock = Clock(warmup)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.tick()


class Keeping(SentenceTransformerTrainer):
    """Takes rows in their order and keeps every loss (the trainer's log rounds them)."""

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, *_: Any, **__: Any) -> BatchSampler:
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    def training_step(self, *args: Any, **more: Any) -> Any:
        loss = super().training_step(*args, **more)
        self.kept = [*getattr(self, "kept", []), float(loss)]
        return loss


def train(job: Job) -> Job:
    """Seconds, losses, gradients and memory of some steps."""
    model = SentenceTransformer(job["model"], device="cpu")
    without_dropout(model)
    watch = Watch(job["warmup"])
    with tempfile.TemporaryDirectory() as folder:
        settings = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=job["warmup"] + job["steps"], per_device_train_batch_size=job["batch"], learning_rate=job["lr"],
            lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, use_cpu=True,
            save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=job["chunk"], mini_batch_num_tokens=job["chunk_tokens"])
        trainer = Keeping(model, args=settings, train_dataset=Dataset.from_list(job["rows"]), loss=loss, callbacks=[watch])
        with Memory() as memory:
            trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    return {**watch.clock.result, "check": [float(v) for pair in zip(trainer.kept, norms) for v in pair], "extra_bytes": memory.extra}


if __name__ == "__main__":
    main(train)
