"""Families that give vectors and classes: text encoders, image classifiers, dual encoders of text and images."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core import unpadded
from luthier.core.batch import Batch, Sequence
from luthier.core.families import Family
from luthier.core.heads import Classifies
from luthier.core.pixels import pixels
from luthier.core.ranks import spread
from luthier.core.scores import Head, TokenScores
from luthier.errors import DataError, ModelError

Pooling = Literal["mean", "cls", "max", "last"]
PAIRS = (("text", "text_pair"), ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question", "context"))
"""Columns of a row that is read as two segments."""
CHUNK = 64
"""Items that run together where no gradient is wanted."""


class _Texts(Family):
    """What families with a text tower share: texts to sequences, sequences to a padded batch."""

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def max_length(self) -> int | None:
        """The most tokens of a text, special tokens included; longer texts are cut."""
        config = getattr(self.config, "text_config", self.config)
        known = [getattr(config, "max_position_embeddings", None), getattr(self.tokenizer, "model_max_length", None), self.cut]
        if known[0] and "roberta" in str(getattr(config, "model_type", "")):
            known[0] -= int(config.pad_token_id) + 1  # its positions begin behind the padding id
        sizes = [int(n) for n in known if n and n < 1_000_000]
        return min(sizes) if sizes else None

    cut: int | None = None

    @property
    def pad_id(self) -> int:
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return 0 if pad is None else int(pad)

    def encode(self, text: Any, row: int = 0, branch: str = "text") -> Sequence:
        """A text, or a pair of texts, with the tokenizer's special tokens."""
        if isinstance(text, Sequence):
            return text
        if not isinstance(text, (str, tuple)):
            ids = np.asarray(text, dtype=np.int64)
            return Sequence(ids, np.zeros(len(ids), bool), row=row, branch=branch)
        if self.tokenizer is None:
            raise ModelError("This model has no tokenizer, so it cannot read texts; give token ids.")
        limit = {"truncation": True, "max_length": self.max_length} if self.max_length else {}
        made = self.tokenizer(*((text,) if isinstance(text, str) else text), return_token_type_ids=isinstance(text, tuple), **limit)
        ids = np.asarray(made["input_ids"], dtype=np.int64)
        data = {"token_types": np.asarray(made["token_type_ids"], np.int64)} if any(made.get("token_type_ids", ())) else {}
        return Sequence(ids, np.zeros(len(ids), bool), row=row, branch=branch, data=data)

    def _sequences(self, items: Any, branch: str | None) -> list[Sequence]:
        if isinstance(items, Batch):
            return [s for s in items.sequences if branch is None or s.branch == branch]
        return [self.encode(item) for item in ([items] if isinstance(items, str) else items)]

    def padded(self, sequences: SequenceOf[Sequence]) -> dict[str, Tensor]:
        """input_ids and attention_mask, right padded (and token_type_ids where a sequence has any)."""
        width = max(len(s) for s in sequences)
        ids = np.full((len(sequences), width), self.pad_id, np.int64)
        real, types = np.zeros_like(ids), np.zeros_like(ids)
        for i, s in enumerate(sequences):
            ids[i, : len(s)], real[i, : len(s)] = s.ids, 1
            if "token_types" in s.data:
                types[i, : len(s)] = s.data["token_types"]
        made = {"input_ids": ids, "attention_mask": real} | ({"token_type_ids": types} if types.any() else {})
        return {k: torch.from_numpy(v).to(self.device) for k, v in made.items()}


