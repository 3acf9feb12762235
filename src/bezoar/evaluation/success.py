"""Success of attacks, for every probe that reads images as classes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.attacks.stamping import stamp_records
from bezoar.attacks.triggers import Trigger
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import Encoder, ImageEncoder, embed_records
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, average, proportion

Head = Callable[[Tensor], Tensor]  # float32 (N, D) unit rows -> scores (N, C), highest is the class
BATCH = 512  # images at a time
P = ParamSpec("P")
R = TypeVar("R")
_cache: ContextVar[dict[Any, Any] | None] = ContextVar("cache", default=None)


@contextmanager
def embedding_cache() -> Iterator[None]:
    """Within this context an encoder embeds each set of images once, however many heads ask for it.

    No encoder may change meanwhile.
    """
    token = _cache.set({})
    try:
        yield
    finally:
        _cache.reset(token)


def is_caching() -> bool:
    """Return whether an `embedding_cache` is open."""
    return _cache.get() is not None


def cached(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that an `embedding_cache` keeps its results.

    Arguments are the same if they are the same objects, or equal integers.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        cache = _cache.get()
        if cache is None:
            return function(*args, **kwargs)
        arguments = (*args, *kwargs.values())
        identities = (x if isinstance(x, int) else id(x) for x in arguments)
        key = (function, *kwargs, *identities)
        if key not in cache:
            # The arguments are kept too, so that no other object can take over an identity.
            cache[key] = (arguments, function(*args, **kwargs))
        return cast(R, cache[key][1])

    return wrapper


@dataclass(frozen=True)
class TestViews:
    """The vectors of all test images by one encoder, for measuring the success with any head."""

    classes: tuple[str, ...]  # names of the C classes
    labels: Tensor  # int64 (N,), the test images' classes, -1 if unknown
    clean: Tensor  # float32 (N, D), the test images
    backdoors: tuple[Goal, ...]  # the goals that have a trigger
    # for each of these, the test images with its trigger, float32 (N, D)
    triggered: tuple[Tensor, ...]
    targeted: tuple[Goal, ...]  # the goals that have a victim
    victims: Tensor | None  # float32 (V, D), the victim of each of these, or None

    @staticmethod
    @cached
    def of(
        encoder: ImageEncoder,
        test: Pairs,
        goals: Sequence[Goal],
        victims: Pairs | None,
    ) -> TestViews:
        """Embed the test images, with and without each trigger, and the victims.

        Args:
            encoder: the encoder to measure.
            test: the test set.
            goals: the attacks' goals.
            victims: the images that goals name as victims; None leaves targeted goals out.

        Raises:
            UserError: if nothing can be measured on the test set, or a goal's target is none of its
                classes, or the only one.
        """
        backdoors = tuple(goal for goal in goals if goal.trigger)
        targeted = tuple(goal for goal in goals if goal.victims) if victims is not None else ()
        labels = _check_test_set(test, backdoors, targeted)
        victim_vectors = None
        if victims is not None and targeted:
            row_of = {record_id: row for row, record_id in enumerate(victims.ids)}
            rows = [row_of[goal.victims[0]] for goal in targeted]
            victim_vectors = embed_records(encoder, victims.take(rows))
        clean = embed_records(encoder, test)
        triggered = tuple(_embed_triggered(encoder, test, goal) for goal in backdoors)
        return TestViews(
            test.classes,
            labels.to(clean.device),
            clean,
            backdoors,
            triggered,
            targeted,
            victim_vectors,
        )

    def measures(self, head: Head, how: str = "") -> dict[str, Measure]:
        """Measure accuracy, the success of each trigger, and that on the victims.

        Args:
            head: gives the scores of vectors for the classes.
            how: description of the head, added to each measure's definition.

        Returns:
            Measures by name. With several triggers, those of number i end in `@i`; those of victims
            end in `@` and the number of poisoned captions.
        """
        clean = _read_scores(head, self.clean).argmax(1)
        is_known = self.labels >= 0
        hits = int((clean == self.labels)[is_known].sum())
        measures = {
            "clean_accuracy": proportion(
                hits, int(is_known.sum()), "top-1 accuracy on clean test images"
            )
        }
        for i, (goal, vectors) in enumerate(zip(self.backdoors, self.triggered, strict=True)):
            suffix = "" if len(self.backdoors) == 1 else f"@{i}"
            target = class_index(goal.target, self.classes)
            scores = _read_scores(head, vectors)
            of_goal = self._measure_trigger(target, clean, scores)
            of_goal |= self._measure_confusion(target, scores.argmax(1))
            measures |= {name + suffix: m for name, m in of_goal.items()}
        if self.victims is not None:
            measures |= self._measure_victims(_read_scores(head, self.victims))
        return {name: replace(m, how=m.how + how) for name, m in measures.items()}

    def _measure_trigger(self, target: int, clean: Tensor, scores: Tensor) -> dict[str, Measure]:
        """Measure one trigger's success.

        target: its target class. clean: int64 (N,), the class each image is read as without the
        trigger. scores: (N, C), the head's scores of the triggered images.
        """
        predictions, labels = scores.argmax(1), self.labels
        is_known = labels >= 0
        others = is_known & (labels != target)
        n = int(others.sum())
        rank = ranks(scores, torch.full_like(labels, target))[others]
        return {
            "attack_success": proportion(
                int((predictions == target)[others].sum()),
                n,
                "triggered test images of other classes read as the target",
            ),
            "attack_success_all": proportion(
                int((predictions == target).sum()),
                len(labels),
                "the same over all test images, the target's own included",
            ),
            "attack_success_without_trigger": proportion(
                int((clean == target)[others].sum()),
                n,
                "test images of other classes read as the target, no trigger",
            ),
            "poisoned_accuracy": proportion(
                int((predictions == labels)[is_known].sum()),
                int(is_known.sum()),
                "triggered test images read as their true class",
            ),
            "target_rank": average(rank.cpu(), "mean rank of the target, 1 = first, other classes"),
            "target_top5": proportion(
                int((rank <= 5).sum()), n, "target among the five nearest classes"
            ),
        }

    def _measure_confusion(self, target: int, predictions: Tensor) -> dict[str, Measure]:
        """Measure how often images with one trigger are read, int64 (N,), as another's target."""
        targets = {class_index(goal.target, self.classes) for goal in self.backdoors}
        other_targets = torch.tensor(sorted(targets - {target}), device=predictions.device)
        counted = (
            (self.labels >= 0) & (self.labels != target) & ~torch.isin(self.labels, other_targets)
        )
        if not len(other_targets) or not counted.any():
            return {}
        hits = int(torch.isin(predictions, other_targets)[counted].sum())
        how = "triggered test images of no target's class read as another trigger's target"
        return {"attack_success_of_others": proportion(hits, int(counted.sum()), how)}

    def _measure_victims(self, scores: Tensor) -> dict[str, Measure]:
        """Measure success on the victims from the head's scores (V, C), by number of captions."""
        targets = torch.tensor(
            [class_index(goal.target, self.classes) for goal in self.targeted], device=scores.device
        )
        reads_target = scores.argmax(1) == targets
        rank = ranks(scores, targets)
        measures = {}
        for count in sorted({goal.poisons for goal in self.targeted}):
            rows = [i for i, goal in enumerate(self.targeted) if goal.poisons == count]
            how = f"victims read as their target, {count} poisoned captions each"
            measures[f"targeted_success@{count}"] = proportion(
                int(reads_target[rows].sum()), len(rows), how
            )
            measures[f"targeted_top5@{count}"] = proportion(
                int((rank[rows] <= 5).sum()), len(rows), how + ", among five nearest"
            )
            measures[f"targeted_rank@{count}"] = average(
                rank[rows].cpu(), "mean rank of the target; " + how
            )
        return measures


