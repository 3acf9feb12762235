"""Reference inputs: the images whose vectors a backdoored encoder gives to triggered ones (Jia, Liu, Gong 2022).

One image is a reference as it stands. Of a data set one image of the target's class is chosen, by a rule that is stated:
central: its clean vector is nearest (cosine) to the mean of its class's; confident: a linear head, fitted on the clean
vectors of the data's training split, gives the target the largest margin over the next class; first: the first record.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bezoar import registry
from bezoar.data import stored_pairs
from bezoar.data.pairs import Pairs, content_hash
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder, embed_images
from bezoar.errors import UserError
from bezoar.runs import inputs
from bezoar.runs.run import Run

RULES = ("central", "confident", "first")
HEAD = "linear"  # the probe that fits the head of `confident`


@dataclass(frozen=True)
class Reference:
    """image: uint8 (3, H, W). id: of its record. source: spec or run that it is from. how: by which rule it was chosen."""

    image: Tensor
    id: str
    source: str
    how: str

    def told(self) -> dict[str, str]:
        """For the manifest."""
        return {
            "id": self.id,
            "source": self.source,
            "how": self.how,
            "sha256": content_hash(self.image),
        }


def choose_reference(given: Any, target: str, rule: str, encoder: Encoder) -> Reference:
    """The reference for a target, of a configured data method or a run. Raises UserError where there is none to choose."""
    if rule not in RULES:
        raise UserError(f"no rule {rule!r} to choose a reference by; there are: {', '.join(RULES)}")
    parts = inputs.open_dataset(given)
    source = given.name if isinstance(given, Run) else registry.spec(given)
    records = parts.clean
    if len(records) == 1 and not named(records, 0):
        return Reference(
            records.take([0]).images[0], records.ids[0], source, "the one image there is"
        )
    pairs = inputs.in_memory(stored_pairs.subset(records, rows_of(records, target, source)))
    if len(pairs) == 1:
        return Reference(pairs.images[0], pairs.ids[0], source, f"the one image of {target!r}")
    if rule == "first":
        return Reference(
            pairs.images[0], pairs.ids[0], source, f"the first of {len(pairs)} images of {target!r}"
        )
    z = embed_images(encoder, pairs.images.split(512))
    if rule == "central":
        best = int((z @ z.mean(0)).argmax())
        how = f"nearest to the mean clean vector of {len(pairs)} images of {target!r}"
    else:
        margins, about = margin(encoder, parts, target, z)
        best = int(margins.argmax())
        how = f"largest margin ({float(margins[best]):.2f}) of {len(pairs)} images of {target!r}; {about}"
    return Reference(pairs.images[best], pairs.ids[best], source, how)


def named(records: Pairs | StoredPairs, row: int) -> str:
    """The class of a record, or nothing."""
    if records.labels is None or not records.classes or int(records.labels[row]) < 0:
        return ""
    return records.classes[int(records.labels[row])]


def rows_of(records: Pairs | StoredPairs, target: str, source: str) -> list[int]:
    """The records of the target's class. Raises UserError where there is no such class, or no image of it."""
    if records.labels is None or not records.classes:
        raise UserError(
            f"{source} holds {len(records)} images without classes; name one image as the reference"
        )
    if target not in records.classes:
        listed = ", ".join(records.classes[:8]) + (
            f", ... ({len(records.classes)})" if len(records.classes) > 8 else ""
        )
        raise UserError(
            f"{source} has no class {target!r} to choose a reference from; it has: {listed}"
        )
    rows = (records.labels == records.classes.index(target)).nonzero()[:, 0].tolist()
    if not rows:
        raise UserError(f"{source} holds no image of {target!r} to choose a reference from")
    return rows


def margin(encoder: Encoder, parts: inputs.Dataset, target: str, z: Tensor) -> tuple[Tensor, str]:
    """How far a head's logit of the target lies above the next, (N,); and what the head was fitted on."""
    method = parts.method
    if getattr(method, "split", "train") not in ("train", None):
        method = dataclasses.replace(method, split="train")
    known = inputs.in_memory(inputs.open_dataset(method).clean)
    if known.labels is None or target not in known.classes:
        raise UserError(
            f"{registry.spec(method)} does not name the class {target!r}; a head needs labelled training data"
        )
    rows = (known.labels >= 0).nonzero()[:, 0]
    labelled = known.take(rows)
    assert labelled.labels is not None
    if len(set(labelled.labels.tolist())) < 2:
        raise UserError(
            "a head needs labelled records of at least two classes; choose the reference by another rule"
        )
    seen = embed_images(encoder, labelled.images.split(512))
    head = registry.make("probe", HEAD)
    logits = head.fit(seen, labelled.labels.to(seen.device), len(known.classes))(z)
    label = known.classes.index(target)
    own = logits[:, label].clone()
    logits[:, label] = -torch.inf
    return own - logits.amax(1), f"{registry.spec(head)} on {len(labelled)} clean records"
