"""Success: what it means that an attack worked. One definition, for every probe that reads an image as one of the classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import Encoder, ImageEncoder, embed_images
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, average, proportion

Head = Callable[[Tensor], Tensor]  # float32 (N, D) unit rows -> (N, C), higher = rather this class
P = ParamSpec("P")


R = TypeVar("R")
_kept: ContextVar[dict[Any, Any] | None] = ContextVar("kept", default=None)


@contextmanager
def embedding_cache() -> Iterator[None]:
    """Inside, an encoder sees each set of images once, however many heads ask. No encoder may change meanwhile."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def is_caching() -> bool:
    """Whether this is inside `remembering`."""
    return _kept.get() is not None


def once(call: Callable[P, R]) -> Callable[P, R]:
    """Decorator: inside `remembering`, the same question is answered once. The same: the same objects, or equal numbers."""

    @functools.wraps(call)
    def inside(*args: P.args, **named: P.kwargs) -> R:
        kept = _kept.get()
        if kept is None:
            return call(*args, **named)
        given = (*args, *named.values())
        key = (call, *named, *(a if isinstance(a, int) else id(a) for a in given))
        if key not in kept:
            kept[key] = (
                given,
                call(*args, **named),
            )  # `given` too, so that no other object takes over an identity
        return kept[key][1]

    return inside


@dataclass(frozen=True)
class TestViews:
    """All that success is measured on, as one encoder sees it; any number of heads can be measured on it.

    labels: int64 (N,), -1 = unknown. clean: float32 (N, D), the test images. triggered: the same, stamped, one a goal of
    `backdoors`. targeted: goals with a victim. victims: (V, D), theirs.
    """

    classes: tuple[str, ...]
    labels: Tensor
    clean: Tensor
    backdoors: tuple[Goal, ...]
    triggered: tuple[Tensor, ...]
    targeted: tuple[Goal, ...]
    victims: Tensor | None

    @staticmethod
    @once
    def of(
        encoder: ImageEncoder,
        test: Pairs,
        goals: Sequence[Goal],
        victims: Pairs | None,
        batch: int = 512,
    ) -> TestViews:
        """Every image through the encoder. Raises UserError for test data or goals that nothing can be measured on."""
        if not test.classes or test.labels is None:
            raise UserError(
                "this probe needs a test set with classes; use the retrieval probe where there are none"
            )
        if len(test.classes) < 2:
            raise UserError(
                f"this probe needs a test set of at least two classes; it has {test.classes[0]!r} alone"
            )
        there = set(test.labels[test.labels >= 0].tolist())
        if not there:
            raise UserError(f"none of the {len(test)} test images has a label")
        backdoors = tuple(g for g in goals if g.trigger)
        targeted = tuple(g for g in goals if g.victims) if victims is not None else ()
        for goal in (*backdoors, *targeted):
            if there == {class_index(goal.target, test.classes)} and goal.trigger:
                raise UserError(
                    f"all labelled test images are of the target {goal.target!r}; success needs other classes"
                )
        chosen = None
        if victims is not None and targeted:
            row = {k: i for i, k in enumerate(victims.ids)}
            chosen = embed_images(
                encoder, victims.images[[row[g.victims[0]] for g in targeted]].split(batch)
            )
        clean = embed_images(encoder, test.images.split(batch))
        triggered = tuple(embed_images(encoder, _stamped(test, g, batch)) for g in backdoors)
        return TestViews(
            test.classes,
            test.labels.to(clean.device),
            clean,
            backdoors,
            triggered,
            targeted,
            chosen,
        )

    def measures(self, head: Head, how: str = "") -> dict[str, Measure]:
        """Accuracy; success of each goal that has a trigger; success on the victims, by number of captions.

        how: what is said of the head, after each measure's own definition.
        """
        clean = _said(head, self.clean).argmax(1)
        known = self.labels >= 0
        hits = int((clean == self.labels)[known].sum())
        out = {
            "clean_accuracy": proportion(
                hits, int(known.sum()), "top-1 accuracy on clean test images"
            )
        }
        for i, (goal, z) in enumerate(zip(self.backdoors, self.triggered, strict=True)):
            mark = "" if len(self.backdoors) == 1 else f"@{i}"
            target, scores = class_index(goal.target, self.classes), _said(head, z)
            found = self._backdoor(target, clean, scores)
            rivals = {class_index(g.target, self.classes) for g in self.backdoors} - {target}
            found |= self._taken(target, rivals, scores.argmax(1))
            out |= {name + mark: m for name, m in found.items()}
        if self.victims is not None:
            out |= self._targeted(_said(head, self.victims))
        return {name: replace(m, how=m.how + how) for name, m in out.items()}

    def _backdoor(self, target: int, clean: Tensor, scores: Tensor) -> dict[str, Measure]:
        """clean: int64 (N,), what the images are read as. scores: (N, C), the head's of the stamped ones."""
        read, labels = scores.argmax(1), self.labels
        known = labels >= 0
        others = known & (labels != target)
        n, all_known = int(others.sum()), int(known.sum())
        rank = ranks(scores, torch.full_like(labels, target))[others]
        return {
            "attack_success": proportion(
                int((read == target)[others].sum()),
                n,
                "triggered test images of other classes read as the target",
            ),
            "attack_success_all": proportion(
                int((read == target).sum()),
                len(labels),
                "the same over all test images, the target's own included",
            ),
            "attack_success_without_trigger": proportion(
                int((clean == target)[others].sum()),
                n,
                "test images of other classes read as the target, no trigger",
            ),
            "poisoned_accuracy": proportion(
                int((read == labels)[known].sum()),
                all_known,
                "triggered test images read as their true class",
            ),
            "target_rank": average(rank.cpu(), "mean rank of the target, 1 = first, other classes"),
            "target_top5": proportion(
                int((rank <= 5).sum()), n, "target among the five nearest classes"
            ),
        }

    def _taken(self, target: int, rivals: set[int], read: Tensor) -> dict[str, Measure]:
        """How often a trigger is taken for another one. read: int64 (N,), what the images with this trigger are read as."""
        others = torch.tensor(sorted(rivals), device=read.device)
        counted = (self.labels >= 0) & ~torch.isin(self.labels, others) & (self.labels != target)
        if not rivals or not counted.any():
            return {}
        how = "triggered test images of no target's class read as another trigger's target"
        return {
            "attack_success_of_others": proportion(
                int(torch.isin(read, others)[counted].sum()), int(counted.sum()), how
            )
        }

    def _targeted(self, scores: Tensor) -> dict[str, Measure]:
        """scores: (V, C), the head's of the victims."""
        targets = torch.tensor(
            [class_index(g.target, self.classes) for g in self.targeted], device=scores.device
        )
        fell, rank = scores.argmax(1) == targets, ranks(scores, targets)
        out = {}
        for count in sorted({g.poisons for g in self.targeted}):
            rows = [i for i, g in enumerate(self.targeted) if g.poisons == count]
            how = f"victims read as their target, {count} poisoned captions each"
            out[f"targeted_success@{count}"] = proportion(int(fell[rows].sum()), len(rows), how)
            near = int((rank[rows] <= 5).sum())
            out[f"targeted_top5@{count}"] = proportion(
                near, len(rows), how + ", among five nearest"
            )
            out[f"targeted_rank@{count}"] = average(
                rank[rows].cpu(), "mean rank of the target; " + how
            )
        return out


