"""Goal, Edit and Plan: the changes of a poisoning.

A plan is a patch file for a data set, and the ground truth for detectors. It is applied only to the
stored uint8 images, so the records are the same whether the data are in memory, read from shards,
or written to new shards. A plan holds no images: those from outside the data set are read from the
source that `victims` names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bezoar.attacks.triggers import Trigger
from bezoar.data.files.artefacts import read_facts_lines, shown
from bezoar.data.files.typed_json import dataclass_from_json
from bezoar.data.files.writing import write_whole
from bezoar.data.pairs import Pairs, content_hash
from bezoar.data.stored_pairs import PLACE, StoredPairs
from bezoar.data.strings import Strings
from bezoar.errors import UserError
from bezoar.registry import MAX_SPEC

SCHEMA = 1
STAGE = "stored uint8 image"
MAX_CAPTION = 4 << 20  # characters


@dataclass(frozen=True)
class Goal:
    """The attacker's goal: images with the trigger, or the victims, are read as the target."""

    target: str  # a class or a word. It is empty for covers, whose records keep their captions
    trigger: str | None = None  # spec of the trigger, or None for targeted poisoning
    victims: tuple[str, ...] = ()  # ids of the images that targeted poisoning attacks
    poisons: int = 0  # number of records for this goal
    how: str = ""  # spec of the poison or the attack
    # ids of the reference inputs, whose vectors triggered images shall have
    references: tuple[str, ...] = ()
    # spec of the change that makes a poison of an image, if it is not the trigger: it alters each
    # copy of a victim's image, or composes an image with the trigger. Or None
    copies: str | None = None
    # words of the captions that shall retrieve the target's images; empty if the attack is on
    # images
    query: str = ""

    @property
    def is_cover(self) -> bool:
        """Whether its records hide another goal's; they have no target."""
        return not self.target

    @property
    def stamp(self) -> str | None:
        """Spec of the stamp on its edits, or None."""
        return self.copies or self.trigger

    @staticmethod
    def from_json(raw: dict[str, Any]) -> Goal:
        """Read a goal from a manifest or a plan. Raises UserError for anything else."""
        try:
            return dataclass_from_json(Goal, raw, "goal", MAX_SPEC)
        except ValueError as error:
            raise UserError(f"what the attacker wants cannot be read: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """Return the goal for a plan file, without its last three fields if they are empty."""
        optional = ("references", "copies", "query")
        return {
            name: value for name, value in asdict(self).items() if name not in optional or value
        }


@dataclass(frozen=True)
class Edit:
    """One poisoned record."""

    # id of the poisoned record. If it is `source`, that record is replaced; otherwise a record is
    # added
    id: str
    source: str  # id of the record whose image is used
    caption: str  # caption of the poisoned record
    # whether the goal's stamp (the trigger, or the change of copies) is on the image
    triggered: bool
    goal: int  # number of the goal in the plan
    before: str = ""  # content hash, of pixels and caption, of the source record
    after: str = ""  # content hash of the poisoned record


@dataclass(frozen=True)
class Plan:
    """Edits of a data set, with their goals."""

    edits: tuple[Edit, ...] = ()  # the poisoned records
    goals: tuple[Goal, ...] = ()  # the goals; an edit names its goal by number
    seed: int = 0  # seed that chose the records
    # data spec of the images that are added from outside the data set, or None
    victims: str | None = None
    # the stamp of each goal's edits (`Goal.stamp`), or None. They are made from the goals' specs
    # and are not written
    stamps: tuple[Trigger | None, ...] = field(default=(), compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.edits)

    @property
    def ids(self) -> frozenset[str]:
        """Ids of the poisoned records."""
        return frozenset(edit.id for edit in self.edits)

    def mask(self, ids: Sequence[str]) -> np.ndarray:
        """Return which of these records are poisons, bool (N,)."""
        poison_ids = self.ids
        return np.fromiter((i in poison_ids for i in ids), dtype=bool, count=len(ids))

    def merge(self, other: Plan) -> Plan:
        """Return this plan followed by another one of the same data.

        Raises UserError if both edit the same record, or take victims from different sources.
        """
        if clash := self.ids & other.ids:
            raise UserError(f"two poisonings edit the same record {min(clash)!r}")
        if self.victims and other.victims and self.victims != other.victims:
            raise UserError(
                f"victims are drawn from {self.victims} already, and a plan has one such set; "
                f"not from {other.victims}"
            )
        shifted = tuple(replace(edit, goal=edit.goal + len(self.goals)) for edit in other.edits)
        return Plan(
            self.edits + shifted,
            self.goals + other.goals,
            other.seed,
            self.victims or other.victims,
            self.stamps + other.stamps,
        )

    def poisons(self, sources: Pairs) -> Pairs:
        """Make the poisoned records whose source is among `sources`, in the plan's order."""
        row_of = _rows_by_id(sources.ids)
        edits = [edit for edit in self.edits if edit.source in row_of]
        originals = sources.take([row_of[edit.source] for edit in edits])
        images = originals.images.clone()
        for goal, trigger in enumerate(self.stamps):
            rows = [row for row, edit in enumerate(edits) if edit.triggered and edit.goal == goal]
            if rows and trigger is not None:
                images[rows] = trigger(images[rows], [edits[row].id for row in rows])
        return replace(
            originals,
            images=images,
            captions=tuple(edit.caption for edit in edits),
            ids=tuple(edit.id for edit in edits),
        )

    def apply(self, batch: Pairs, victims: Pairs | None = None) -> Pairs:
        """Poison a batch: records are replaced in place, and added at the end.

        Args:
            batch: the whole data set, or a part of it.
            victims: images from outside the data set, whose poisons come last. None adds none.

        Raises:
            UserError: if the victims have another size than the batch.
        """
        poisons = self.poisons(batch)
        batch_ids = set(batch.ids)
        replacing = [row for row, i in enumerate(poisons.ids) if i in batch_ids]
        added = [row for row, i in enumerate(poisons.ids) if i not in batch_ids]
        parts = [_replace_records(batch, poisons.take(replacing)), poisons.take(added)]
        if victims is not None:
            parts.append(_match_batch(self.poisons(victims), batch))
        return Pairs.concat([part for part in parts if len(part)] or [batch])

    def over(self, stored: StoredPairs, victims: Pairs | None = None) -> StoredPairs:
        """Poison records on disk; the records and their order are those of `apply`.

        No image is read: a poison is the place of its source image, and the trigger to stamp on
        what is read from there.
        """
        if not self.edits:
            return stored
        rows = stored.find_rows({e.source for e in self.edits} | {e.id for e in self.edits})
        row_of = dict(zip(stored.ids.take(rows), rows.tolist(), strict=True))
        edits = [edit for edit in self.edits if edit.source in row_of]
        poisons = stored.select([row_of[edit.source] for edit in edits])
        poisons.places["goal"] = [self._goal_to_stamp(edit) for edit in edits]
        outside = self.apply(stored.take([]), victims)

        outside_places = np.zeros(len(outside), PLACE)
        outside_places["shard"] = -1 - len(stored.held)
        outside_places["goal"] = -1
        outside_places["offset"] = np.arange(len(outside))
        places = np.concatenate([stored.places, poisons.places, outside_places])
        ids = [
            stored.ids,
            Strings.from_texts([e.id for e in edits]),
            Strings.from_texts(outside.ids),
        ]
        captions = [
            stored.captions,
            Strings.from_texts([edit.caption for edit in edits]),
            Strings.from_texts(outside.captions),
        ]
        # Row r of the result is row order[r] of these: records, poisons, images from outside.
        order = _overlay_order(len(stored), [row_of.get(edit.id) for edit in edits], len(outside))
        labels = stored.labels
        if labels is not None and poisons.labels is not None and outside.labels is not None:
            # A replaced record keeps its label.
            label_rows = np.concatenate([np.arange(len(stored)), order[len(stored) :]])
            labels = torch.cat([labels, poisons.labels, outside.labels])
            labels = labels[torch.from_numpy(label_rows)]
        return replace(
            stored,
            places=places[order],
            ids=Strings.concat(ids).take(order),
            captions=Strings.concat(captions).take(order),
            labels=labels,
            triggers=self.stamps,
            held=(*stored.held, outside.images),
        )

    def _goal_to_stamp(self, edit: Edit) -> int:
        """Return the goal whose trigger is on an edit, or -1."""
        has_trigger = edit.goal < len(self.stamps) and self.stamps[edit.goal] is not None
        return edit.goal if edit.triggered and has_trigger else -1

    def with_hashes(self, sources: Pairs) -> Plan:
        """Return the plan with the content hashes of every edit, computed from `sources`."""
        poisons = self.poisons(sources)
        after = dict(zip(poisons.ids, _content_hashes(poisons), strict=True))
        row_of = _rows_by_id(sources.ids)
        edited = list(dict.fromkeys(edit.source for edit in self.edits))
        originals = sources.take([row_of[source] for source in edited])
        before = dict(zip(edited, _content_hashes(originals), strict=True))
        edits = (
            replace(edit, before=before[edit.source], after=after[edit.id]) for edit in self.edits
        )
        return replace(self, edits=tuple(edits))

    def lines(self) -> list[str]:
        """Return the plan as JSON Lines: a header, then the edits. Equal plans give equal bytes."""
        header = {
            "bezoar": "poison plan",
            "schema": SCHEMA,
            "poisoned": True,
            "stage": STAGE,
            "seed": self.seed,
            "victims": self.victims,
            "goals": [goal.to_json() for goal in self.goals],
        }
        objects = [header, *map(asdict, self.edits)]
        return [json.dumps(x, ensure_ascii=False, sort_keys=True) for x in objects]

    def digest(self) -> str:
        """Return sha256 of the lines (16 hex digits), which artefacts of the plan carry."""
        text = "\n".join(self.lines())
        return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]

    def write(self, path: Path) -> None:
        """Write the plan as JSON Lines."""
        write_whole(path, "\n".join(self.lines()) + "\n")

    @staticmethod
    def read(path: Path, make_trigger: Callable[[str], Trigger]) -> Plan:
        """Read a plan.

        Args:
            path: a file that `write` wrote.
            make_trigger: makes the trigger that a spec names.

        Raises:
            UserError: if the file is no plan, of another schema, or an edit names a goal that the
                plan does not have.
        """
        try:
            header, *rows = read_facts_lines(path)
            if header.get("schema") != SCHEMA:
                raise UserError(
                    f"plan schema {shown(header.get('schema'))}, this bezoar reads {SCHEMA}"
                )
            edits = tuple(
                dataclass_from_json(Edit, row, f"edit {number}", MAX_CAPTION)
                for number, row in enumerate(rows)
            )
            goals = tuple(map(Goal.from_json, header.objects("goals")))
            seed, victims = header["seed"], header["victims"]
            if type(seed) is not int or not isinstance(victims, str | None):
                raise UserError("seed must be a whole number, and victims a spec")
            plan = Plan(edits, goals, seed, victims)
        except (ValueError, UserError) as error:  # ValueError: of another form, or empty
            raise UserError(f"{path} is not a poison plan: {error}") from error
        for edit in edits:
            if edit.goal not in range(len(goals)):
                raise UserError(
                    f"{path}: record {edit.id!r} is of goal {edit.goal!r}; "
                    f"the plan has {len(goals)}, from 0 on"
                )
        stamps = tuple(make_trigger(goal.stamp) if goal.stamp else None for goal in goals)
        return replace(plan, stamps=stamps)


