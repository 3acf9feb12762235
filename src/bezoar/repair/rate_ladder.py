"""Ladder: which learning rate a repair takes. The largest whose clean validation score falls by no more than a tolerance.

A backdoor goes where weights move far, and so does accuracy: the rate decides. The rule reads clean records alone, never
the attack. The score is accuracy on the labels where there are any (zero-shot, else by a linear head fitted on the clean
data), else how many images find their own caption, else how much of the start's own clusters is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bezoar import registry
from bezoar.data import randomness
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder, embed_images, tokenize_captions
from bezoar.errors import UserError
from bezoar.evaluation import kmeans, neighbors
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.training import loop, prefetch

VOTERS, CLUSTERS = 10, 20  # of the start's own clusters: neighbours that vote, clusters
FEWEST = 50  # validation records: with fewer, one image more or less would choose the rate


@dataclass(frozen=True)
class ValidationMetric:
    """score: of an encoder on clean validation records, 0..1, higher = better. how: what it is, in words."""

    score: Callable[[Encoder], float]
    how: str

    @staticmethod
    def of(start: Encoder, clean: Pairs, validation: Pairs) -> ValidationMetric:
        """The best score that can be had of these records. Raises UserError for too few of them."""
        if len(validation) < FEWEST:
            raise UserError(
                f"{len(validation)} validation records cannot choose a learning rate; at least {FEWEST} are needed"
            )
        n = f"{len(validation)} clean validation images"
        labelled = (
            validation.labels is not None
            and len(validation.classes) > 1
            and bool((validation.labels >= 0).any())
        )
        reads = start.text is not None
        if labelled and reads:
            return ValidationMetric(
                lambda e: _accuracy(e, None, validation, "zero_shot"), f"zero-shot accuracy on {n}"
            )
        if labelled:
            how = f"accuracy on {n} of a linear head fitted on the other clean ones"
            return ValidationMetric(lambda e: _accuracy(e, clean, validation, "linear"), how)
        if reads and validation.captions:
            return ValidationMetric(
                lambda e: _found(e, validation),
                f"share of {n} whose own caption is the nearest of all",
            )
        how = f"share of {n} that their {VOTERS} nearest put into the cluster that the start puts them into"
        return ValidationMetric(_Clusters(start, clean, validation), how)


def _accuracy(encoder: Encoder, train: Pairs | None, validation: Pairs, probe: str) -> float:
    found = registry.make("probe", probe)(encoder, train, validation)
    return next(m.value for name, m in found.items() if name.endswith("clean_accuracy"))


@torch.no_grad()
def _found(encoder: Encoder, validation: Pairs) -> float:
    """Captions that are the same text are one; of captions that are equally near, each is an image's as likely."""
    z = embed_images(encoder, validation.images.split(512))
    texts = {text: i for i, text in enumerate(dict.fromkeys(validation.captions))}
    w = encoder.eval().encode_texts(list(texts))
    if not torch.isfinite(w).all():
        raise UserError("the encoder gives NaN or infinite vectors of captions")
    cosines = z @ w.T
    nearest = cosines == cosines.amax(1, keepdim=True)
    own = torch.tensor([texts[text] for text in validation.captions], device=z.device)
    return float((nearest.gather(1, own[:, None])[:, 0] / nearest.sum(1)).mean())


