"""Goal, Edit, Plan: what a poisoning changes. The plan is a patch file to a data set and the ground truth for detectors.

It is applied at one stage only, the stored uint8 image, and gives the same records whether the data are an array, a
stream of shards in any order, or newly written shards. It holds no image: added victims are read from `victims`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from bezoar.data.pairs import Pairs, TriggerFunction, content_hash
from bezoar.data.stored_pairs import PLACE, StoredPairs
from bezoar.data.strings import Strings
from bezoar.errors import UserError

SCHEMA = 1
STAGE = "stored uint8 image"


@dataclass(frozen=True)
class Goal:
    """What the attacker wants: inputs with `trigger`, or the `victims`, are to be read as `target`.

    target: class or word. trigger: spec text, or None for targeted poisoning. victims: ids of chosen images.
    poisons: how many records carry it. how: the poison's or attack's spec. references: ids of the reference inputs whose
    vectors triggered images are to have.
    """

    target: str
    trigger: str | None = None
    victims: tuple[str, ...] = ()
    poisons: int = 0
    how: str = ""
    references: tuple[str, ...] = ()

    @staticmethod
    def from_json(raw: dict) -> Goal:
        """From a manifest's or a plan's JSON."""
        return Goal(
            **{
                **raw,
                "victims": tuple(raw["victims"]),
                "references": tuple(raw.get("references", ())),
            }
        )

    def to_json(self) -> dict:
        """As it stands in a plan; without references it is written as before there were any."""
        return {k: v for k, v in asdict(self).items() if k != "references" or v}


@dataclass(frozen=True)
class Edit:
    """One poisoned record. id == source: that record is replaced; else a record is added whose image is `source`'s.

    before, after: content hashes (image and caption) of the source record and of the poisoned one.
    """

    id: str
    source: str
    caption: str
    triggered: bool
    goal: int
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Plan:
    """Edits to a data set, with their goals.

    seed: the randomness of the choice. victims: data spec of images that are added from outside the set, or None.
    stamps: the triggers themselves, one a goal (None where the goal has none); not written, made from the goals' specs.
    """

    edits: tuple[Edit, ...] = ()
    goals: tuple[Goal, ...] = ()
    seed: int = 0
    victims: str | None = None
    stamps: tuple[TriggerFunction | None, ...] = field(default=(), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.edits)

    @property
    def ids(self) -> frozenset[str]:
        """Ids of the poisoned records."""
        return frozenset(e.id for e in self.edits)

    def mask(self, ids: Sequence[str]) -> np.ndarray:
        """bool (N,): which of these records are poisons."""
        poisons = self.ids
        return np.fromiter((i in poisons for i in ids), dtype=bool, count=len(ids))

    def merge(self, other: Plan) -> Plan:
        """This plan followed by another one over the same data."""
        if clash := self.ids & other.ids:
            raise UserError(f"two poisonings edit the same record {min(clash)!r}")
        if self.victims and other.victims and self.victims != other.victims:
            raise UserError(
                f"victims are drawn from {self.victims} already, and a plan has one such set; not from {other.victims}"
            )
        shifted = tuple(replace(e, goal=e.goal + len(self.goals)) for e in other.edits)
        return Plan(
            self.edits + shifted,
            self.goals + other.goals,
            other.seed,
            self.victims or other.victims,
            self.stamps + other.stamps,
        )

    def poisons(self, sources: Pairs) -> Pairs:
        """The poisoned records whose source image is among `sources`, in the plan's order."""
        row = {k: i for i, k in enumerate(sources.ids)}
        edits = [e for e in self.edits if e.source in row]
        picked = sources.take([row[e.source] for e in edits])
        images = picked.images.clone()
        for g, stamp in enumerate(self.stamps):
            mine = [i for i, e in enumerate(edits) if e.goal == g and e.triggered]
            if mine and stamp is not None:
                images[mine] = stamp(images[mine], [edits[i].id for i in mine])
        return replace(
            picked,
            images=images,
            captions=tuple(e.caption for e in edits),
            ids=tuple(e.id for e in edits),
        )

    def apply(self, batch: Pairs, victims: Pairs | None = None) -> Pairs:
        """A batch with its poisons: replaced in place, added at the end. `victims` adds those from outside the set."""
        made = self.poisons(batch)
        row = {k: i for i, k in enumerate(batch.ids)}
        inside = [i for i, k in enumerate(made.ids) if k in row]
        images, captions, at = (
            batch.images,
            list(batch.captions),
            [row[made.ids[i]] for i in inside],
        )
        if inside:
            images = images.clone()
            images[at] = made.images[inside]
            for i, r in zip(inside, at, strict=True):
                captions[r] = made.captions[i]
        parts = [replace(batch, images=images, captions=tuple(captions))]
        parts.append(made.take([i for i, k in enumerate(made.ids) if k not in row]))
        if victims is not None:
            parts.append(_like(self.poisons(victims), batch))
        return Pairs.concat([p for p in parts if len(p)] or [batch])

    def stream(self, batches: Iterator[Pairs], victims: Pairs | None = None) -> Iterator[Pairs]:
        """The same records as `apply` gives, over a stream of batches; added victims come with the last one."""
        held: Pairs | None = None
        for batch in batches:
            if held is not None:
                yield self.apply(held)
            held = batch
        if held is not None:
            yield self.apply(held, victims)

    def over(self, stored: StoredPairs, victims: Pairs | None = None) -> StoredPairs:
        """Records on disk with their poisons: the same records in the same order as `apply` gives of Pairs.

        A poison is another place to read from, and the trigger that is put on what is read there.
        """
        if not self.edits:
            return stored
        rows = stored.ids.find_rows({e.source for e in self.edits} | {e.id for e in self.edits})
        row_of = dict(zip(stored.ids.take(rows), rows.tolist(), strict=True))
        edits = [e for e in self.edits if e.source in row_of]
        poisons = stored.select([row_of[e.source] for e in edits])
        stamped = {goal for goal, stamp in enumerate(self.stamps) if stamp is not None}
        poisons.places["goal"] = [
            e.goal if e.triggered and e.goal in stamped else -1 for e in edits
        ]
        outside = self.apply(stored.take([]), victims)
        outside_places = np.zeros(len(outside), PLACE)
        outside_places["shard"], outside_places["goal"] = -1, -1
        outside_places["offset"] = np.arange(len(outside))
        # Row r of the result is row order[r] of: the records, what the edits make of some, the images from outside.
        n = len(stored)
        order = np.arange(n + len(edits) + len(outside))
        replacing = np.array([i for i, e in enumerate(edits) if e.id in row_of], dtype=np.int64)
        order[[row_of[edits[i].id] for i in replacing]] = n + replacing
        order = np.delete(order, n + replacing)
        ids = [
            stored.ids,
            Strings.from_texts([e.id for e in edits]),
            Strings.from_texts(outside.ids),
        ]
        poison_captions = Strings.from_texts([e.caption for e in edits])
        captions = [stored.captions, poison_captions, Strings.from_texts(outside.captions)]
        labels = stored.labels
        if labels is not None and poisons.labels is not None and outside.labels is not None:
            rows = np.concatenate([np.arange(n), order[n:]])  # a replaced record keeps its label
            labels = torch.cat([labels, poisons.labels, outside.labels])[torch.from_numpy(rows)]
        return replace(
            stored,
            places=np.concatenate([stored.places, poisons.places, outside_places])[order],
            ids=Strings.concat(ids).take(order),
            captions=Strings.concat(captions).take(order),
            labels=labels,
            triggers=self.stamps,
            added_images=outside.images,
        )

    def with_hashes(self, sources: Pairs) -> Plan:
        """The plan with `before` and `after` of every edit filled in from the images themselves."""
        made, row = self.poisons(sources), {k: i for i, k in enumerate(sources.ids)}
        after = {k: content_hash(made.images[i], made.captions[i]) for i, k in enumerate(made.ids)}
        before = {
            e.source: content_hash(
                sources.images[row[e.source]],
                sources.captions[row[e.source]] if sources.captions else "",
            )
            for e in self.edits
        }
        return replace(
            self,
            edits=tuple(replace(e, before=before[e.source], after=after[e.id]) for e in self.edits),
        )

    def lines(self) -> list[str]:
        """The plan as JSON Lines: a header, then an edit a line. The same plan gives the same bytes."""
        head = {
            "bezoar": "poison plan",
            "schema": SCHEMA,
            "poisoned": True,
            "stage": STAGE,
            "seed": self.seed,
            "victims": self.victims,
            "goals": [g.to_json() for g in self.goals],
        }
        return [
            json.dumps(x, ensure_ascii=False, sort_keys=True)
            for x in (head, *map(asdict, self.edits))
        ]

    def digest(self) -> str:
        """sha256 (16 hex digits) of the written plan; every artefact made with it carries this."""
        return hashlib.sha256(
            "\n".join(self.lines()).encode(errors="backslashreplace")
        ).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write as JSON Lines, under a temporary name first."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(
            "\n".join(self.lines()) + "\n", encoding="utf-8", errors="backslashreplace"
        )
        os.replace(temporary, path)

    @staticmethod
    def read(path: Path, stamp: Callable[[str], TriggerFunction]) -> Plan:
        """Read a plan; `stamp` makes a trigger of a spec. Raises UserError that names the line at fault."""
        try:
            rows = [
                json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line
            ]
            head, edits = rows[0], tuple(Edit(**row) for row in rows[1:])
            goals, seed, victims = (
                tuple(map(Goal.from_json, head["goals"])),
                head["seed"],
                head["victims"],
            )
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise UserError(
                f"{path} is not a poison plan: {type(error).__name__}: {error}"
            ) from error
        if head.get("schema") != SCHEMA:
            raise UserError(
                f"{path}: plan schema {head.get('schema')!r}, this bezoar reads {SCHEMA}"
            )
        if odd := next((e for e in edits if e.goal not in range(len(goals))), None):
            raise UserError(
                f"{path}: record {odd.id!r} is of goal {odd.goal!r}; the plan has {len(goals)}, from 0 on"
            )
        stamps = tuple(stamp(g.trigger) if g.trigger else None for g in goals)
        return Plan(edits, goals, seed, victims, stamps)


