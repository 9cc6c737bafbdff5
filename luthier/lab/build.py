"""`python -m luthier.lab.build NAME`: trains a lab model and writes `weights/NAME/` when it meets its floors."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from luthier.errors import ModelError, nearest
from luthier.lab import _build_chat, _build_encoder, _build_vision, abilities, tokenizer
from luthier.lab._build_guide import guided, guided_loss
from luthier.lab.mixture import MIXTURE_A, filler_pair
from luthier.lab.nets import fresh
from luthier.lab.training import Plan, State, text_chunks, train

WEIGHTS = Path(__file__).with_name("weights")


@dataclass(frozen=True)
class Build:
    """One shipped model: its plan, what it learns from and how it is measured."""

    plan: Plan
    seed: int
    run: Callable[[str, torch.nn.Module, Plan, int], State]
    measure: Callable[[torch.nn.Module], dict[str, float]]
    start: str | None = None
    loads_with: str = "AutoModelForCausalLM"


def load(folder: Path | str, loads_with: str = "AutoModelForCausalLM") -> torch.nn.Module:
    import transformers

    return getattr(transformers, loads_with).from_pretrained(str(folder), dtype=torch.float32)


def run_text(mixture: list, filler: tuple[int, int] | None = None) -> Callable:
    """Causal language modelling on a mixture, with guided heads; `filler` guides them through longer rows too."""

    def run(name: str, model: torch.nn.Module, plan: Plan, seed: int) -> State:
        def watch(state: State, progress: float) -> None:
            if state.chunk % 4:
                return
            found = {k: round(abilities.skill_accuracy(model, k, 50), 2) for k in ("chain-3", "chain-4", "lookup", "add", "reverse", "count")}
            print(f"{name}: {found}", flush=True)
            if name == "lm-s" and found["chain-4"] >= 0.5 and "half" not in state.notes:
                state.notes["half"] = state.units
                ship("lm-s@half", model, abilities.text_abilities(model), state, seed)

        return train(name, model, guided(text_chunks(mixture, seed), seed, filler), guided_loss, plan, watch)

    return run


def with_values(mixture: list) -> list:
    """The mixture of lm-m: 12 % of the rows hold key-value pairs in up to 256 tokens of filler."""
    short, long = lambda rng: filler_pair(rng, "kv", (10, 60)), lambda rng: filler_pair(rng, "kv", (60, 250))
    return [*mixture, (short, 0.06), (long, 0.04)]


def builds() -> dict[str, Build]:
    return {
        "lm-s": Build(Plan(15_500_000), 1, run_text(MIXTURE_A), abilities.text_abilities),
        "lm-s.b": Build(Plan(14_000_000), 2, run_text(MIXTURE_A), abilities.text_abilities),
        "lm-m": Build(Plan(15_000_000, rate=1.5e-3), 3, run_text(with_values(MIXTURE_A), (10, 120)), lambda m: abilities.text_abilities(m, filler=True)),
        "chat": Build(Plan(4_000_000, rate=1e-3, final_rate=5e-5), 4, _build_chat.run, _build_chat.measure, start="lm-s"),
        "enc": Build(Plan(8_000_000, rate=7e-4, warmup=400), 5, _build_encoder.run, _build_encoder.measure, loads_with="AutoModelForMaskedLM"),
        "vit": Build(Plan(500_000, rate=1e-3), 6, _build_vision.run, _build_vision.measure, loads_with="AutoModelForImageClassification"),
    }


def ship(name: str, model: torch.nn.Module, measured: dict[str, float], state: State, seed: int) -> Path:
    """fp16 weights, configuration, tokenizer and the card, written beside the old folder and then put in its place."""
    folder, made = WEIGHTS / name, WEIGHTS / f".{name}"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    write_half(model, made)
    tokenizer.save(made, chat=name == "chat")
    card = {"name": name, "abilities": {k: round(v, 4) for k, v in measured.items()}, "units_seen": state.units,
            "steps": state.steps, "seconds": round(state.seconds), "seed": seed, "torch": torch.__version__}  # fmt: skip
    (made / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)
    return folder


def write_half(model: torch.nn.Module, folder: Path) -> None:
    """Save a half-precision copy; the model itself stays as it is."""
    copy.deepcopy(model).half().save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)


def round_trip(model: torch.nn.Module) -> torch.nn.Module:
    """The model as it will be loaded: every weight rounded to half precision once."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            tensor.copy_(tensor.half().float())
    return model


def build(name: str, minutes: float | None = None, seed: int | None = None, units: int | None = None, keep: bool = False) -> dict[str, float]:
    """Train, measure after the round trip through fp16, and ship or say which floor is missed."""
    known = builds()
    if name not in known:
        raise ModelError(f"the lab builds no model '{name}'.{nearest(name, known)} It builds {', '.join(known)}.")
    entry = known[name]
    plan, seed = entry.plan, entry.seed if seed is None else seed
    plan.minutes, plan.units = minutes, units or plan.units
    model = load(WEIGHTS / entry.start, entry.loads_with) if entry.start else fresh(name, seed)
    started = time.time()
    state = entry.run(name, model, plan, seed)
    measured = entry.measure(round_trip(model))
    print(f"{name}: {json.dumps({k: round(v, 3) for k, v in measured.items()})} after {time.time() - started:.0f} s", flush=True)
    below = abilities.missed(name, measured)
    if below and not keep:
        raise ModelError(f"'{name}' is not shipped: {'; '.join(below)}.")
    print(f"{name}: written to {ship(name, model, measured, state, seed)}", flush=True)
    return measured


def evaluate(folder: Path | str) -> dict[str, float]:
    """Measure the abilities of a shipped model again."""
    folder = Path(folder)
    entry = builds().get(folder.name.split("@")[0])
    if entry is None:
        raise ModelError(f"'{folder}' is not the folder of a lab model.{nearest(folder.name, builds())}")
    return entry.measure(load(folder, entry.loads_with))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(builds()))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--units", type=int, default=None, help="tokens or images instead of the plan's")
    parser.add_argument("--keep", action="store_true", help="write the folder even below the floors")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.names:
        build(name, args.minutes, args.seed, args.units, args.keep)


if __name__ == "__main__":
    main()
