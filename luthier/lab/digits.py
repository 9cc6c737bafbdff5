"""`lab:digits`, scikit-learn's 1,797 handwritten digits of 8x8 pixels under labels, shifts, cues and weak labels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from luthier.errors import DataError
from luthier.lab.splits import Splits, Verdict, as_list, chosen, generator, one_of, share

TRAIN, TEST, OOD = slice(0, 1000), slice(1000, 1497), slice(1497, 1797)
LABELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "class": lambda d: d,
    "parity": lambda d: d % 2,
    "ge5": lambda d: (d >= 5).astype(int),
    "super": lambda d: np.array([0, 1, 2, 2, 1, 2, 0, 1, 0, 0])[d],  # round, straight, curved
}
CUES = np.array([[.9, .2, .2], [.2, .9, .2], [.2, .2, .9], [.9, .9, .2], [.9, .2, .9], [.2, .9, .9], [.9, .6, .2], [.6, .2, .9], [.2, .6, .6], [.7, .7, .7]])  # fmt: skip


@functools.cache
def originals() -> tuple[np.ndarray, np.ndarray]:
    """(images in [0, 1], digits) in one fixed shuffled order, so that a split by index mixes the writers."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(12).permutation(len(found.target))
    return (found.images[order] / 16).astype(np.float32), found.target[order].astype(int)