class TextEncoder(Classifies, _Texts):
    """Bidirectional text encoders: bare, with a masked-word head, or with a classification head."""

    kind = "text-encoder"
    verbs = frozenset({"embed", "features", "classify"})
    heading = "AutoModelForSequenceClassification"

    def __init__(self, network: nn.Module, processor: Any, source: str = "", pooling: Pooling = "mean") -> None:
        super().__init__(network, processor, source)
        self.pooling: Pooling = pooling
        """How token states become one vector: sentence-transformers' choices; padding never counts."""

    @property
    def encoder(self) -> nn.Module:
        """The network below any head."""
        return self.base_network.base_model

    @property
    def is_prompted(self) -> bool:
        """peft adds virtual tokens, so its own forward must run."""
        configs = getattr(self.network, "peft_config", {})
        return any(getattr(c, "is_prompt_learning", False) for c in configs.values()) and not getattr(self.network, "_adapters_disabled", False)

    def states(self, sequences: SequenceOf[Sequence]) -> tuple[Tensor, Tensor]:
        """The last hidden states [n, length, d] and which of them are of real tokens."""
        inputs = self.padded(sequences)
        real = inputs["attention_mask"].bool()
        if not self.is_prompted:
            return self.enter(lambda: self.encoder(**inputs).last_hidden_state), real
        hidden = self.network(**inputs, output_hidden_states=True).hidden_states[-1]
        return hidden[:, -real.shape[1] :], real

    def embed(self, items: Any, branch: str | None = None) -> Tensor:
        """Pooled last hidden states, one row an item. `items`: a batch, sequences, texts, pairs of texts or ids."""
        sequences = self._sequences(items, branch)
        if not sequences:
            raise DataError(f"There is nothing to embed{f' in the branch {branch!r}' if branch else ''}.")
        return spread(sequences, self._chunked)

    def _chunked(self, sequences: SequenceOf[Sequence]) -> Tensor:
        packed = not self.is_prompted and unpadded.fits(self.encoder)
        if not packed and (torch.is_grad_enabled() or self.dropout_active() or len(sequences) <= CHUNK):
            return self._pooled(sequences)  # dropout falls alike with a gradient and without one
        rows = list(unpadded.rows_of(sequences, CHUNK, packed))
        parts = [(self._packed if packed else self._pooled)([sequences[i] for i in row]) for row in rows]
        return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(rows))).to(parts[0].device)]

    def _pooled(self, sequences: SequenceOf[Sequence]) -> Tensor:
        hidden, real = self.states(sequences)
        return pool(hidden, real, self.pooling)

    def _packed(self, sequences: SequenceOf[Sequence]) -> Tensor:
        """The same of texts in the order of their lengths, without padding."""
        groups, inputs = unpadded.inputs(self.encoder, sequences, self.device)
        hidden = self.enter(lambda: self.encoder(**inputs).last_hidden_state)[0]
        return torch.cat([pool(part, part.new_ones(part.shape[:2], dtype=torch.bool), self.pooling) for part in groups.parts(hidden)])

    def features(self, batch: Batch) -> Tensor:
        """[rows, d] what the classification head sees; without a head the pooled embedding of each row's first text."""
        return super().features(batch) if self.has_classes else self._chunked(_firsts(batch))

    def _logits(self, batch: Batch) -> Tensor:
        return self.network(**self.padded(_firsts(batch))).logits

    @property
    def has_mask_head(self) -> bool:
        """Whether hidden words can be predicted (`score`)."""
        return "MaskedLM" in type(self.base_network).__name__

    def score(self, batch: Batch | SequenceOf[Sequence]) -> TokenScores:
        """Scores of the supervised tokens, each predicted at its own place (put the mask token there)."""
        if not self.has_mask_head:
            raise ModelError(f"A {type(self.base_network).__name__} has no masked-word head, so it cannot score tokens.")
        sequences = batch.sequences if isinstance(batch, Batch) else list(batch)
        hidden, _ = self.states(sequences)
        width = hidden.shape[1]
        places = np.concatenate([s.supervised + i * width for i, s in enumerate(sequences)])
        labels = np.concatenate([s.labels[s.supervised] for s in sequences])
        owners = np.concatenate([np.full(len(s.supervised), i) for i, s in enumerate(sequences)])
        source, target, owner = (torch.from_numpy(v.astype(np.int64)).to(hidden.device) for v in (places, labels, owners))
        return TokenScores(hidden.flatten(0, 1)[source], Head(_mask_head(self.base_network)), target, owner, len(sequences))

    def collate(self, rows: SequenceOf[Mapping[str, Any]], ids: Any = None, train_on: str = "completion") -> Batch:
        """anchor/positive/negative(s) columns, or one text a row (branch "text"); a label column becomes `tensors["labels"]`."""
        sequences = [self.encode(text, i, branch) for i, row in enumerate(rows) for branch, text in texts_of(row, i)]
        labels = self.label_ids(rows)
        tensors = {} if labels is None else {"labels": labels}
        return Batch(list(rows), np.arange(len(rows)) if ids is None else np.asarray(ids, np.int64), sequences, tensors)


