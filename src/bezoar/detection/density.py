"""Local densities of embedded records among a fixed sample of them.

One search serves every density detector of a scan: `Density.of` remembers the last ones. Huang et
al., ICLR 2025 (arXiv 2502.01385) define the scores.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.blocks import blocks
from bezoar.data.randomness import sample_rows
from bezoar.detection.detectors import RecordEncoder, Records, require_texts
from bezoar.encoders.encoder import EmbeddedRecords
from bezoar.evaluation.neighbors import Index, nearest_neighbors
from bezoar.evaluation.scores import Scores

MIN_DISTANCE = 1e-6  # distances are not divided by less
BLOCK = 1 << 16  # records at a time
MAX_REMEMBERED = 2  # searches


class DensityDetector(Protocol):
    """The fields that every density detector has."""

    @property
    def k(self) -> int: ...
    @property
    def pool(self) -> int: ...
    @property
    def rate(self) -> float: ...
    @property
    def texts(self) -> bool: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Neighbourhood:
    """What lies around each of B records x, and around each of its k neighbours y; all float64."""

    distance: Tensor  # (B,), kdist(x), the distance of x to its k-th neighbour
    dimension: Tensor  # (B,), the local intrinsic dimension at x
    neighbour_distances: Tensor  # (B, k), kdist(y)
    neighbour_dimensions: Tensor  # (B, k), the local intrinsic dimension at y

    @property
    def log_ratio(self) -> Tensor:
        """log(kdist(x) / kdist(y)) for the k neighbours y of each record x: (B, k)."""
        return self.distance[:, None].log() - self.neighbour_distances.log()


@dataclass(frozen=True)
class Density:
    """Distances of N records to their k nearest among a sample of P; no record is its own
    neighbour. 8 k bytes a record.
    """

    distance: Tensor  # float32 (N, k), ascending
    index: Tensor  # int32 (N, k), rows of the sample. Both lie where the records lie.
    # float64 (P, k), on the device, the distances among the sample. Where texts are among the
    # references these are 2 P rows, images and then their captions, and neither of a record's two
    # is a neighbour of either.
    sample_distance: Tensor
    width: int  # D of the embedding

    @staticmethod
    def measure(
        images: Tensor,
        ids: Sequence[str],
        k: int,
        size: int,
        seed: int,
        texts: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> Density:
        """Search the sample for the neighbours of every record.

        Args:
            images: (N, D), unit rows; they may lie in a file.
            ids: N keys, which decide the sample.
            k: Neighbours.
            size: Records of the sample.
            texts: (N, D), the captions' vectors, when they are to be references too.
            device: Where to search; by default where the images lie.
        """
        device = torch.device(device or images.device)
        members = torch.as_tensor(sample_rows(ids, size, seed))
        p, rows = len(members), members.to(images.device)
        references = images[rows].to(device)
        excluded: Tensor | bool = True
        if texts is not None:
            references = torch.cat([references, texts[rows].to(device)])
            excluded = torch.stack([torch.arange(p), torch.arange(p, 2 * p)], 1).repeat(2, 1)
        among = nearest_neighbors(references, references, k, excluded)

        distance = torch.empty(len(images), k, device=images.device)
        index = torch.empty(len(images), k, dtype=torch.int32, device=images.device)
        distance[rows] = among.distance[:p].to(images.device)
        index[rows] = among.index[:p].to(images.device, torch.int32)
        outside = np.ones(len(images), bool)
        outside[members.numpy()] = False
        rest = torch.as_tensor(np.flatnonzero(outside), device=images.device)
        if len(rest):
            search = Index(references, k, device=device)
            for part in rest.split(search.step):
                distance[part], near = search.search(images[part])
                index[part] = near.int()
        sample_distance = among.distance.double().clamp(min=MIN_DISTANCE)
        return Density(distance, index, sample_distance, images.shape[1])

    @staticmethod
    def of(
        embedded: EmbeddedRecords,
        k: int,
        size: int,
        seed: int,
        texts: bool = False,
        device: torch.device | str | None = None,
    ) -> Density:
        """`measure`, remembered: a question about the same vectors is answered once."""
        images = embedded.images
        caption_vectors = embedded.texts if texts else None
        key = (id(images), id(caption_vectors), len(embedded.ids), k, size, seed, str(device))
        vectors, density = _recent.get(key, (None, None))
        if density is None or vectors is None or vectors() is not images:
            density = Density.measure(images, embedded.ids, k, size, seed, caption_vectors, device)
            _recent[key] = weakref.ref(images, lambda _: _recent.pop(key, None)), density
            while len(_recent) > MAX_REMEMBERED:
                _recent.popitem(last=False)
        _recent.move_to_end(key)
        return density

    def neighbourhoods(self) -> Iterator[Neighbourhood]:
        """Those of the records in order, a bounded number at a time."""
        device = self.sample_distance.device
        kdist, dimension = self.sample_distance[:, -1], self._dimension(self.sample_distance)
        for rows in blocks(len(self.distance), BLOCK):
            r = self.distance[rows].to(device).double().clamp(min=MIN_DISTANCE)
            near = self.index[rows].to(device).long()
            yield Neighbourhood(r[:, -1], self._dimension(r), kdist[near], dimension[near])

    def _dimension(self, r: Tensor) -> Tensor:
        """Distances (B, k) -> local intrinsic dimension (B,), in (0, D].

        -k / sum over i < k of log(r_i / r_k + 1e-4) (maximum likelihood), cut at the dimension D of
        the embedding.
        """
        logs = (r[:, :-1] / r[:, -1:] + 1e-4).log().sum(1)
        return r.shape[1] / (-logs).clamp(min=r.shape[1] / self.width)


_recent: OrderedDict[
    tuple[int, int, int, int, int, int, str], tuple[weakref.ref[Tensor], Density]
] = OrderedDict()


def check_fields(detector: DensityDetector, min_k: int = 1) -> None:
    """Raises ValueError when a density detector's fields are out of range."""
    if detector.k < min_k or detector.pool < 0 or not 0 < detector.rate <= 1:
        raise ValueError(
            f"needs k >= {min_k}, pool >= 0, 0 < rate <= 1; "
            f"got {detector.k}, {detector.pool}, {detector.rate}"
        )


