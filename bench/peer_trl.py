"""TRL's side of the training rows: its own trainers with the settings that are fastest on this machine."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from bench.worker import Clock, Job, Memory, main, start_adapter, without_dropout


class Watch(TrainerCallback):
    """Notes the end of every step."""

    def __init__(self, warmup: int) -> None:
        self.clock = Clock(warmup)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.tick()


def summing(trainer: type) -> type:
    """The trainer, keeping each micro-batch's share of the loss (its log rounds them)."""

    class Summing(trainer):  # type: ignore[misc]
        shares: list[float]

        def training_step(self, *args: Any, **more: Any) -> Any:
            loss = super().training_step(*args, **more)
            self.shares = [*getattr(self, "shares", []), float(loss)]
            return loss

    return Summing


class GivenAnswers(GRPOTrainer):
    """GRPO's update alone: the answers and their advantages come with the rows."""

    given: dict[str, Any]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        row = self.given[inputs[0]["prompt"]]
        tokenizer: Any = self.processing_class
        answers = [torch.tensor(tokenizer(a)["input_ids"]) for a in row["answers"]]
        prompt = torch.tensor(tokenizer(row["prompt"])["input_ids"]).expand(len(answers), -1)
        ids = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=tokenizer.pad_token_id)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(a) for a in answers], batch_first=True)
        return {"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_ids": ids, "completion_mask": real,
                "advantages": torch.tensor(row["advantages"]), "num_items_in_batch": real.sum()}  # fmt: skip


def settings_of(job: Job, folder: str) -> dict[str, Any]:
    """What all trainers share."""
    return {
        "output_dir": folder, "max_steps": job["warmup"] + job["steps"], "per_device_train_batch_size": job["micro_batch"],
        "gradient_accumulation_steps": job["sequences"] // job["micro_batch"], "learning_rate": job["lr"], "lr_scheduler_type": "constant",
        "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "bf16": False, "fp16": False, "use_cpu": True, "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential", "save_strategy": "no", "report_to": [], "logging_steps": 1, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def trainer_of(job: Job, folder: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    lora = LoraConfig(task_type="CAUSAL_LM", r=job["rank"], lora_alpha=2 * job["rank"], lora_dropout=0.0, target_modules="all-linear")
    common = {"processing_class": tokenizer, "peft_config": lora}
    settings = settings_of(job, folder)
    if job["objective"] == "grpo":
        data = Dataset.from_list([{"prompt": row["prompt"]} for row in job["rows"]])
        given = GRPOConfig(**settings, num_generations=job["group"], max_completion_length=job["answer"], beta=0.0, loss_type="dapo", shuffle_dataset=False)
        trainer: Any = summing(GivenAnswers)(model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=given, train_dataset=data, **common)
        trainer.given = {row["prompt"]: row for row in job["rows"]}
        return trainer
    data = Dataset.from_list(job["rows"])
    if job["objective"] == "dpo":
        return summing(DPOTrainer)(model, args=DPOConfig(**settings, max_length=None, disable_dropout=True), train_dataset=data, **common)
    config = SFTConfig(**settings, max_length=None, packing=False, completion_only_loss=True)
    return summing(SFTTrainer)(model, args=config, train_dataset=data, **common)


def train(job: Job) -> Job:
    """Seconds, losses, gradients and memory of some steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(job, folder)
        watch = Watch(job["warmup"])
        trainer.add_callback(watch)
        start_adapter(trainer.model)
        without_dropout(trainer.model)
        with Memory() as memory:
            trainer.train()
    parts = job["sequences"] // job["micro_batch"]
    losses = [sum(trainer.shares[at : at + parts]) for at in range(0, len(trainer.shares), parts)]
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    return {**watch.clock.result, "check": [float(v) for pair in zip(losses, norms) for v in pair], "extra_bytes": memory.extra}


if __name__ == "__main__":
    main(train)