class _Clusters:
    """k-means on the start's clean vectors; a record's neighbours among these vote on the cluster it was in."""

    def __init__(self, start: Encoder, clean: Pairs, validation: Pairs) -> None:
        self.clean, self.validation = clean.images.split(512), validation.images.split(512)
        z, v = embed_images(start, self.clean), embed_images(start, self.validation)
        centres = kmeans.cluster_centres(z, min(CLUSTERS, len(z) // VOTERS), 0)
        half = centres.square().sum(1) / 2
        self.of, self.truth, self.count = (
            (z @ centres.T - half).argmax(1),
            (v @ centres.T - half).argmax(1),
            len(centres),
        )

    def __call__(self, encoder: Encoder) -> float:
        z, v = embed_images(encoder, self.clean), embed_images(encoder, self.validation)
        near = neighbors.nearest_neighbors(v, z, VOTERS).index
        votes = torch.zeros(len(v), self.count, device=v.device).scatter_add_(
            1, self.of[near], torch.ones_like(near).float()
        )
        return float((votes.argmax(1) == self.truth).float().mean())


def split_validation(clean: Pairs, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """Clean records -> those that are trained on, and a share of the images held apart to choose by; it belongs to the records.

    Several captions of one image (ids that differ after '#' alone) stay together.
    """
    owners = [i.partition("#")[0] for i in clean.ids]
    images = list(dict.fromkeys(owners))
    order = randomness.sample_rows(images, len(images), seed)
    held = {images[i] for i in order[: round(share * len(images))]}
    out = [i for i, owner in enumerate(owners) if owner in held]
    return clean.take([i for i, owner in enumerate(owners) if owner not in held]), clean.take(out)


def check_rates(lrs: Sequence[float], tolerance: float) -> None:
    """ValueError unless these are rates and a tolerance."""
    if not lrs or min(lrs) <= 0 or not 0 <= tolerance <= 1:
        raise ValueError("needs one or more learning rates above 0, and a tolerance in 0..1")


def train_at_largest_rate(
    start: Encoder,
    ruler: ValidationMetric,
    lrs: Sequence[float],
    tolerance: float,
    make: Callable[[float], Encoder],
    log: dict[str, Any] | None = None,
) -> Encoder:
    """The encoder made with the largest rate whose score is at most `tolerance` below the start's; rates go downwards.

    Where none is, the one that lost least, and the log says so. A training that breaks down at a rate is a rung that does
    not hold. Raises UserError where all of them break down. log: gains `ladder`, what JSON holds.
    """
    before, rungs = ruler.score(start), []
    kept: tuple[float, float, Encoder] | None = None
    problem: UserError | None = None
    for lr in sorted(set(lrs), reverse=True):
        try:
            made = make(lr)
            score = ruler.score(made)
        except UserError as error:
            problem = error
            rungs.append({"lr": lr, "score": None, "problem": str(error)})
            continue
        rungs.append({"lr": lr, "score": score, "fall": before - score})
        if kept is None or score > kept[0]:
            kept = score, lr, made
        if before - score <= tolerance + 1e-9:
            break
    if kept is None:
        assert problem is not None
        raise problem
    for rung in rungs:
        rung["chosen"] = rung["lr"] == kept[1]
    if log is not None:
        holds = before - kept[0] <= tolerance + 1e-9
        told = {
            "score": ruler.how,
            "start": before,
            "tolerance": tolerance,
            "held": holds,
            "rungs": rungs,
        }
        log.setdefault("ladder", []).append(told)
    return kept[2]


def tokenize_for(encoder: Encoder, recipe: Any, clean: Pairs) -> Tensor:
    """int64 (N, L), the captions; L is 0 for an objective that reads none. Raises UserError where they do not fit."""
    name = registry.method_name(type(recipe))
    if not getattr(recipe, "captions", True):
        if encoder.text is not None:
            raise UserError(
                f"objective {name} trains the image tower alone, away from the text tower; take cleanclip"
            )
        return torch.zeros(len(clean), 0, dtype=torch.long, device=encoder.device)
    if encoder.text is None:
        raise UserError(
            f"objective {name} reads captions, and this encoder has no text tower; take objective=simclr"
        )
    if not clean.captions:
        raise UserError(
            f"objective {name} needs captions, and these clean data have none; take distill or supervised"
        )
    return tokenize_captions(encoder, clean.captions)


def train_copy(
    start: Encoder,
    recipe: Any,
    loss_of: Callable[[Encoder], nn.Module],
    clean: Pairs,
    rows: Tensor,
    seed: int,
    report: ProgressReport = no_report,
    what: str = "repair",
) -> Encoder:
    """A copy of the start, trained with the loss that `loss_of` makes of it; rows: int64 (N, L), what the loss is given."""
    student = copy.deepcopy(start)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = loss_of(student).to(student.device)
    data = replace(clean, captions=(), labels=None)

    def order(epoch: int) -> Tensor:
        return loop.epoch_batches(seed, epoch, len(data), recipe.batch)

    def told(step: int, steps: int, value: float) -> None:
        report(step, steps, f"{what}, loss {value:.3f}")

    report(0, 1, what)  # another phase of the work, however many steps the last one had
    with prefetch.training_data(data, student.device, order, recipe.epochs) as drawn:
        loop.fit(loss, recipe, drawn, rows, seed, report=told)
    for p, q in zip(student.parameters(), start.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
        p.grad = None
    return student.eval()


def mark_repaired(student: Encoder, spec: str) -> Encoder:
    """The same encoder, saying that it was repaired and how; what it is marked with stays."""
    student.about = {**student.about, "repaired": [*student.about.get("repaired", []), spec]}
    return student
