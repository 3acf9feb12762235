"""Local densities of embedded records against a fixed pool of them, and the form in which the published code has them.

One search serves every density detector of a scan: `Density.of` remembers the last ones. Huang et al., ICLR 2025
(arXiv 2502.01385) define the scores; HanxunH/Detect-CLIP-Backdoor-Samples is the code that `published` equals.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bezoar import registry
from bezoar.data.blocks import blocks
from bezoar.data.randomness import sample_rows
from bezoar.errors import UserError
from bezoar.evaluation.neighbors import Index, nearest_neighbors
from bezoar.evaluation.scores import Scores

SMALLEST = 1e-6  # distances are not divided by less
BLOCK = 1 << 16  # records at a time
BATCH = (
    2048  # records that the published code compares with one another: 256 x 2 on each of four GPUs
)
KEPT = 2  # searches that are remembered


class Asked(Protocol):
    """The fields that every density detector has."""

    k: int
    pool: int
    rate: float
    texts: bool
    compat: bool
    seed: int


@dataclass(frozen=True)
class Neighbourhood:
    """What lies around each of B records; all float64.

    reach: (B,) kdist(x), the distance to the k-th neighbour. lid: (B,) local intrinsic dimension at x.
    reaches, lids: (B, k) the same of its k neighbours.
    """

    reach: Tensor
    lid: Tensor
    reaches: Tensor
    lids: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """log( kdist(x) / kdist(y) ) for the k neighbours y of each record x: (B, k)."""
        return self.reach[:, None].log() - self.reaches.log()


@dataclass(frozen=True)
class Density:
    """Local distances of N records to a pool of P of them, a record never its own neighbour: 8 k bytes a record.

    distance: float32 (N, k), ascending, and index: int32 (N, k), rows of the pool, both where the records lie.
    pooled: float64 (P, k), on the device, the pool's own distances to its other members. Where texts are in the pool it
    holds 2 P rows, images and then their captions, and neither of a record's two is a neighbour of either.
    dimension: D of the embedding.
    """

    distance: Tensor
    index: Tensor
    pooled: Tensor
    dimension: int

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
        """Of embeddings (N, D), which may lie in a file, against the `pool` of that size and seed, gathered once."""
        device, members = (
            torch.device(device or images.device),
            torch.as_tensor(sample_rows(ids, size, seed)),
        )
        p = len(members)
        rows = members.to(images.device)
        references = images[rows].to(device)
        own: Tensor | bool = True
        if texts is not None:
            references = torch.cat([references, texts[rows].to(device)])
            own = torch.stack([torch.arange(p), torch.arange(p, 2 * p)], 1).repeat(2, 1)
        found = nearest_neighbors(references, references, k, own)
        distance = torch.empty(len(images), k, device=images.device)
        index = torch.empty(len(images), k, dtype=torch.int32, device=images.device)
        distance[rows] = found.distance[:p].to(images.device)
        index[rows] = found.index[:p].to(images.device, torch.int32)
        others = np.ones(len(images), bool)
        others[members.numpy()] = False
        rest = torch.as_tensor(np.flatnonzero(others), device=images.device)
        if len(rest):
            search = Index(references, k, device=device)
            for part in rest.split(search.step):
                distance[part], near = search.search(images[part])
                index[part] = near.int()
        return Density(
            distance, index, found.distance.double().clamp(min=SMALLEST), images.shape[1]
        )

    @staticmethod
    def of(
        e: Any,
        k: int,
        size: int,
        seed: int,
        texts: bool = False,
        device: torch.device | str | None = None,
    ) -> Density:
        """`measure` of an Embedded; the same question about the same vectors is answered once."""
        key = (id(e.images), id(e.texts) if texts else 0, len(e.ids), k, size, seed, str(device))
        asked, density = _recent.get(key, (None, None))
        if density is None or asked is None or asked() is not e.images:
            density = Density.measure(
                e.images, e.ids, k, size, seed, e.texts if texts else None, device
            )
            _recent[key] = weakref.ref(e.images, lambda _: _recent.pop(key, None)), density
            while len(_recent) > KEPT:
                _recent.popitem(last=False)
        _recent.move_to_end(key)
        return density

    def around(self) -> Iterator[Neighbourhood]:
        """The records in order, a bounded number at a time."""
        reach, lid, device = self.pooled[:, -1], self._lid(self.pooled), self.pooled.device
        for rows in blocks(len(self.distance), BLOCK):
            r = self.distance[rows].to(device).double().clamp(min=SMALLEST)
            near = self.index[rows].to(device).long()
            yield Neighbourhood(r[:, -1], self._lid(r), reach[near], lid[near])

    def _lid(self, r: Tensor) -> Tensor:
        """Distances (B, k) -> local intrinsic dimension (B,), in (0, D].

        -k / sum over i < k of log(r_i / r_k + 1e-4) (maximum likelihood), cut at the dimension D of the embedding.
        """
        logs = (r[:, :-1] / r[:, -1:] + 1e-4).log().sum(1)
        return r.shape[1] / (-logs).clamp(min=r.shape[1] / self.dimension)


_recent: OrderedDict[tuple, tuple[weakref.ref, Density]] = OrderedDict()


def check(asked: Asked, least: int = 1) -> None:
    """Of a density detector's fields. Raises ValueError."""
    if asked.k < least or asked.pool < 0 or not 0 < asked.rate <= 1:
        raise ValueError(
            f"needs k >= {least}, pool >= 0, 0 < rate <= 1; got {asked.k}, {asked.pool}, {asked.rate}"
        )