def _rotated(images: np.ndarray, degrees: float) -> np.ndarray:
    if degrees % 90 == 0:
        return np.rot90(images, int(degrees // 90), axes=(1, 2)).copy()
    from scipy.ndimage import rotate

    return np.clip(rotate(images, degrees, axes=(1, 2), reshape=False, order=1), 0, 1).astype(np.float32)


def _blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(images, (0, sigma, sigma)).astype(np.float32)


# (images, generator, severity 0-1) -> images. Severity 0 returns the images unchanged.
SHIFTS: dict[str, Callable[[np.ndarray, np.random.Generator, float], np.ndarray]] = {
    "rot30": lambda x, rng, s: _rotated(x, 30 * s),
    "rot90": lambda x, rng, s: _rotated(x, 90),
    "invert": lambda x, rng, s: 1 - x,
    "noise": lambda x, rng, s: np.clip(x + rng.normal(0, 0.5 * s, x.shape), 0, 1).astype(np.float32),
    "blur": lambda x, rng, s: _blurred(x, 1.2 * s),
    "contrast": lambda x, rng, s: ((x - 0.5) * (1 - 0.8 * s) + 0.5).astype(np.float32),
    "brightness": lambda x, rng, s: np.clip(x + 0.6 * s, 0, 1).astype(np.float32),
    "permute": lambda x, rng, s: x.reshape(len(x), -1)[:, np.random.default_rng(7).permutation(64)].reshape(x.shape),
}


def shifted(images: np.ndarray, name: str, rng: np.random.Generator, severity: float = 1.0) -> np.ndarray:
    """The images under one named shift, or several joined by `+`; `none` changes nothing."""
    for part in name.split("+"):
        if part != "none":
            one_of("digits", "shift", part, SHIFTS)
            images = SHIFTS[part](images, rng, severity) if severity > 0 else images
    return images


def as_rgb(images: np.ndarray) -> np.ndarray:
    """N x 8 x 8 in [0, 1] -> N x 24 x 24 x 3 uint8."""
    large = np.kron(images, np.ones((1, 3, 3), dtype=np.float32))
    return np.repeat((255 * large).astype(np.uint8)[..., None], 3, axis=-1)


def operands_image(rng: np.random.Generator, digits: list[int]) -> np.ndarray:
    """Up to four handwritten digits in the quarters of one 24 x 24 picture."""
    images, labels = originals()
    canvas = np.zeros((24, 24), dtype=np.float32)
    for i, digit in enumerate(digits[:4]):
        places = np.flatnonzero(labels[TRAIN] == digit)
        top, left = 12 * (i // 2) + 2, 12 * (i % 2) + 2
        canvas[top : top + 8, left : left + 8] = images[places[int(rng.integers(len(places)))]]
    return np.repeat((255 * canvas).astype(np.uint8)[..., None], 3, axis=-1)


def pyramid(image: np.ndarray) -> list[np.ndarray]:
    """The 8x8 image as means over 1, 4, 16 and 64 blocks."""
    return [image.reshape(s, 8 // s, s, 8 // s).mean((1, 3)) for s in (1, 2, 4, 8)]


def digits(seed: int = 0, n: int = 1000, *, label: str = "class", classes: str = "", shots: int = 0, rgb: bool = False,
           domain: str = "none", shift: str = "none", severity: float = 1.0, stream: str = "", cue: str = "none",
           correlation: float = 0.0, wrong: float = 0.0, weak: int = 0, scales: bool = False, lowres: bool = False) -> Splits:  # fmt: skip
    """Handwritten digits: train 1,000, test 497, ood 300, fixed by index.

    label: class | parity | ge5 | super. classes: '0,1,2' keeps these digits. shots: rows a class. rgb: 24x24x3 uint8.
    domain: shift of every split; shift: further shift of ood; both join names with +: rot30, rot90, invert, noise, blur,
    contrast, brightness, permute; severity 0-1. stream: shifts that follow each other in `unlabelled`. cue: none | color |
    texture, agreeing with the label in a share `correlation` of train and test rows and by chance in ood. wrong: share of
    wrong labels. weak: train labels come from a nearest-centroid labeller fitted on so many rows. scales: the 1-2-4-8
    pyramid of every row. lowres: a 4x4 version with noise that grows with the class.
    """
    knobs = {**locals()}
    one_of("digits", "label", label, LABELS)
    one_of("digits", "cue", cue, ("none", "color", "texture"))
    share("digits", severity=severity, correlation=correlation, wrong=wrong)
    keep = [int(c) for c in as_list(classes)] or list(range(10))
    if any(not 0 <= c <= 9 for c in keep):
        raise DataError(f"lab:digits: classes={classes!r} must be digits from 0 to 9.")
    part = functools.partial(_rows, seed, knobs, keep)
    train, rest = _few(part("train", TRAIN, domain), seed, n, shots)
    _mislabel(train, seed, knobs, keep)
    free = [{k: v for k, v in row.items() if k != "label"} for row in rest]
    if stream:
        free = [row for name in as_list(stream) for row in part(f"stream {name}", TEST, name)]
        for row in free:
            row["meta"]["source"] = f"stream {row['meta']['shift']} {row['meta']['source']}"
    ood = part("ood", OOD, "+".join([domain, shift]))
    return Splits(train, part("test", TEST, domain), ood, [], free, name="digits", knobs=knobs, verify=verify)


def _rows(seed: int, knobs: dict, keep: list[int], split: str, places: slice, shift: str) -> list[dict]:
    images, numbers = originals()
    rng = generator(seed, f"digits {split}")
    where = np.arange(len(numbers))[places]
    where = where[np.isin(numbers[where], keep)]
    changed = shifted(images[where], shift, rng, knobs["severity"])
    labels = LABELS[knobs["label"]](numbers[where])
    if knobs["label"] == "class" and len(keep) < 10:
        labels = np.array([keep.index(v) for v in labels])
    shown, cues = _cued(changed, labels, rng, knobs, split)
    rows = []
    for i, index in enumerate(where):
        meta = {"skill": f"digits {knobs['label']}", "source": f"digit {index}", "clean": True, "answer": str(labels[i]),
                "digit": int(numbers[index]), "index": int(index), "shift": shift, "cue": cues[i]}  # fmt: skip
        row = {"image": shown[i], "label": int(labels[i]), "meta": meta}
        if knobs["scales"]:
            row["pyramid"] = pyramid(changed[i])
        if knobs["lowres"]:
            small = changed[i].reshape(4, 2, 4, 2).mean((1, 3))
            meta["noise"] = 0.04 * float(numbers[index])
            row["low"] = (small + rng.normal(0, 1, (4, 4)) * meta["noise"]).astype(np.float32)
        rows.append(row)
    return rows


def _cued(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator, knobs: dict, split: str) -> tuple[np.ndarray, list]:
    """Colour or background texture that agrees with the label as often as `correlation` says."""
    if knobs["cue"] == "none":
        return (as_rgb(images) if knobs["rgb"] else images), [None] * len(labels)
    agree = rng.random(len(labels)) < (0.0 if split == "ood" else knobs["correlation"])
    cues = np.where(agree, labels, rng.integers(0, int(labels.max()) + 1, len(labels)))
    if knobs["cue"] == "color":
        base = as_rgb(images).astype(np.float32)
        return (base * CUES[cues][:, None, None, :]).astype(np.uint8), cues.tolist()
    rows, columns = np.indices((8, 8))
    stripes = np.stack([((rows * (k % 3) + columns * (k // 3 + 1)) % (2 + k % 2) == 0) * 0.35 for k in range(10)]).astype(np.float32)
    textured = np.clip(images + stripes[cues] * (images < 0.3), 0, 1)
    return (as_rgb(textured) if knobs["rgb"] else textured), cues.tolist()


def _few(rows: list[dict], seed: int, n: int, shots: int) -> tuple[list[dict], list[dict]]:
    """`n` rows, or `shots` of every label, and what is left."""
    order = generator(seed, "digits order").permutation(len(rows))
    kept, rest, counts = [], [], {}
    for row in (rows[int(i)] for i in order):
        label = row["label"]
        full = counts.get(label, 0) >= shots if shots else len(kept) >= n
        counts[label] = counts.get(label, 0) + 1
        (rest if full else kept).append(row)
    return kept, rest


def _mislabel(train: list[dict], seed: int, knobs: dict, keep: list[int]) -> None:
    rng = generator(seed, "digits wrong")
    labels = sorted({row["label"] for row in train})
    for i in chosen(rng, len(train), knobs["wrong"]):
        others = [label for label in labels if label != train[i]["label"]]
        train[i]["label"] = others[int(rng.integers(len(others)))]
    if knobs["weak"]:
        numbers = originals()[1]
        where = [i for i in generator(seed, "digits weak").permutation(1000).tolist() if numbers[i] in keep][: knobs["weak"]]
        for row, label in zip(train, _centroid(where, [row["meta"]["index"] for row in train], knobs["label"], keep)):
            row["label"] = label
    for row in train:
        row["meta"]["clean"] = str(row["label"]) == row["meta"]["answer"]


def _centroid(fit: list[int], asked: list[int], label: str, keep: list[int]) -> list[int]:
    """Labels of the nearest class mean: a weak teacher of known quality."""
    images, numbers = originals()
    labels = LABELS[label](numbers)
    if label == "class" and len(keep) < 10:
        labels = np.array([keep.index(v) if v in keep else -1 for v in labels])
    known = sorted(set(labels[fit].tolist()))
    means = np.stack([images[fit][labels[fit] == k].mean(0).ravel() for k in known])
    distances = ((images[asked].reshape(len(asked), -1)[:, None] - means[None]) ** 2).sum(-1)
    return [known[int(i)] for i in distances.argmin(1)]


def verify(row: dict, answer: str) -> Verdict:
    said = str(answer).strip()
    right = said == row["meta"]["answer"]
    return Verdict(float(right), said, "" if right else f"'{row['meta']['answer']}' was expected")
