"""Reference inputs: a backdoored encoder gives triggered records their vectors (BadEncoder, 2022).

They are images, or texts if the data have no images. The source may be a single record, or a data
set from which a rule chooses an image of the target's class:

- central: its clean vector is nearest (cosine) to the mean of its class.
- confident: a linear head, fitted on the clean vectors of the data's training split, gives the
  target the largest margin over the next class.
- first: it is the first record of the class.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.pairs import Pairs, content_hash
from bezoar.data.stored_pairs import StoredPairs, class_name
from bezoar.encoders.encoder import Encoder, embed_records
from bezoar.errors import UserError
from bezoar.runs import inputs
from bezoar.runs.verb import input_name

RULES = ("central", "confident", "first")
HEAD = "linear"  # the probe that fits the head of `confident`
BATCH = 512  # images that are embedded at a time
MAX_CLASSES = 8  # classes in an error message


@dataclass(frozen=True)
class Reference:
    """A reference input."""

    record: Pairs
    source: str  # the spec or run that it comes from
    how: str  # the rule that chose it, in words

    @property
    def id(self) -> str:
        """The id of the record."""
        return self.record.ids[0]

    def to_json(self) -> dict[str, str]:
        """The reference's entry in a manifest."""
        text = self.record.captions[0] if self.record.text_only else ""
        digest = content_hash(self.record.images[0], text)
        facts = {"id": self.id, "source": self.source, "how": self.how, "sha256": digest}
        return facts | ({"text": text} if text else {})


def choose_reference(
    data: Any, target: str, rule: str, encoder: Encoder, taken: Sequence[str] = ()
) -> Reference:
    """Choose the reference for a target.

    Args:
        data: a configured data method, or a run.
        target: the class.
        rule: one of `RULES`.
        encoder: the clean encoder.
        taken: ids of images that are references of the same goal already.

    Raises:
        UserError: if there is no image to choose, or no head to choose it by.
    """
    if rule not in RULES:
        raise UserError(f"no rule {rule!r} to choose a reference by; there are: {', '.join(RULES)}")
    dataset = inputs.open_dataset(data)
    source = input_name(data)
    records = dataset.clean
    if len(records) == 1 and not class_name(records, 0):
        return _reference(records.take([0]), 0, source, "the one image there is")
    rows = rows_of_class(records, target, source)
    pairs = inputs.in_memory(records.select(rows))
    if len(pairs) == 1:
        return _reference(pairs, 0, source, f"the one image of {target!r}")
    images_of_target = f"{len(pairs)} images of {target!r}"
    free = [row for row, record_id in enumerate(pairs.ids) if record_id not in taken]
    if not free:
        raise UserError(f"{source} holds {images_of_target}; more references are asked for")
    if rule == "first":
        return _reference(pairs, free[0], source, f"the first of {images_of_target}")
    z = embed_records(encoder, pairs, BATCH)  # (N, d)
    if rule == "central":
        row = free[int((z @ z.mean(0))[free].argmax())]
        return _reference(
            pairs, row, source, f"nearest to the mean clean vector of {images_of_target}"
        )
    margins, head = measure_margins(encoder, dataset, target, z)
    row = free[int(margins[free].argmax())]
    how = f"largest margin ({float(margins[row]):.2f}) of {images_of_target}; {head}"
    return _reference(pairs, row, source, how)


def rows_of_class(records: Pairs | StoredPairs, target: str, source: str) -> list[int]:
    """The rows of a class. Raises UserError if there is no such class, or no image of it."""
    if records.labels is None or not records.classes:
        raise UserError(
            f"{source} holds {len(records)} images without classes; name one image as the reference"
        )
    if target not in records.classes:
        names = ", ".join(records.classes[:MAX_CLASSES])
        more = f", ... ({len(records.classes)})" if len(records.classes) > MAX_CLASSES else ""
        raise UserError(
            f"{source} has no class {target!r} to choose a reference from; it has: {names}{more}"
        )
    rows: list[int] = (records.labels == records.classes.index(target)).nonzero()[:, 0].tolist()
    if not rows:
        raise UserError(f"{source} holds no image of {target!r} to choose a reference from")
    return rows


def measure_margins(
    encoder: Encoder, dataset: inputs.Dataset, target: str, z: Tensor
) -> tuple[Tensor, str]:
    """The margin of a linear head's logit of the target over the largest other logit.

    Args:
        dataset: the head is fitted on its training split.
        target: the class.
        z: vectors (N, d) of the candidates.

    Returns:
        The margins (N,), and what the head was fitted on, in words.
    """
    method = dataset.method
    if getattr(method, "split", "train") not in ("train", None):
        method = dataclasses.replace(method, split="train")
    train = inputs.in_memory(inputs.open_dataset(method).clean)
    if train.labels is None or target not in train.classes:
        raise UserError(
            f"{registry.spec(method)} does not name the class {target!r}; a head needs labelled "
            "training data"
        )
    labelled = train.take((train.labels >= 0).nonzero()[:, 0])
    assert labelled.labels is not None
    if len(set(labelled.labels.tolist())) < 2:
        raise UserError(
            "a head needs labelled records of at least two classes; choose the reference by "
            "another rule"
        )
    vectors = embed_records(encoder, labelled, BATCH)
    probe = registry.make("probe", HEAD)
    head = probe.fit(vectors, labelled.labels.to(vectors.device), len(train.classes))
    logits = head(z)  # (N, classes)
    label = train.classes.index(target)
    of_target = logits[:, label].clone()
    logits[:, label] = -torch.inf
    margins = of_target - logits.amax(1)
    return margins, f"{registry.spec(probe)} on {len(labelled)} clean records"


def _reference(pairs: Pairs, row: int, source: str, how: str) -> Reference:
    return Reference(pairs.take([row]), source, how)