def scores(
    asked: Asked, encoder: Any, source: Any, formula: Callable[[Neighbourhood], Tensor]
) -> Scores:
    """A formula over what is `around` each record, in the form that a density detector's fields ask for."""
    e = encoder.embed(source)
    if asked.texts and e.texts is None:
        name = registry.method_name(type(asked))
        raise UserError(
            f"detector {name!r} with texts=true needs captions; the scanned data or the encoder has none"
        )
    if asked.compat:
        around = published(e.images, e.texts if asked.texts else None, asked.k, encoder.device)
    else:
        size = asked.pool or pool_size(asked.k, asked.rate, len(e.ids))
        around = Density.of(e, asked.k, size, asked.seed, asked.texts, encoder.device).around()
    values = torch.cat([formula(part).float().cpu() for part in around])
    return Scores(e.ids, values.nan_to_num(1000.0, 1000.0, 0.0) if asked.compat else values)


def published(
    images: Tensor, texts: Tensor | None, k: int, device: torch.device | str, batch: int = BATCH
) -> Iterator[Neighbourhood]:
    """As HanxunH/Detect-CLIP-Backdoor-Samples (ff2399a) computes it, its faults included. Scores depend on the order.

    The references are the records of the same batch. A record's own image, and text, is struck out of its distances
    before they are sorted, but the columns are then looked up among all references: one off for images behind it, one
    or two off for texts. kdist(x) is r_{k+1}, and lid the mean of k logarithms over it; a reference counts itself as
    its nearest (and its own text or image as any other), so that its kdist is r_k, and one logarithm of its lid log 1e-4.
    Nothing is kept from zero or infinity; of that the scores make 1000 (NaN, +inf) and 0 (-inf). A last batch too small
    for k, where that code stops with an error, joins the one before.
    """
    ends = [*range(batch, len(images), batch), len(images)]
    kinds = 1 if texts is None else 2
    if len(ends) > 1 and kinds * (ends[-1] - ends[-2] - 1) < k + 1:
        del ends[-2]
    for start, end in zip([0, *ends], ends, strict=False):
        n = end - start
        references, own = images[start:end].to(device), torch.arange(n, device=device)[:, None]
        if texts is not None:
            references = torch.cat([references, texts[start:end].to(device)])
            own = torch.cat([own, own + n], 1)
        found = nearest_neighbors(references[:n], references, k + 1, own)
        d, j, i = found.distance.double(), found.index, own[:, :1]
        column = torch.where(j < n, j - (j > i).long(), j - 1 - (j - n > i).long())[:, :k]
        whole = nearest_neighbors(references, references, k, exclude_self=True).distance.double()
        whole = torch.cat([torch.zeros_like(whole[:, :1]), whole], 1)
        reach, lid = whole[:, -1], _published_lid(whole)
        yield Neighbourhood(d[:, -1], _published_lid(d), reach[column], lid[column])


def _published_lid(r: Tensor) -> Tensor:
    """Distances (B, k + 1) -> (B,)."""
    return (1 - r.shape[1]) / (r[:, :-1] / r[:, -1:] + 1e-4).log().sum(1)


def pool_size(k: int, rate: float, n: int) -> int:
    """How many references let a poison's k-th neighbour be clean: k / (2 rate), at least 2 k and at most n.

    Poisons of one backdoor are each other's neighbours. Where rate x pool exceeds k, their k-th neighbour is a poison
    too: they look denser than clean records and every density score inverts (AUROC 0.04 in place of 0.96). Half of that
    leaves room for chance. It holds for the largest group of poisons, so `rate` is a bound to plan for, not an estimate:
    a smaller rate loses little, a larger one inverts. A rate above 1/4 is out of reach, because the pool is at least 2 k.
    """
    return min(n, max(2 * k, round(k / (2 * rate))))
