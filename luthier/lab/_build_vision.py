"""The build of `vit`: attributes of single objects from fresh renders, centred first, then anywhere, then disturbed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from luthier.lab._scene_graph import draw_scene
from luthier.lab._scene_render import render, view
from luthier.lab.splits import generator
from luthier.lab.training import Batch, Plan, State, train
from luthier.lab.words import BACKGROUNDS, COLORS, SHAPES, TEXTURES

GROUPS = {"shape": SHAPES, "color": COLORS, "texture": TEXTURES, "background": BACKGROUNDS}
STARTS = dict(zip(GROUPS, np.cumsum([0, *(len(names) for names in GROUPS.values())]).tolist()))
LABELS = sum(len(names) for names in GROUPS.values())


def pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 N x 24 x 24 x 3 -> floats in [-1, 1], channels first; what every lab vision model reads."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def labelled(rng: np.random.Generator, n: int, free: bool = True, disturbed: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """`n` pictures of one object with four labels each."""
    images, labels = np.empty((n, 24, 24, 3), np.uint8), np.empty((n, 4), np.int64)
    for i in range(n):
        graph = draw_scene(rng, 1, free=free)
        thing = graph["objects"][0]
        images[i] = render(graph)
        if disturbed and rng.random() < disturbed:
            images[i] = mild(rng, images[i], thing, graph)
        labels[i] = [SHAPES.index(thing["shape"]), COLORS.index(thing["color"]), TEXTURES.index(thing["texture"]), BACKGROUNDS.index(graph["background"])]
    return images, labels


def mild(rng: np.random.Generator, image: np.ndarray, thing: dict, graph: dict) -> np.ndarray:
    """A small rotation, some noise or a slight blur."""
    kind = int(rng.integers(3))
    if kind == 0:
        thing["angle"] = float(rng.uniform(-20, 20))
        return render(graph)
    if kind == 1:
        return np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
    return (0.6 * image + 0.4 * view(image, rng, "blur")).astype(np.uint8)


def grouped_loss(model: torch.nn.Module, batch: Batch, progress: float) -> torch.Tensor:
    logits = model(pixel_values=batch["pixels"]).logits
    losses = [F.cross_entropy(logits[:, start : start + len(GROUPS[name])], batch["labels"][:, i]) for i, (name, start) in enumerate(STARTS.items())]
    return torch.stack(losses).sum()


def run(name: str, model: torch.nn.Module, plan: Plan, seed: int) -> State:
    size, chunk_images = 128, 6_400

    def chunk(i: int) -> Iterator[tuple[Batch, int]]:
        rng, seen = np.random.default_rng([seed, i]), i * chunk_images / plan.units
        for _ in range(chunk_images // size):
            images, labels = labelled(rng, size, free=seen > 0.15, disturbed=0.0 if seen < 0.4 else 0.4)
            yield {"pixels": pixels(images), "labels": torch.from_numpy(labels)}, size

    def watch(state: State, progress: float) -> None:
        if state.chunk % 6 == 0:
            print(f"{name}: { {k: round(v, 3) for k, v in attribute_accuracy(model, 500).items()} }", flush=True)

    return train(name, model, chunk, grouped_loss, plan, watch)


@torch.no_grad()
def attribute_accuracy(model: torch.nn.Module, n: int = 2000) -> dict[str, float]:
    images, labels = labelled(generator(79, "vit"), n)
    was_training = model.training
    model.eval()
    logits = torch.cat([model(pixel_values=part).logits for part in pixels(images).split(250)])
    model.train(was_training)
    return {
        name: float((logits[:, start : start + len(GROUPS[name])].argmax(1).numpy() == labels[:, i]).mean())
        for i, (name, start) in enumerate(STARTS.items())
    }


@torch.no_grad()
def features(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """The class token after the last layer."""
    model.eval()
    return torch.cat([model.vit(pixel_values=part).last_hidden_state[:, 0] for part in pixels(images).split(250)]).numpy()


def digits_probe(model: torch.nn.Module) -> float:
    """A linear classifier on frozen features, for a target that the model has never seen."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from luthier.lab.digits import digits

    found = digits(rgb=True)
    x = [features(model, np.stack([row["image"] for row in part])) for part in (found.train, found.test)]
    y = [[row["label"] for row in part] for part in (found.train, found.test)]
    scaler = StandardScaler().fit(x[0])
    probe = LogisticRegression(max_iter=1000).fit(scaler.transform(x[0]), y[0])
    return float(probe.score(scaler.transform(x[1]), y[1]))


def measure(model: torch.nn.Module) -> dict[str, float]:
    return {**attribute_accuracy(model), "digits-probe": digits_probe(model)}