class ImageClassifier(Classifies, Family):
    """Vision models with a classification head."""

    kind = "image-classifier"
    verbs = frozenset({"embed", "features", "classify"})
    heading = "AutoModelForImageClassification"

    def pixels(self, images: SequenceOf[Any]) -> Tensor:
        return pixels(images, self.config, self.processor)

    def _logits(self, batch: Batch) -> Tensor:
        return self.network(pixel_values=batch.tensors["image"].to(self.device, self.dtype)).logits

    def features(self, batch: Batch) -> Tensor:
        """[rows, d] the pooled state before the head."""
        if self.has_classes:
            return super().features(batch)
        out = self.enter(lambda: self.base_network.base_model(pixel_values=batch.tensors["image"].to(self.device, self.dtype)))
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)

    def embed(self, items: Any, branch: str | None = None) -> Tensor:
        """The features of a batch, of rows or of images."""
        return self.features(_image_batch(self.pixels, items))

    def collate(self, rows: SequenceOf[Mapping[str, Any]], ids: Any = None, train_on: str = "completion") -> Batch:
        """The image column becomes `tensors["image"]`, normalised; a label column `tensors["labels"]`."""
        tensors = {"image": self.pixels([_image_of(row, i) for i, row in enumerate(rows)])}
        labels = self.label_ids(rows)
        if labels is not None:
            tensors["labels"] = labels
        return Batch(list(rows), np.arange(len(rows)) if ids is None else np.asarray(ids, np.int64), [], tensors)


class DualEncoder(_Texts):
    """Two towers, text and image, into one space (CLIP, SigLIP)."""

    kind = "dual-encoder"
    verbs = frozenset({"embed", "score_pairs"})

    def __init__(self, network: nn.Module, processor: Any, source: str = "") -> None:
        super().__init__(network, processor, source)
        if _pools_elsewhere(self.config, self.tokenizer):
            self.notices.append(
                "Texts are pooled at their largest token id, not at their end: this CLIP's text_config.eos_token_id is 2, which stands for the first "
                "releases, where the end token had the largest id. Give the end token another id, or the largest."
            )

    def embed(self, items: Any, branch: str | None = None) -> Tensor:
        """Projected vectors of the images (`branch="image"`) or of texts (any other branch: text, positive, negative ...).

        `items`: a batch, or images, or texts. Without a branch the kind of the items decides."""
        branch = branch or self._branch_of(items)
        if branch == "image":
            given = _image_batch(lambda images: pixels(images, self.config, self.processor), items).tensors["image"]
            return spread(list(given), self._image_vectors)
        sequences = self._sequences(items, branch)
        if not sequences:
            raise DataError(f"There is nothing to embed in the branch '{branch}'.")
        return spread(sequences, self._text_vectors)

    def _text_vectors(self, sequences: SequenceOf[Sequence]) -> Tensor:
        inputs = self.padded(sequences)
        return self.enter(lambda: _vector(self.base_network.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])))

    def _image_vectors(self, images: Any) -> Tensor:
        given = torch.stack(list(images))
        return self.enter(lambda: _vector(self.base_network.get_image_features(pixel_values=given.to(self.device, self.dtype))))

    def _branch_of(self, items: Any) -> str:
        if isinstance(items, Batch):
            if bool(items.sequences) == ("image" in items.tensors):
                raise ModelError("This batch holds texts and images; say `branch='text'` or `branch='image'`.")
            return "image" if "image" in items.tensors else "text"
        first = next(iter(items), None)
        return "text" if isinstance(first, (str, Sequence)) or (isinstance(first, Mapping) and "image" not in first) else "image"

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by: exp of the learnt log-temperature."""
        return self.base_network.logit_scale.exp()

    def score_pairs(self, batch: Any, images: Any = None) -> Tensor:
        """[texts, images] logits: scale x cosine (+ bias where the model has one). A batch, or texts and images."""
        texts = F.normalize(self.embed(batch, "text"), dim=-1)
        pictures = F.normalize(self.embed(batch if images is None else images, "image"), dim=-1)
        logits = self.scale * texts @ pictures.T
        bias = getattr(self.base_network, "logit_bias", None)
        return logits if bias is None else logits + bias

    def collate(self, rows: SequenceOf[Mapping[str, Any]], ids: Any = None, train_on: str = "completion") -> Batch:
        """`image` becomes `tensors["image"]`, text columns sequences, a numeric `label` `tensors["labels"]`."""
        tensors, sequences = {}, []
        if any("image" in row for row in rows):
            tensors["image"] = pixels([_image_of(row, i) for i, row in enumerate(rows)], self.config, self.processor)
        for i, row in enumerate(rows):
            texts = {k: v for k, v in row.items() if k != "image"}
            if any(k in texts for k in ("text", "anchor", "positive", "negative", "negatives")):
                sequences += [self.encode(text, i, branch) for branch, text in texts_of(texts, i)]
        if rows and all(isinstance(row.get("label"), (int, np.integer)) for row in rows):
            tensors["labels"] = torch.tensor([int(row["label"]) for row in rows])
        if not tensors and not sequences:
            raise DataError("These rows have neither an `image` nor a `text` column.")
        return Batch(list(rows), np.arange(len(rows)) if ids is None else np.asarray(ids, np.int64), sequences, tensors)


def pool(hidden: Tensor, real: Tensor, how: Pooling = "mean") -> Tensor:
    """One vector a sequence from its real tokens: their mean (in fp32), the first, the element-wise largest, or the last."""
    if how == "cls":
        return hidden[:, 0]
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), real.long().sum(1).clamp(min=1) - 1]
    if how == "max":
        return hidden.masked_fill(~real[..., None], -torch.inf).amax(1)
    weight = real[..., None].float()
    return (hidden.float() * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


def texts_of(row: Mapping[str, Any], number: int = 0) -> list[tuple[str, Any]]:
    """The texts of a row with their branches: anchor, positive and negatives, or one text (or a pair of them)."""
    if "anchor" in row:
        found: list[tuple[str, Any]] = [("anchor", row["anchor"])]
        for column, branch in (("positive", "positive"), ("negative", "negative"), ("negatives", "negative")):
            values = row.get(column)
            values = [] if values is None else [values] if isinstance(values, str) else list(values)
            found += [(branch, v) for v in values]
    else:
        found = [("text", _text_of(row, number))]
    for branch, text in found:
        if not all(isinstance(t, str) for t in (text if isinstance(text, tuple) else (text,))):
            raise DataError(f"Row {number}: the {branch} is not a text but a {type(text).__name__}.")
    return found


def _text_of(row: Mapping[str, Any], number: int) -> Any:
    for a, b in PAIRS:
        if row.get(a) is not None and row.get(b) is not None:
            return row[a], row[b]
    if row.get("text") is not None:
        return row["text"]
    if row.get("messages") is not None:
        return "\n".join(str(m["content"]) for m in row["messages"])
    parts = [row[k] for k in ("prompt", "completion") if isinstance(row.get(k), str)]
    if not parts:
        raise DataError(f"Row {number} has no text: it needs a column `text`, or `anchor` and `positive`. It has: {', '.join(row) or 'none'}.")
    return " ".join(parts)


def _firsts(batch: Batch) -> list[Sequence]:
    """Each row's first sequence, in the order of the rows."""
    first: dict[int, Sequence] = {}
    for s in batch.sequences:
        first.setdefault(s.row, s)
    if len(first) != len(batch):
        raise DataError(f"{len(batch) - len(first)} of {len(batch)} rows have no text.")
    return [first[i] for i in range(len(batch))]