def differences(written: Plan, derived: Plan) -> list[str]:
    """What differs between a plan as written and as derived anew from the data, a line a record. Empty: none."""
    found = []
    if written.goals != derived.goals or (written.seed, written.victims) != (
        derived.seed,
        derived.victims,
    ):
        found.append("header: seed, goals or victims differ from what the run's inputs give")
    ours = {e.id: e for e in derived.edits}
    for e in written.edits:
        other = ours.pop(e.id, None)
        if other is None:
            found.append(f"record {e.id!r} is in the plan, but the run's inputs do not poison it")
        elif e != other:
            names = [n for n in asdict(e) if getattr(e, n) != getattr(other, n)]
            found.append(f"record {e.id!r}: {', '.join(names)} differ" + _pixels(names))
    found += [f"record {k!r} is missing from the plan" for k in ours]
    return found


def _pixels(names: list[str]) -> str:
    return (
        " (before, after: hashes of pixels and caption)" if {"before", "after"} & set(names) else ""
    )


def _like(made: Pairs, batch: Pairs) -> Pairs:
    """Records from another source, made to fit: same size of image, labels only of the same classes."""
    if len(made) and made.images.shape[1:] != batch.images.shape[1:]:
        raise UserError(
            f"victims are {tuple(made.images.shape[2:])} px, the data {tuple(batch.images.shape[2:])}; give both one size"
        )
    if batch.labels is None:
        return replace(made, labels=None)
    return made if made.labels is not None else replace(made, labels=torch.full((len(made),), -1))
