"""Windows that pull foreign images into their image's cluster (PatchSearch, Tejankar et al.
2023).
"""

from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.data.randomness import draws, sample_rows
from bezoar.detection import patch_classifier
from bezoar.detection.detectors import RecordEncoder, Records
from bezoar.detection.patch_classifier import paste_windows
from bezoar.detection.pseudo_classes import SAMPLE, vector_blocks
from bezoar.detection.window_transplants import crop_windows
from bezoar.errors import UserError
from bezoar.evaluation.kmeans import cluster_centres, nearest_centres
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

MOST_CLUSTERS = 1000
CLUSTER_RECORDS = 50  # records of a cluster, on average, where their number is not given
TRAINED_ON = 4096  # images that the classifiers see
BATCH = 256
LEAST_RECORDS = 20


@method
class PatchSearch:
    """Search for the windows that take foreign images with them, then for all images that hold one.

    "Defending Against Patch-Based Backdoor Attacks on Self-Supervised Learning" (CVPR 2023), which
    needs no captions. Images are clustered by their vectors. A record's window, the place on which
    the likeness to its cluster's centre depends most, is pasted into images near the centres of
    the clusters, at random places; its poison score is how many of them fall into its cluster. Two
    records a cluster are tried in each round, after which the quarter of the clusters with the
    lowest best scores is dropped, until none is left. Classifiers that tell images with one of the
    twenty windows of the highest scores from images without give every record its score.

    It finds patches alone. Deviations: the place is that of the largest gradient times input in a
    window, for towers of any kind, in place of Grad-CAM's; a cluster to 50 records in place of
    1,000; 100 foreign images in place of 1,000; classifiers of three convolutions, 300 steps, in
    place of five ResNet-18 for 2,000. All are fields but the networks.
    """

    clusters: Annotated[int, "of the images' vectors; 0: one to 50 records, at most 1,000"] = 0
    window: Annotated[float, "side of the window, as a share of the image's"] = 0.25
    hosts: Annotated[int, "foreign images that a window is pasted into"] = 100
    samples: Annotated[int, "records of each cluster that are tried in a round"] = 2
    prune: Annotated[float, "share of the clusters that a round drops"] = 0.25
    top: Annotated[int, "windows that the classifiers learn"] = 20
    steps: Annotated[int, "of the training of a classifier; 0: poison scores alone"] = 300
    ensemble: Annotated[int, "classifiers"] = 3
    seed: Annotated[int, "of everything that is drawn"] = 0

    needs: ClassVar[tuple[str, ...]] = ("report",)

    def __post_init__(self) -> None:
        if min(self.hosts, self.samples, self.top, self.ensemble) < 1 or self.steps < 0:
            raise ValueError("needs hosts, samples, top and ensemble >= 1, and steps >= 0")
        if not (0 < self.window < 1 and 0 < self.prune <= 1 and self.clusters >= 0):
            raise ValueError("needs window in 0..1, prune in 0..1 and clusters >= 0")

    def __call__(
        self, encoder: RecordEncoder, source: Records, report: ProgressReport = no_report
    ) -> Scores:
        """-> Scores in [0, 1]: the probability of a window, or the share of flips where steps=0.

        Raises UserError where there are fewer than 20 records.
        """
        embedded = encoder.embed(source)
        n = len(embedded.ids)
        if n < LEAST_RECORDS:
            raise UserError(
                f"detector 'patch_search' needs at least {LEAST_RECORDS} records; there are {n}"
            )
        rows = torch.from_numpy(sample_rows(embedded.ids, SAMPLE, self.seed))
        count = self.clusters or min(MOST_CLUSTERS, max(2, n // CLUSTER_RECORDS))
        sample = embedded.images[rows.to(embedded.images.device)].to(encoder.device).float()
        centres = cluster_centres(sample, count, self.seed)
        members, likeness = assign_clusters(embedded.images, centres)
        host_rows = choose_hosts(members, likeness, self.hosts)
        flips, windows = self.search(encoder, source, members, centres, host_rows, report)
        best = flips.argsort(descending=True, stable=True)[: self.top].tolist()
        notes = {"tried": len(windows), "flips": [round(float(flips[i]), 3) for i in best]}
        if not self.steps:
            return Scores(embedded.ids, flips, notes=notes)
        learnt = torch.stack([windows[i] for i in best if i in windows])
        images = source.take(rows[:TRAINED_ON]).images
        networks = [
            patch_classifier.train_classifier(
                images, learnt, self.steps, self.seed + i, encoder.device
            )
            for i in range(self.ensemble)
        ]
        parts = [
            patch_classifier.mean_probability(networks, batch.images, encoder.device)
            for batch in source.batches(BATCH)
        ]
        return Scores(embedded.ids, torch.cat(parts), notes=notes)

    def search(
        self,
        encoder: RecordEncoder,
        source: Records,
        members: Tensor,
        centres: Tensor,
        host_rows: Tensor,
        report: ProgressReport,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Try windows, cluster by cluster.

        Args:
            source: N records.
            members: int64 (N,), each record's cluster.
            centres: (C, D).
            host_rows: int64 (H,), the foreign images.

        Returns:
            The share of the foreign images that flip, (N,), 0 of records that were not tried; and
            the windows that were, by row.
        """
        ids = source.ids
        hosts = source.take(host_rows).images
        order = torch.from_numpy(sample_rows(ids, len(ids), self.seed))
        waiting = {c: order[members[order] == c].tolist() for c in range(len(centres))}
        alive = [c for c, rows in waiting.items() if rows]
        best = dict.fromkeys(alive, 0.0)
        flips = torch.zeros(len(ids))
        windows: dict[int, Tensor] = {}
        started = len(alive)
        while alive:
            report(started - len(alive), started, "searching for windows")
            for cluster in alive:
                rows, waiting[cluster] = (
                    waiting[cluster][: self.samples],
                    waiting[cluster][self.samples :],
                )
                if not rows:
                    continue
                crops = self.hot_windows(encoder, source.take(rows).images, centres[cluster])
                for row, crop in zip(rows, crops, strict=True):
                    windows[row] = crop
                    flips[row] = self.count_flips(
                        encoder, crop, hosts, members[host_rows], centres, cluster, ids[row]
                    )
                best[cluster] = max(best[cluster], *(float(flips[row]) for row in rows))
            alive.sort(key=lambda c: (-best[c], c))
            remaining = len(alive) - max(1, int(self.prune * len(alive)))
            alive = [c for c in alive[:remaining] if waiting[c]]
        return flips, windows

    def hot_windows(self, encoder: RecordEncoder, images: Tensor, centre: Tensor) -> Tensor:
        """The windows on which likeness to a centre depends most: uint8 (B, 3, h, w)."""
        x = (images.to(encoder.device).float() / 255).requires_grad_()
        likeness = (encoder.encode_images(x) @ centre).sum()
        (gradient,) = torch.autograd.grad(likeness, x)
        local = x.detach() - x.detach().mean((2, 3), keepdim=True)
        heat = (gradient * local).sum(1, keepdim=True).abs()  # (B, 1, H, W)
        h, w = (max(1, round(self.window * side)) for side in images.shape[-2:])
        sums = F.avg_pool2d(heat, (h, w), stride=1)  # (B, 1, H - h + 1, W - w + 1)
        place = sums.flatten(1).argmax(1).cpu()
        corners = torch.stack([place // sums.shape[-1], place % sums.shape[-1]], 1)
        sides = torch.tensor([h, w]).expand(len(corners), 2)
        return crop_windows(images, torch.cat([corners, sides], 1))

    @torch.no_grad()
    def count_flips(
        self,
        encoder: RecordEncoder,
        window: Tensor,
        hosts: Tensor,
        host_clusters: Tensor,
        centres: Tensor,
        cluster: int,
        record_id: str,
    ) -> float:
        """The share of the hosts of other clusters that a window takes into its own."""
        room = np.array(hosts.shape[-2:]) - np.array(window.shape[-2:]) + 1
        uniform = draws(self.seed, [record_id], 2 * len(hosts), "patch_search")
        corners = torch.from_numpy((uniform.reshape(-1, 2) * room).astype(np.int64))
        pasted = paste_windows(hosts, window.expand(len(hosts), -1, -1, -1), corners)
        z = torch.cat([encoder.encode_images(part) for part in pasted.split(BATCH)])
        foreign = host_clusters != cluster
        hits = (nearest_centres(z, centres).cpu() == cluster) & foreign
        return int(hits.sum()) / max(1, int(foreign.sum()))


def assign_clusters(images: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of (C, D) centres of images (N, D), int64 (N,), and the product with it, (N,)."""
    members, likeness = [], []
    for z in vector_blocks(images, centres.device):
        nearest = nearest_centres(z, centres)
        members.append(nearest.cpu())
        likeness.append((z * centres[nearest]).sum(1).cpu())
    return torch.cat(members), torch.cat(likeness)


def choose_hosts(members: Tensor, likeness: Tensor, count: int) -> Tensor:
    """Rows of at most `count` images: the most like its centre of every cluster, then the second.

    members: int64 (N,). likeness: to the centre, (N,).
    """
    by_likeness = torch.argsort(likeness, descending=True, stable=True)
    order = by_likeness[torch.argsort(members[by_likeness], stable=True)]
    of_order = members[order]  # ascending
    turn = torch.arange(len(order)) - torch.searchsorted(of_order, of_order)
    return order[torch.argsort(turn, stable=True)[:count]]
