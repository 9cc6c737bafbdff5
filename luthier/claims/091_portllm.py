"""PortLLM: an old base's LoRA patch added to the base's next version, against a patch trained anew on that version."""

from luthier.claims import Claim
from luthier.lab import make

STEPS = {"weak": 50, "middle": 200, "strong": 600}

claim = Claim(
    paper=91,
    says="After the base model was updated, its old LoRA patch serves as well as one that is trained anew (within two points), with no training at all.",
    published="Comparable to LoRA fine-tuning on seven data sets with Mistral-7B, Llama 2, Llama 3.1 and Gemma 2, at up to 12.2 times less GPU memory (abstract)",
    metric="right answers",
    smallest=0.02,
    at_least=-0.02,
    equal=(),
    seeds=(0, 1, 2, 3),
    methods=("merge/portllm", "measure/portability", "adapt/lora"),
    tasks=("traces",),
    models=("lm-s",),
    departs="A decoder of 0.4 M parameters; LoRA of rank 8 on all linear layers learns running maxima. The base evolves by training all its weights on sorting, with a fifth of rows from its "
    "old abilities, for 50, 200 and 600 steps; 200 are judged. The paper's bases evolve by LoRA on other instruction data, which moves them less. Both patches start from the same seed.",
    reason="So small a model has no room in which an update and a patch could pass each other by: the new skill and the patch together change the same few directions. It is not "
    "the way the base evolves: on another seed the ported patch was as useless (0.04) where the base had learned to sort by a LoRA of rank 32, as the paper's bases "
    "evolve, and (0.10) where it had only learned to hear its old skills asked in words. Patch and update add up exactly, as they should, and on the base as it was the "
    "patch answers 0.98.",
)


def rows_of(trial):
    return make("traces", skills="runmax", n=900, seed=trial.seed, test=300)


def patch(trial, base):
    """A LoRA of the task, merged into a plain model."""
    adapt = {"method": "lora", "rank": 8, "alpha": 16}
    tuned = trial.tune(base, rows_of(trial).train, steps=100, lr=3e-3, adapt=adapt)
    tuned.network = tuned.network.merge_and_unload()
    return tuned


def start(trial):
    """The old base and what its patch makes of it."""
    from luthier.core.models import load

    old = load("lab:lm-s")
    return old, patch(trial, old)


def evolved(trial, strength):
    """The base's next version."""
    old, _ = trial.once("start", lambda: start(trial))
    new = make("traces", skills="sort", n=1200, seed=trial.seed + 1000).train
    kept = make("traces", skills="base", n=300, seed=trial.seed + 1000).train
    return trial.tune(old, [*new, *kept], steps=STEPS[strength], lr=1e-3)


def judged(trial, make_model, strength="middle"):
    old, tuned = trial.once("start", lambda: start(trial))
    new = trial.once(strength, lambda: evolved(trial, strength))
    model, task = make_model(old, tuned, new), rows_of(trial)
    sort = make("traces", skills="sort", n=1, seed=trial.seed + 1000, test=200)
    return {"right answers": trial.right(model, task.test, task.verify), "sort": trial.right(model, sort.test, sort.verify), "general": trial.general(model)}


def at(model, tensors):
    from luthier.core.models import load_state

    twin = model.frozen_copy()
    load_state(twin, tensors)
    return twin


def ported(old, tuned, new):
    from luthier.merge.portllm import make_patch, portllm

    states = [dict(m.network.state_dict()) for m in (old, tuned, new)]
    return at(new, portllm(make_patch(states[0], states[1]), states[2]))


@claim.arm("method")
def patch_ported(trial):
    return judged(trial, ported)


@claim.arm("baseline")
def patch_retrained(trial):
    """Trained anew on the new base; how far it is from the old patch is noted."""
    from luthier.measure.portability import portability

    def model(old, tuned, new):
        retrained = patch(trial, new)
        states = [m.network.state_dict() for m in (old, new, tuned, retrained)]
        trial.notes.update({k: v for k, v in portability(*states).numbers.items() if v is not None})
        return retrained

    return judged(trial, model)


@claim.arm("control")
def random_patch(trial):
    """Noise of each tensor's own size."""
    import torch

    def model(old, tuned, new):
        generator = torch.Generator().manual_seed(trial.seed)
        before, after = old.network.state_dict(), tuned.network.state_dict()

        def moved(name, tensor):
            noise = torch.randn(tensor.shape, generator=generator)
            return tensor + noise * ((after[name] - before[name]).norm() / noise.norm().clamp(min=1e-12))

        return at(new, {n: moved(n, t) if t.is_floating_point() else t for n, t in new.network.state_dict().items()})

    return judged(trial, model)


@claim.arm(exempt=True)
def new_base_alone(trial):
    return judged(trial, lambda old, tuned, new: new)


@claim.arm()
def weak_evolution_ported(trial):
    return judged(trial, ported, "weak")


@claim.arm()
def weak_evolution_retrained(trial):
    return judged(trial, lambda old, tuned, new: patch(trial, new), "weak")


@claim.arm()
def strong_evolution_ported(trial):
    return judged(trial, ported, "strong")


@claim.arm()
def strong_evolution_retrained(trial):
    return judged(trial, lambda old, tuned, new: patch(trial, new), "strong")