def score_records(
    detector: DensityDetector,
    encoder: RecordEncoder,
    source: Records,
    formula: Callable[[Neighbourhood], Tensor],
) -> Scores:
    """A formula over the neighbourhood of each record, which the detector's fields define.

    Raises:
        UserError: When texts are asked for and there are none, or there are too few records.
    """
    embedded = encoder.embed(source)
    if detector.texts:
        name = registry.method_name(type(detector))
        require_texts(embedded, f"{name!r} with texts=true")
    size = detector.pool or pool_size(detector.k, detector.rate, len(embedded.ids))
    density = Density.of(embedded, detector.k, size, detector.seed, detector.texts, encoder.device)
    values = [formula(part).float().cpu() for part in density.neighbourhoods()]
    return Scores(embedded.ids, torch.cat(values))


def pool_size(k: int, rate: float, n: int) -> int:
    """Return how many references let a poison's k-th neighbour be clean: k / (2 rate), at least 2 k
    and at most n.

    Poisons of one backdoor are each other's neighbours. Where rate x pool exceeds k, their k-th
    neighbour is a poison too: they look denser than clean records and every density score inverts
    (AUROC 0.04 in place of 0.96). Half of that leaves room for chance. It holds for the largest
    group of poisons, so `rate` is a bound to plan for, not an estimate: a smaller rate loses
    little, a larger one inverts. A rate above 1/4 is out of reach, because the pool is at least 2
    k.
    """
    return min(n, max(2 * k, round(k / (2 * rate))))