def differences(recorded: Plan, derived: Plan) -> list[str]:
    """Compare a recorded plan with one that was derived anew from the data.

    Returns:
        One sentence for each record that differs, and one for the header; empty if the plans agree.
    """
    lines = []
    header, derived_header = ((plan.goals, plan.seed, plan.victims) for plan in (recorded, derived))
    if header != derived_header:
        lines.append("header: seed, goals or victims differ from what the run's inputs give")
    derived_edits = {edit.id: edit for edit in derived.edits}
    for edit in recorded.edits:
        other = derived_edits.pop(edit.id, None)
        if other is None:
            lines.append(
                f"record {edit.id!r} is in the plan, but the run's inputs do not poison it"
            )
        elif edit != other:
            names = [name for name in asdict(edit) if getattr(edit, name) != getattr(other, name)]
            line = f"record {edit.id!r}: {', '.join(names)} differ"
            if {"before", "after"} & set(names):
                line += " (before, after: hashes of pixels and caption)"
            lines.append(line)
    return lines + [f"record {i!r} is missing from the plan" for i in derived_edits]


def _rows_by_id(ids: Sequence[str]) -> dict[str, int]:
    return {record_id: row for row, record_id in enumerate(ids)}


def _content_hashes(pairs: Pairs) -> list[str]:
    captions = pairs.captions or ("",) * len(pairs)
    return [content_hash(x, caption) for x, caption in zip(pairs.images, captions, strict=True)]