def _said(head: Head, z: Tensor) -> Tensor:
    """A head's scores (N, C). Raises UserError on NaN, which has no rank and no place among the first."""
    scores = head(z)
    if torch.isnan(scores).any():
        raise UserError("the head gives NaN; the weights of its text tower or its fit are wrong")
    return scores


def ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Place of each row's target among the classes, 1 = first: float64 (N,). Equal scores share the mean of their places.

    A vote leaves most classes at zero: were ties the target's, one without a single vote could be among the first five.
    """
    own = scores.gather(1, targets[:, None])
    return 1 + (scores > own).sum(1).double() + ((scores == own).sum(1).double() - 1) / 2


@dataclass(frozen=True)
class LabelledVectors:
    """What a head is fitted on. ids: N keys. z: float32 (N, D), unit rows. labels: int64 (N,), the test set's numbers."""

    ids: tuple[str, ...]
    z: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@once
def embed_labelled(
    encoder: Encoder,
    train: Pairs | None,
    test: Pairs,
    goals: Sequence[Goal],
    limit: int | None,
    batch: int,
) -> LabelledVectors:
    """The labelled records as an encoder sees them, `batch` images at a time. Raises UserError as `labelled` does."""
    picked = select_labelled(train, test, goals, limit)
    assert picked.labels is not None
    z = embed_images(encoder, picked.images.split(batch))
    return LabelledVectors(picked.ids, z, picked.labels.to(z.device))


def select_labelled(
    train: Pairs | None, test: Pairs, goals: Sequence[Goal] = (), limit: int | None = None
) -> Pairs:
    """The records that a head is fitted on: those with a label, numbered as the test set numbers its classes.

    limit: at most so many, a sample that belongs to the records. Raises UserError without labels, when the two sets'
    classes differ, or when the head could not learn to tell classes apart or to say a goal's target.
    """
    if train is None or train.labels is None or not train.classes:
        raise UserError(
            "this probe fits a head on labelled data: give train data that have classes and labels"
        )
    if odd := sorted(set(train.classes) ^ set(test.classes)):
        raise UserError(
            f"the labelled data and the test set must have the same classes; {odd[0]!r} is in one of them alone"
        )
    labels = train.labels.cpu()
    rows = (labels >= 0).nonzero()[:, 0].numpy()
    if limit is not None:
        rows = np.sort(rows[sample_rows([train.ids[i] for i in rows], limit, 0)])
    if train.classes != test.classes:
        order = torch.tensor([test.classes.index(c) for c in train.classes])
        labels = torch.where(labels >= 0, order[labels], labels)
    picked = replace(train, labels=labels).take(rows)
    there = set(labels[rows].tolist())
    if len(there) < 2:
        raise UserError(
            f"a head needs labelled records of at least two classes; the {len(rows)} there are have {len(there)}"
        )
    for goal in goals:
        if goal.target in test.classes and class_index(goal.target, test.classes) not in there:
            raise UserError(
                f"none of the {len(rows)} labelled records is of the target {goal.target!r}: it could not be read"
            )
    return picked


def class_index(target: str, classes: Sequence[str]) -> int:
    """Row of a target among the classes. Raises UserError that lists them."""
    if target not in classes:
        listed = ", ".join(classes[:8]) + (f", ... ({len(classes)})" if len(classes) > 8 else "")
        raise UserError(f"the target {target!r} is none of the test set's classes: {listed}")
    return list(classes).index(target)


def _stamped(test: Pairs, goal: Goal, batch: int) -> Iterator[Tensor]:
    stamp = registry.make("trigger", goal.trigger or "")
    for i in range(0, len(test), batch):
        yield stamp(test.images[i : i + batch], test.ids[i : i + batch])