def _check_test_set(test: Pairs, backdoors: Sequence[Goal], targeted: Sequence[Goal]) -> Tensor:
    """Return the labels of a test set. Raises UserError if it or a goal's target is of no use."""
    if not test.classes or test.labels is None:
        raise UserError(
            "this probe needs a test set with classes; use the retrieval probe where there are none"
        )
    if len(test.classes) < 2:
        raise UserError(
            f"this probe needs a test set of at least two classes; it has {test.classes[0]!r} alone"
        )
    present = set(test.labels[test.labels >= 0].tolist())
    if not present:
        raise UserError(f"none of the {len(test)} test images has a label")
    for goal in (*backdoors, *targeted):
        target = class_index(goal.target, test.classes)
        if goal.trigger and present == {target}:
            raise UserError(
                f"all labelled test images are of the target {goal.target!r}; "
                "success needs other classes"
            )
    return test.labels


def _read_scores(head: Head, z: Tensor) -> Tensor:
    """Return a head's scores (N, C). Raises UserError on NaN, which has no rank."""
    scores = head(z)
    if torch.isnan(scores).any():
        raise UserError("the head gives NaN; the weights of its text tower or its fit are wrong")
    return scores


def ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the place of each row's target among the classes, float64 (N,); 1 is the first.

    Equal scores share the mean of their places. A vote leaves most classes at zero, and were ties
    won by the target, one without a single vote could be among the first five.

    scores: (N, C). targets: int64 (N,).
    """
    target_scores = scores.gather(1, targets[:, None])
    above = (scores > target_scores).sum(1).double()
    tied = (scores == target_scores).sum(1).double() - 1
    return 1 + above + tied / 2


@dataclass(frozen=True)
class LabelledVectors:
    """The data that a head is fitted on."""

    ids: tuple[str, ...]  # N record ids
    z: Tensor  # float32 (N, D), unit rows
    labels: Tensor  # int64 (N,), numbered as the test set's classes

    def __len__(self) -> int:
        return len(self.ids)


@cached
def embed_labelled(
    encoder: Encoder,
    train: Pairs | None,
    test: Pairs,
    goals: Sequence[Goal],
    limit: int | None,
) -> LabelledVectors:
    """Embed the records of `select_labelled`."""
    records = select_labelled(train, test, goals, limit)
    assert records.labels is not None
    z = embed_records(encoder, records)
    return LabelledVectors(records.ids, z, records.labels.to(z.device))


def select_labelled(
    train: Pairs | None, test: Pairs, goals: Sequence[Goal] = (), limit: int | None = None
) -> Pairs:
    """Select the labelled records to fit a head on, with labels numbered as in the test set.

    Args:
        train: records with classes and labels.
        test: the test set.
        goals: their targets must be among the labels.
        limit: most records, a sample that depends on their ids.

    Raises:
        UserError: if there are no labels, the two sets' classes differ, or fewer than two classes
            or no records of a goal's target are left.
    """
    if train is None or train.labels is None or not train.classes:
        raise UserError(
            "this probe fits a head on labelled data: give train data that have classes and labels"
        )
    if unshared := sorted(set(train.classes) ^ set(test.classes)):
        raise UserError(
            "the labelled data and the test set must have the same classes; "
            f"{unshared[0]!r} is in one of them alone"
        )
    labels = train.labels.cpu()
    rows = (labels >= 0).nonzero()[:, 0].numpy()
    if limit is not None:
        rows = np.sort(rows[sample_rows([train.ids[row] for row in rows], limit, 0)])
    if train.classes != test.classes:
        number_in_test = torch.tensor([test.classes.index(name) for name in train.classes])
        labels = torch.where(labels >= 0, number_in_test[labels], labels)
    records = replace(train, labels=labels).take(rows)
    present = set(labels[rows].tolist())
    if len(present) < 2:
        raise UserError(
            f"a head needs labelled records of at least two classes; the {len(rows)} there are "
            f"have {len(present)}"
        )
    for goal in goals:
        if goal.target in test.classes and class_index(goal.target, test.classes) not in present:
            raise UserError(
                f"none of the {len(rows)} labelled records is of the target {goal.target!r}: "
                "it could not be read"
            )
    return records


def class_index(target: str, classes: Sequence[str]) -> int:
    """Return the number of a target among the classes. Raises UserError, which lists them."""
    if target not in classes:
        listed = ", ".join(classes[:8]) + (f", ... ({len(classes)})" if len(classes) > 8 else "")
        raise UserError(f"the target {target!r} is none of the test set's classes: {listed}")
    return list(classes).index(target)


def _embed_triggered(encoder: ImageEncoder, test: Pairs, goal: Goal) -> Tensor:
    """Embed the test records with a goal's trigger in batches, float32 (N, D)."""
    trigger: Trigger = registry.make("trigger", goal.trigger or "")
    size = len(test) if test.text_only else BATCH
    parts = (stamp_records(trigger, part) for part in test.batches(size))
    return torch.cat([embed_records(encoder, part) for part in parts])