def _image_of(row: Mapping[str, Any], number: int) -> Any:
    if row.get("image") is None:
        raise DataError(f"Row {number} has no image: it needs a column `image`. It has: {', '.join(row) or 'none'}.")
    return row["image"]


def _image_batch(convert: Any, items: Any) -> Batch:
    if isinstance(items, Batch):
        if "image" not in items.tensors:
            raise DataError("This batch holds no images.")
        return items
    if isinstance(items, Tensor):
        return Batch([{}] * len(items), np.arange(len(items)), [], {"image": items})
    images = [_image_of(x, i) if isinstance(x, Mapping) and "bytes" not in x else x for i, x in enumerate(items)]
    return Batch([{}] * len(images), np.arange(len(images)), [], {"image": convert(images)})


def _pools_elsewhere(config: Any, tokenizer: Any) -> bool:
    """Whether transformers would take a CLIP's text vector from a token that is not its last."""
    text = getattr(config, "text_config", None)
    if tokenizer is None or getattr(config, "model_type", "") != "clip" or getattr(text, "eos_token_id", None) != 2:
        return False
    ids = tokenizer("")["input_ids"]
    return bool(ids) and ids[-1] != max(tokenizer.get_vocab().values())


def _vector(found: Any) -> Tensor:
    """transformers gives the projected vector bare or, from version 5, as the pooled output."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _mask_head(network: nn.Module) -> nn.Module:
    """Hidden states to vocabulary logits, of the architectures that split the head into several modules too."""
    for names in (
        ("cls",), ("lm_head",), ("head", "decoder"), ("generator_predictions", "generator_lm_head"),
        ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
    ):  # fmt: skip
        parts = [getattr(network, n, None) for n in names]
        if all(isinstance(p, nn.Module) for p in parts):
            return parts[0] if len(parts) == 1 else nn.Sequential(*parts)  # type: ignore[arg-type,return-value]
    raise ModelError(f"The masked-word head of a {type(network).__name__} is not known.")
