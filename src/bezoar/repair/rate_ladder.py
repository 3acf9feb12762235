"""The learning rate of a repair: the largest that keeps the clean validation score.

A backdoor goes where weights move far, and so does accuracy: the rate decides. The rule reads clean
records alone, never the attack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bezoar import registry
from bezoar.data import randomness
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images, tokenize_captions
from bezoar.errors import UserError
from bezoar.evaluation import classifiers, kmeans, neighbors
from bezoar.progress import ProgressReport, no_report
from bezoar.training import loop, prefetch

VOTERS = 10  # neighbours that vote on the cluster of a record
CLUSTERS = 20  # of the suspect's clean vectors
MIN_VALIDATION = 50  # records; with fewer, one image more or less would choose the rate
BATCH = 512  # images that are embedded together
CLASSIFIER_RECIPE = "supervised:epochs=8,weight_decay=0.1,smoothing=0.1"  # that tunes one
ROUNDING = 1e-9  # a fall may exceed the tolerance by this much

Log = dict[str, Any]  # facts about a repair, as JSON


class LadderFields(Protocol):
    """The fields of a repair that chooses its learning rate."""

    lrs: tuple[float, ...]
    tolerance: float


@dataclass(frozen=True)
class ValidationMetric:
    """A score of an encoder on clean validation records."""

    score: Callable[[Encoder], float]  # encoder -> 0..1, higher is better
    how: str  # its definition, in words

    @staticmethod
    def of(start: Encoder, clean: Pairs, validation: Pairs) -> ValidationMetric:
        """The best score that these records allow.

        With labels, it is the accuracy of the network's own head if that has these classes, else of
        zero-shot classification if there is a text tower, else of a linear head fitted on the clean
        records. Without labels, it is the share of images that the network's own head reads as
        before the repair, or the share that retrieve their own caption. Without captions either, it
        is the share of records that stay in the same cluster.

        Raises:
            UserError: for too few validation records.
        """
        if len(validation) < MIN_VALIDATION:
            raise UserError(
                f"{len(validation)} validation records cannot choose a learning rate; at least "
                f"{MIN_VALIDATION} are needed"
            )
        n = f"{len(validation)} clean validation images"
        labels = validation.labels
        labelled = labels is not None and len(validation.classes) > 1 and bool((labels >= 0).any())
        has_text = start.text is not None
        if labelled and classifiers.fits_own_head(start, validation.classes):
            return ValidationMetric(
                lambda encoder: _accuracy(encoder, None, validation, "own"),
                f"accuracy of the network's own head on {n}",
            )
        if start.head is not None:
            return ValidationMetric(
                HeadAgreement(start, validation),
                f"share of {n} that the network's own head reads as the start does",
            )
        if labelled and has_text:
            return ValidationMetric(
                lambda encoder: _accuracy(encoder, None, validation, "zero_shot"),
                f"zero-shot accuracy on {n}",
            )
        if labelled:
            return ValidationMetric(
                lambda encoder: _accuracy(encoder, clean, validation, "linear"),
                f"accuracy on {n} of a linear head fitted on the other clean ones",
            )
        if has_text and validation.captions:
            return ValidationMetric(
                lambda encoder: caption_retrieval(encoder, validation),
                f"share of {n} whose own caption is the nearest of all",
            )
        return ValidationMetric(
            ClusterAgreement(start, clean, validation),
            f"share of {n} that their {VOTERS} nearest put into the cluster that the start puts "
            "them into",
        )


def _accuracy(encoder: Encoder, train: Pairs | None, validation: Pairs, probe: str) -> float:
    measures = registry.make("probe", probe)(encoder, train, validation)
    return next(float(m.value) for name, m in measures.items() if name.endswith("clean_accuracy"))


@torch.no_grad()
def caption_retrieval(encoder: Encoder, validation: Pairs) -> float:
    """The share of images whose own caption is the nearest.

    Captions with the same text count as one. If k captions are equally near to an image and its
    own is one of them, the image counts 1 / k.
    """
    z = embed_images(encoder, torch.split(validation.images, BATCH))  # (N, D)
    rows = {text: i for i, text in enumerate(dict.fromkeys(validation.captions))}
    w = encoder.eval().encode_texts(list(rows))  # (T, D)
    if not torch.isfinite(w).all():
        raise UserError("the encoder gives NaN or infinite vectors of captions")
    cosines = z @ w.T
    nearest = cosines == cosines.amax(1, keepdim=True)  # (N, T), several in a row where they tie
    own_row = torch.tensor([rows[text] for text in validation.captions], device=z.device)
    own_is_nearest = nearest.gather(1, own_row[:, None])[:, 0]
    return float((own_is_nearest / nearest.sum(1)).mean())


class HeadAgreement:
    """Share of the validation images that an encoder's own head reads as the start's did."""

    def __init__(self, start: Encoder, validation: Pairs) -> None:
        self.images = validation.images
        self.read_before = classifiers.own_classifier(start).predict(self.images)

    def __call__(self, encoder: Encoder) -> float:
        predictions = classifiers.own_classifier(encoder.eval()).predict(self.images)
        return float((predictions == self.read_before).float().mean())


class ClusterAgreement:
    """Share of the validation records that stay in their cluster.

    Clusters are those of k-means on the start's clean vectors. In an encoder under repair, a record
    is of the cluster that most of its nearest clean records are of.
    """

    def __init__(self, start: Encoder, clean: Pairs, validation: Pairs) -> None:
        self.clean_batches = torch.split(clean.images, BATCH)
        self.validation_batches = torch.split(validation.images, BATCH)
        z, validation_z = self._embed(start)
        centres = kmeans.cluster_centres(z, min(CLUSTERS, len(z) // VOTERS), 0)
        self.clusters = kmeans.nearest_centres(z, centres)
        self.validation_clusters = kmeans.nearest_centres(validation_z, centres)
        self.count = len(centres)

    def __call__(self, encoder: Encoder) -> float:
        z, validation_z = self._embed(encoder)
        nearest = neighbors.nearest_neighbors(validation_z, z, VOTERS).index  # (V, k)
        votes = torch.zeros(len(validation_z), self.count, device=validation_z.device)
        votes.scatter_add_(1, self.clusters[nearest], torch.ones_like(nearest).float())
        return float((votes.argmax(1) == self.validation_clusters).float().mean())

    def _embed(self, encoder: Encoder) -> tuple[Tensor, Tensor]:
        clean_z = embed_images(encoder, self.clean_batches)
        return clean_z, embed_images(encoder, self.validation_batches)


def split_validation(clean: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """Split clean records into those to train on and a share to choose learning rates by.

    Which are held out belongs to the records, not to their order. Several captions of one image
    (ids that differ after '#' alone) stay together.
    """
    image_ids = [record_id.partition("#")[0] for record_id in clean.ids]
    images = list(dict.fromkeys(image_ids))
    order = randomness.sample_rows(images, len(images), seed)
    held_out = {images[i] for i in order[: round(share * len(images))]}
    train_rows = [row for row, image in enumerate(image_ids) if image not in held_out]
    validation_rows = [row for row, image in enumerate(image_ids) if image in held_out]
    return clean.take(train_rows), clean.take(validation_rows)


def check_rates(lrs: Sequence[float], tolerance: float) -> None:
    """Raise ValueError unless these are learning rates and a tolerance."""
    if not lrs or min(lrs) <= 0 or not 0 <= tolerance <= 1:
        raise ValueError("needs one or more learning rates above 0, and a tolerance in 0..1")


def repair_with_ladder(
    repair: LadderFields,
    encoder: Encoder,
    clean: Pairs,
    validation: Pairs,
    make: Callable[[float], Encoder],
    log: Log | None,
) -> Encoder:
    """The repaired encoder at the largest rate that keeps the validation score, marked as repaired.

    Args:
        repair: the method, with its rates and its tolerance.
        make: learning rate -> repaired encoder.
        log: receives `ladder`.
    """
    metric = ValidationMetric.of(encoder, clean, validation)
    student = train_at_largest_rate(encoder, metric, repair.lrs, repair.tolerance, make, log)
    return mark_repaired(student, registry.spec(repair))


def train_at_largest_rate(
    start: Encoder,
    metric: ValidationMetric,
    lrs: Sequence[float],
    tolerance: float,
    make: Callable[[float], Encoder],
    log: Log | None = None,
) -> Encoder:
    """The encoder made at the largest rate whose score falls by at most `tolerance`.

    Rates are tried from the largest down. If none keeps the score, the one with the smallest fall
    is used, and the log says so. A rate at which training diverges counts as not keeping it.

    Args:
        metric: the score on clean validation records.
        tolerance: how far the score may fall.
        make: learning rate -> encoder.
        log: receives `ladder`.

    Raises:
        UserError: if training diverges at every rate.
    """
    before = metric.score(start)
    rungs: list[Log] = []
    best: tuple[float, float, Encoder] | None = None  # score, rate, encoder
    problem: UserError | None = None
    for lr in sorted(set(lrs), reverse=True):
        try:
            student = make(lr)
            score = metric.score(student)
        except UserError as error:
            problem = error
            rungs.append({"lr": lr, "score": None, "problem": str(error)})
            continue
        rungs.append({"lr": lr, "score": score, "fall": before - score})
        if best is None or score > best[0]:
            best = score, lr, student
        if before - score <= tolerance + ROUNDING:
            break
    if best is None:
        assert problem is not None
        raise problem
    score, chosen_lr, student = best
    for rung in rungs:
        rung["chosen"] = rung["lr"] == chosen_lr
    if log is not None:
        facts = {
            "score": metric.how,
            "start": before,
            "tolerance": tolerance,
            "held": before - score <= tolerance + ROUNDING,
            "rungs": rungs,
        }
        log.setdefault("ladder", []).append(facts)
    return student


def tokenize_for(encoder: Encoder, recipe: Any, clean: Pairs) -> Tensor:
    """The captions as tokens for an objective, int64 (N, L); L = 0 for one without captions.

    For an objective that reads labels these, as columns of the encoder's head, int64 (N, 1).

    Raises:
        UserError: if objective, encoder and records do not fit each other.
    """
    name = registry.method_name(type(recipe))
    if getattr(recipe, "labels", False):
        return classifiers.head_labels(encoder, clean)
    if not getattr(recipe, "captions", True):
        if encoder.text is not None:
            raise UserError(
                f"objective {name} trains the image tower alone, away from the text tower; take "
                "cleanclip"
            )
        return no_tokens(encoder, clean)
    if encoder.text is None:
        instead = "simclr" if encoder.head is None else "supervised"
        raise UserError(
            f"objective {name} reads captions, and this encoder has no text tower; take "
            f"objective={instead}"
        )
    if not clean.captions:
        raise UserError(
            f"objective {name} needs captions, and these clean data have none; take unlearn or "
            "distill"
        )
    return tokenize_captions(encoder, clean.captions)


def select_objective(spec: str, encoder: Encoder, clean: Pairs, with_text: str, alone: str) -> Any:
    """The objective that a repair tunes with.

    Args:
        spec: the user's choice. `auto` is `supervised` for a classifier whose classes label the
            clean records, else one of the next two.
        with_text: the spec for encoders with a text tower.
        alone: the spec for image towers without a head.

    Raises:
        UserError: for a classifier without such labels.
    """
    if spec != "auto":
        return registry.make("objective", spec)
    if encoder.head is None:
        return registry.make("objective", alone if encoder.text is None else with_text)
    if clean.labels is None or not classifiers.fits_own_head(encoder, clean.classes):
        raise UserError(
            "tuning a classifier needs clean data that are labelled with its classes; "
            "take unlearn or distill"
        )
    return registry.make("objective", CLASSIFIER_RECIPE)


def no_tokens(encoder: Encoder, clean: Pairs) -> Tensor:
    """The captions for a loss that reads none: int64 (N, 0)."""
    return torch.zeros(len(clean), 0, dtype=torch.long, device=encoder.device)


def train_copy(
    start: Encoder,
    recipe: loop.Recipe,
    loss_of: Callable[[Encoder], nn.Module],
    clean: Pairs,
    tokens: Tensor,
    seed: int,
    report: ProgressReport = no_report,
    what: str = "repair",
) -> Encoder:
    """Train a copy of an encoder.

    Args:
        recipe: epochs, batch, learning rate and its schedule.
        loss_of: encoder -> loss module, called as `loss(images, tokens, chance)`.
        tokens: int64 (N, L), the second argument of the loss.
        seed: seed of the loss's new weights, the batches and the augmentation.
        report: called at every step.
        what: name of the training in reports.
    """
    student = copy.deepcopy(start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = loss_of(student).to(student.device)
    images = replace(clean, captions=(), labels=None)

    def batches_of(epoch: int) -> Tensor:
        return loop.epoch_batches(seed, epoch, len(images), recipe.batch)

    def report_step(step: int, steps: int, value: float) -> None:
        report(step, steps, f"{what}, loss {value:.3f}")

    report(0, 1, what)  # another phase of the work, however many steps the last one had
    with prefetch.training_data(images, student.device, batches_of, recipe.epochs) as data:
        loop.fit(loss, recipe, data, tokens, seed, report=report_step)
    loop.restore_gradient_flags(student, start)
    return student.eval()


def mark_repaired(student: Encoder, spec: str) -> Encoder:
    """The same encoder; its facts gain the repair, and keep the marks of the attack."""
    student.about = {**student.about, "repaired": [*student.about.get("repaired", []), spec]}
    return student