def _replace_records(batch: Pairs, poisons: Pairs) -> Pairs:
    """Put poisons in the place of the records whose ids they have; labels stay."""
    if not len(poisons):
        return batch
    row_of = _rows_by_id(batch.ids)
    rows = [row_of[i] for i in poisons.ids]
    images = batch.images.clone()
    images[rows] = poisons.images
    captions = list(batch.captions)
    for row, caption in zip(rows, poisons.captions, strict=True):
        captions[row] = caption
    return replace(batch, images=images, captions=tuple(captions))


def _match_batch(poisons: Pairs, batch: Pairs) -> Pairs:
    """Fit records of another source to a batch: it has labels if and only if the batch has."""
    if len(poisons) and poisons.images.shape[1:] != batch.images.shape[1:]:
        sizes = [tuple(pairs.images.shape[2:]) for pairs in (poisons, batch)]
        raise UserError(f"victims are {sizes[0]} px, the data {sizes[1]}; give both one size")
    if batch.labels is None:
        return replace(poisons, labels=None)
    if poisons.labels is None:
        return replace(poisons, labels=torch.full((len(poisons),), -1))
    return poisons


def _overlay_order(count: int, replaced_rows: Sequence[int | None], outside: int) -> np.ndarray:
    """Return the order of rows in the result of `Plan.over`.

    Args:
        replaced_rows: for each poison the record that it replaces, None if it is added.
        outside: number of images from outside the data set.

    Returns:
        int64 rows of the concatenation of records, poisons and outside images: each poison is in
        the place of the record that it replaces, and additions come last.
    """
    order = np.arange(count + len(replaced_rows) + outside)
    poison_rows = count + np.flatnonzero([row is not None for row in replaced_rows])
    order[[row for row in replaced_rows if row is not None]] = poison_rows
    return np.delete(order, poison_rows)
