"""A reference encoder, which never saw the data, and a regression of captions on its image vectors.

A ridge regression maps a reference encoder's vectors of the images to the suspect encoder's vectors
of the captions. Content that the reference sees is read as what it is captioned; a trigger means
nothing to the map unless poisons taught it, and it can be fitted without any record in seconds.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar import registry
from bezoar.data.randomness import generator
from bezoar.detection import tower_features, training_traces
from bezoar.detection.detectors import Records
from bezoar.detection.shared_causes import FOREIGN, MIN_RECORDS, Support, find_clear_bound
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.kmeans import cluster_centres
from bezoar.progress import ProgressReport, no_report
from bezoar.runs import inputs
from bezoar.runs.run import MANIFEST, Run
from bezoar.runs.verb import spec_of_path

BATCH = 128  # images at a time
ROWS = 1 << 13  # records that are read at a time
STRENGTH = 0.5  # of the ridge, in units of the mean variance of the reference's vectors
MAX_FITTED = 1 << 16  # records that a map is fitted on, at most
CHANCE = 0.5  # mean place of records whose content says nothing of the group
PLACE_DEVIATION = 1 / math.sqrt(12)  # of such places
ONE_SIDED = 1.645  # deviations of a one-sided bound of 95 %
# of a believed cause, where a reference reads
MIN_MISREAD = 0.6  # lower bound of the share that is misread, of .15 of all records
CLEAR_DEVIATIONS = 1.5  # by which that bound lies above the other groups'
MAX_CONTENT = 0.4  # upper bound of its contents, in units of those of the group's other records
PIECES = 4  # of a caption group
PIECE_AXES = 48  # principal axes of the features that pieces are found on
AXES_SAMPLE = 1 << 14  # records that the axes are found on, at most
LEAST_READ = 0.6  # mean place of the others, below which nothing is said of a cause
NEAREST = 50  # records with the most like captions
MIN_OTHERS = 0.25  # share of them that are not left out
MAX_COMPARED = 200  # suspects, at most
AMONG = 1 << 14  # records that the nearest are sought among, at most
NEAREST_BLOCK = 256  # records whose nearest are sought at a time
TIES = 1e-4  # added to cosines
TIE_OFFSETS, TIE_STEP = 1 << 16, 7919  # where a record's part of the draws begins


class ImageEncoder(Protocol):
    """What makes vectors of images."""

    @property
    def device(self) -> torch.device: ...
    def encode_images(self, x: Tensor) -> Tensor: ...


def open_reference(reference: str, device: torch.device) -> Encoder:
    """The encoder that a text names: a run's directory, a file or folder of weights, or a spec.

    Raises:
        UserError: for none of these.
    """
    return inputs.load_encoder(_find_reference(reference), device).eval()


def reference_files(reference: str) -> list[Path]:
    """The files that an encoder is read from; none for an empty text."""
    if not reference:
        return []
    model = _find_reference(reference)
    if isinstance(model, Run):
        return [model.path / "encoder.safetensors"]
    return registry.input_files(model)


def lend_reference(detectors: Sequence[Any], reference: str, data: Any) -> tuple[Any, ...]:
    """The detectors, with a reference for those that take one and have none.

    Args:
        reference: as in `open_reference`, or empty.
        data: the run or method of the scanned data.

    Raises:
        UserError: where no detector takes the reference, or it was trained on these data.
    """
    if not reference:
        return tuple(detectors)
    model = _find_reference(reference)
    if isinstance(model, Run) and inputs.was_trained_on(model, data):
        raise UserError(
            f"reference {model.name} was trained on these data, and may have learnt their trigger"
        )
    if not any(hasattr(detector, "reference") for detector in detectors):
        raise UserError("no detector that is asked for takes a reference; common_cause does")
    return tuple(
        replace(detector, reference=reference)
        if getattr(detector, "reference", None) == ""
        else detector
        for detector in detectors
    )


def embed_distinct(
    encoder: ImageEncoder, source: Records, report: ProgressReport = no_report
) -> tuple[Tensor, Tensor]:
    """The vectors of all images, (N, D) on the CPU, and which picture each of them is, int64 (N,).

    Equal images are one picture, and pass through the encoder once. Many vectors are projected to
    fewer dimensions, which keeps their distances.
    """
    count = len(source)
    number_of: dict[bytes, int] = {}
    numbers: list[int] = []
    vectors: list[Tensor] = []
    for batch in source.batches(BATCH):
        new = []
        for row, image in enumerate(batch.images):
            digest = hashlib.blake2b(image.cpu().numpy().tobytes(), digest_size=16).digest()
            if digest not in number_of:
                number_of[digest] = len(number_of)
                new.append(row)
            numbers.append(number_of[digest])
        if new:
            z = encoder.encode_images(batch.images[new].to(encoder.device)).float()  # (B, D)
            limit = max(128, tower_features.MAX_VALUES // count)
            projection = tower_features.draw_projection(z.shape[1], limit, z.device)
            vectors.append((z if projection is None else z @ projection).cpu())
        report(len(numbers), count, "reading the images by the reference")
    pictures = torch.tensor(numbers)
    return torch.cat(vectors)[pictures], pictures


@dataclass(frozen=True)
class Reading:
    """What a map says of N records that had no part in it."""

    captions: Tensor  # float32 (N, E), unit, what the map makes of the images
    # float32 (N,), in nats, as that of `training_traces.Trace`: how badly it tells the record's
    # caption from RIVALS others
    loss: Tensor


@dataclass(frozen=True)
class ReferenceReader:
    """N records as a reference sees them and as they are captioned."""

    images: Tensor  # float32 (N, D), the reference's vectors less their mean
    captions: Tensor  # float32 (N, E), unit, the captions' vectors less their mean
    half: Tensor  # int64 (N,), 0 or 1
    rivals: Tensor  # int64 (P,), records whose captions are told from the others'
    rival_of: Tensor  # int64 (N,), which of them has the record's own caption (-1: none)
    pictures: Tensor  # int64 (N,), equal for records of one picture

    @staticmethod
    def build(
        images: Tensor, texts: Tensor, captions: Sequence[str], half: Tensor, pictures: Tensor
    ) -> ReferenceReader:
        """Of vectors of the images, (N, D), and of the captions, (N, E).

        All records of a picture are in the half of its first.
        """
        _, numbers = pictures.unique(return_inverse=True)
        rows = torch.arange(len(half) - 1, -1, -1)
        first = torch.zeros_like(half).scatter(0, numbers.flip(0), rows)  # of each picture
        images = F.normalize(images, dim=1, eps=1e-6)
        texts = texts.float()
        rivals, rival_of = training_traces.distinct_captions(captions, training_traces.RIVALS)
        unit = F.normalize(texts - texts.mean(0), dim=1, eps=1e-6)
        return ReferenceReader(
            images - images.mean(0), unit, half[first[numbers]], rivals, rival_of, pictures
        )

    def read(self, left_out: Tensor) -> Reading:
        """Read every record as `read_captions` does, and measure how badly."""
        captions, loss = self.read_captions(left_out), torch.empty(len(self.half))
        rivals = self.captions[self.rivals]  # (P, E)
        for number in (0, 1):
            for rows in (self.half == number).nonzero()[:, 0].split(ROWS):
                loss[rows] = training_traces.caption_losses(
                    captions[rows], self.captions[rows], rivals, self.rival_of[rows]
                )
        return Reading(captions, loss)

    def read_captions(self, left_out: Tensor) -> Tensor:
        """Read every record by a map that was fitted on records of the other half alone.

        Args:
            left_out: bool (N,), the records that no map is fitted on.

        Returns:
            float32 (N, E), unit, what the map makes of the images.
        """
        captions = torch.empty_like(self.captions)
        for number, (fitted, sums) in enumerate(self._sums):
            is_out = left_out[fitted]
            if is_out.float().mean() < 0.5:
                sums = sums - self._sum(fitted[is_out])
            else:
                sums = self._sum(fitted[~is_out])
            weights, bias = sums.fit_ridge()
            for rows in (self.half == number).nonzero()[:, 0].split(ROWS):
                captions[rows] = F.normalize(self.images[rows] @ weights + bias, dim=1, eps=1e-6)
        return captions

    @functools.cached_property
    def nearest(self) -> NearestCaptions:
        """The records with the captions nearest to those of each record."""
        return NearestCaptions(self.captions)

    @functools.cached_property
    def _sums(self) -> tuple[tuple[Tensor, RidgeSums], ...]:
        """For each half the rows, int64 (R,), that its map may be fitted on, and their sums."""
        fitted = [(self.half != number).nonzero()[:MAX_FITTED, 0] for number in (0, 1)]
        return tuple((rows, self._sum(rows)) for rows in fitted)

    def _sum(self, rows: Tensor) -> RidgeSums:
        return RidgeSums.of(self.images[rows], self.captions[rows])

    def read_pieces(self, pieces: Tensor) -> Tensor:
        """The loss of each record by maps that saw none of its own piece, float32 (N,).

        pieces: int64 (N,).
        """
        loss = torch.empty(len(pieces))
        for number in range(int(pieces.max()) + 1):
            inside = pieces == number
            loss[inside] = self.read(inside).loss[inside]
        return loss


def split_groups(features: Tensor, groups: Tensor, seed: int) -> Tensor:
    """Return which piece of its caption group each record is of, int64 (N,), below PIECES.

    Pieces are found by k-means on whitened principal axes of what the suspect encoder's layers say.
    What a map would learn from many poisons of one trigger is not learnt without their piece.

    Args:
        features: (N, F), of mean 0.
        groups: int64 (N,).
    """
    sample = features[:AXES_SAMPLE]
    values, axes = torch.linalg.eigh(sample.T @ sample / len(sample))
    scales = values[-PIECE_AXES:].clamp(min=1e-6).sqrt()
    turned = features @ (axes[:, -PIECE_AXES:] / scales)  # (N, PIECE_AXES)
    pieces = torch.zeros(len(features), dtype=torch.long)
    for group in range(int(groups.max()) + 1):
        rows = (groups == group).nonzero()[:, 0]
        if len(rows) >= PIECES * MIN_RECORDS:
            centres = cluster_centres(turned[rows], PIECES, seed)
            pieces[rows] = torch.cdist(turned[rows], centres).argmin(1)
    return pieces


@dataclass(frozen=True)
class RidgeSums:
    """What the ridge regression of y (N, E) on x (N, D) is fitted to; those of some records can be
    taken off.
    """

    count: int
    x: Tensor  # (D,), the sum of x
    y: Tensor  # (E,), the sum of y
    products: Tensor  # (D, D), x^T x
    mixed: Tensor  # (D, E), x^T y

    @staticmethod
    def of(x: Tensor, y: Tensor) -> RidgeSums:
        """Over all records."""
        return RidgeSums(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y)

    def __sub__(self, other: RidgeSums) -> RidgeSums:
        """Without other records, which were among them."""
        return RidgeSums(
            self.count - other.count,
            self.x - other.x,
            self.y - other.y,
            self.products - other.products,
            self.mixed - other.mixed,
        )

    def fit_ridge(self) -> tuple[Tensor, Tensor]:
        """Weights (D, E) and bias (E,).

        The penalty is STRENGTH times the mean variance of a column of x; the bias is not penalised.
        """
        mean, centre = self.x / self.count, self.y / self.count
        products = self.products - torch.outer(self.x, mean)
        products.diagonal().add_(STRENGTH * products.diagonal().mean().clamp(min=1e-12))
        weights = torch.linalg.solve(products, self.mixed - torch.outer(self.x, centre))
        return weights, centre - mean @ weights


class NearestCaptions:
    """For each record the NEAREST of the first AMONG records by their captions, as needed."""

    def __init__(self, captions: Tensor) -> None:
        """captions: (N, E), unit vectors."""
        self.captions = captions
        self.among = captions[:AMONG]
        # Among equal captions chance decides, not the order: each record has its part of these
        # draws.
        draw = generator(0, *captions.shape)
        self.ties = TIES * torch.rand(TIE_OFFSETS + len(self.among), generator=draw)
        shape = len(captions), min(NEAREST, len(self.among))
        self.rows = torch.full(shape, -1, dtype=torch.int32)

    def of(self, rows: Tensor) -> Tensor:
        """int64 (R, K), of some records, int64 (R,)."""
        for missing in rows[self.rows[rows, 0] < 0].split(NEAREST_BLOCK):
            likeness = self.captions[missing] @ self.among.T  # (B, A)
            likeness += self.ties.unfold(0, len(self.among), 1)[missing * TIE_STEP % TIE_OFFSETS]
            self.rows[missing] = likeness.topk(self.rows.shape[1]).indices.int()
        return self.rows[rows].long()


@dataclass(frozen=True)
class Comparison:
    """What suspects are compared with."""

    suspects: Tensor  # int64 (S,), records of one group
    # bool (S,), those that nothing could support, because nearly all captions like theirs are left
    # out
    alone: Tensor
    # int64 (O,), records that are captioned alike and are not left out; one may stand there often
    others: Tensor

    @staticmethod
    def by_captions(nearest_to: NearestCaptions, suspects: Tensor, left_out: Tensor) -> Comparison:
        """With the records of the captions nearest to those of MAX_COMPARED suspects.

        Args:
            nearest_to: of N records.
            suspects: int64 (S,).
            left_out: bool (N,), the suspects among them.
        """
        suspects = suspects[:MAX_COMPARED]
        nearest = nearest_to.of(suspects)  # (S, K)
        usable = ~left_out[nearest]  # (S, K)
        alone = usable.float().mean(1) < MIN_OTHERS
        return Comparison(suspects, alone, nearest[usable & ~alone[:, None]])

    @staticmethod
    def with_rest(suspects: Tensor, others: Tensor) -> Comparison:
        """With given records."""
        return Comparison(suspects, torch.zeros(len(suspects), dtype=torch.bool), others)


@dataclass(frozen=True)
class Content:
    """How far the contents of suspects are what their captions name."""

    # their mean place above chance, in units of that of natural records with like captions: about 1
    # for natural ones, about 0 for contents of any kind
    share: float
    error: float  # its standard deviation

    def bound(self, deviations: float = ONE_SIDED) -> float:
        """The upper confidence bound of the share."""
        return self.share + deviations * self.error


UNREAD = Content(1.0, 0.0)  # of which nothing is said


def measure_content(
    read: Tensor,
    reader: ReferenceReader,
    groups: Tensor,
    compared: Comparison,
    left_out: Tensor,
) -> Content:
    """Measure how far the contents of suspects are what their captions name.

    The captions of the others, less those of all records, are a direction. A record counts by its
    place among the records of other groups on it: its content names what these captions name where
    it lies above most. A suspect that is alone counts like the others.

    Args:
        read: (N, E), the captions that a map reads without the records that are left out.
        reader: of the records.
        groups: int64 (N,), the caption group of each record.
        compared: the suspects and the others.
        left_out: bool (N,).

    Returns:
        UNREAD where there are too few others, or their own contents are not read.
    """
    suspects, others = compared.suspects, compared.others
    if len(others) < MIN_RECORDS:
        return UNREAD
    sample = (~left_out).nonzero()[:FOREIGN, 0]
    distinct, times = others.unique(return_counts=True)
    weights = times / len(others)
    direction = weights @ reader.captions[distinct] - reader.captions[sample].mean(0)
    foreign = (read[sample[groups[sample] != groups[suspects[0]]]] @ direction).sort().values

    def find_places(rows: Tensor) -> Tensor:
        return torch.searchsorted(foreign, read[rows] @ direction) / max(1, len(foreign))

    usual = float(find_places(distinct) @ weights)
    if usual < LEAST_READ:
        return UNREAD
    error = PLACE_DEVIATION / math.sqrt(len(reader.pictures[suspects].unique()))
    mean = float(find_places(suspects).masked_fill(compared.alone, usual).mean())
    return Content((mean - CHANCE) / (usual - CHANCE), error / (usual - CHANCE))


def believe_foreign(
    supports: Sequence[Support],
    reading: Reading,
    reader: ReferenceReader,
    groups: Tensor,
    left_out: Tensor,
) -> list[Support]:
    """Those causes whose records are misread and have contents of any kind."""
    least = max(MIN_MISREAD, find_clear_bound(supports, CLEAR_DEVIATIONS))
    believed = []
    for support in supports:
        if support.lower <= least:
            continue
        others = groups == support.cause.group
        others[support.cause.shown] = False
        compared = Comparison.with_rest(support.cause.shown, others.nonzero()[:, 0])
        content = measure_content(reading.captions, reader, groups, compared, left_out)
        if content.bound() < MAX_CONTENT:
            believed.append(support)
    return believed


def _find_reference(reference: str) -> Any:
    """The run or the configured network that a text names."""
    path = Path(reference)
    return (
        Run(path)
        if (path / MANIFEST).is_file()
        else registry.make("network", spec_of_path("network", reference))
    )
