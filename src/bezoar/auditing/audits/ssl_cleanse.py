"""SSL-Cleanse: Neural Cleanse with clusters in place of classes (Zheng et al., ECCV 2024)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.auditing import trigger_inversion
from bezoar.auditing.norm_outliers import MIN_NORMS, OutlierStatistic, outlier_verdict
from bezoar.auditing.trigger_inversion import TowerCost, TriggerObjective
from bezoar.auditing.trigger_search import InversionRecipe
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import kmeans
from bezoar.evaluation.verdict import Verdict
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

IMAGES_PER_CLUSTER = 16  # where the number of clusters is not given
MAX_CLUSTERS = 40  # where the number of clusters is not given
SHARPNESS = 4.0  # of the softmax over clusters

ONE_START = (
    "each cluster is searched for from one start: with another seed another cluster may come out "
    "least, and the cluster that it names need not be a backdoor's"
)

Pull = Literal["contrast", "distance"]


@method
class SslCleanse:
    """Value = log(median |m|_1 / least |m|_1) over the clusters' masks m, as in `cleanse`.

    Clusters are those of k-means on the unit vectors (seeded). k is as given, else one cluster for
    16 clean images, but at least 10, which an anomaly index needs, and at most 40. For each cluster
    lowers a loss + weight |m|_1, all clusters in one batch. A stamped image counts as a success
    where most of its nearest clean vectors are of the cluster.

    pull=distance is the published loss, the squared distance of stamped images to the cluster's
    vectors (2 - 2 z . mean): the whole image has to look like the cluster, and some harmless
    clusters are far away. pull=contrast only asks that the image be nearer to the cluster than to
    others: it is the cross-entropy of the cluster under a softmax of -4 d^2 / s, where d is the
    distance to a centre and s the mean squared distance to the own centre. The published penalty,
    mean(m p), would let a black trigger be free, so that its size says nothing; here it is the
    mask's.

    Published (the repository's): k by the knee of the inertia (12 on ImageNet-100), lr 0.1, weight
    up to 0.1, times or over 1.5 with a patience of 5, success 0.98 to 0.99 by 5 neighbours.
    """

    clusters: Annotated[int, "k of k-means; 0: by the number of clean images"] = 0
    neighbors: Annotated[int, "clean vectors that vote on the cluster of a stamped image"] = 5
    steps: Annotated[int, "steps of Adam at most"] = 120
    batch: Annotated[int, "clean images a step, stamped by the trigger of every cluster"] = 8
    goal: Annotated[
        float, "share of a step's images that the cluster's trigger is to move into it"
    ] = 0.98
    lr: Annotated[float, "learning rate"] = 0.1
    weight: Annotated[float, "weight of the mask's size in pixels at the start"] = 3e-3
    up: Annotated[float, "factor on the weight after `patience` successes in a row"] = 1.5
    down: Annotated[float, "divisor of the weight after `patience` failures in a row"] = 1.5**1.5
    patience: Annotated[int, "successes or failures in a row that change the weight"] = 3
    wait: Annotated[int, "steps without progress after which the search for a cluster ends"] = 25
    pull: Annotated[Pull, "loss: nearer to the cluster than to others, or near it"] = "contrast"
    score: Annotated[
        OutlierStatistic,
        "the value: log(median / least), or the anomaly index of norms or of their logarithms",
    ] = "log_ratio"

    needs: ClassVar[tuple[str, ...]] = ("report",)

    def __post_init__(self) -> None:
        if self.clusters < 0 or self.clusters == 1 or self.neighbors < 1:
            raise ValueError(
                "needs at least 2 clusters (0: by the number of images) and 1 neighbour"
            )
        self.recipe()

    def recipe(self) -> InversionRecipe:
        """The search for each cluster's trigger. Raises ValueError for fields out of range."""
        return InversionRecipe.from_fields(self, lr=(self.lr,))

    def image_passes(self, images: int, classes: int, cost: TowerCost) -> int:
        """Images that go through the encoder, at most."""
        return self.count_clusters(images) * (self.recipe().image_passes() + images)

    def count_clusters(self, images: int) -> int:
        """k of k-means: as given, else by the number of images."""
        by_images = min(MAX_CLUSTERS, max(MIN_NORMS, images // IMAGES_PER_CLUSTER))
        return self.clusters or by_images

    def __call__(
        self, encoder: Encoder, clean: Pairs, seed: int, report: ProgressReport = no_report
    ) -> Verdict:
        """Audit an encoder; labels and classes are not read.

        Raises:
            UserError: where the images do not make clusters, or for NaN.
        """
        trigger_inversion.check_image_count(clean)
        count = self.count_clusters(len(clean))
        if len(clean) < 2 * count:
            raise UserError(
                f"{count} clusters need at least {2 * count} clean images; there are {len(clean)}"
            )
        with trigger_inversion.freeze_tower(encoder) as tower:
            z = trigger_inversion.embed_clean(tower, clean.images)  # (N, D)
            centres = kmeans.cluster_centres(z, count, seed)  # (C, D)
            members = (2 * z @ centres.T - centres.square().sum(1)).argmax(1)  # (N,)
            if len(centres) < 2 or len(set(members.tolist())) < len(centres):
                raise UserError(
                    f"the vectors of {len(clean)} clean images do not fall into {count} clusters; "
                    "ask for fewer"
                )
            objective = reach_cluster(z, centres, members, self.neighbors, self.pull)
            triggers = trigger_inversion.invert_triggers(
                tower, clean, objective, torch.arange(len(centres)), self.recipe(), seed, report
            )
        names = [f"cluster {i}" for i in range(len(centres))]
        medoids = (z @ centres.T).argmax(0).tolist()
        nearest = {name: clean.ids[row] for name, row in zip(names, medoids, strict=True)}
        notes = {"nearest_to_centre": nearest}
        verdict = outlier_verdict(triggers, names, "cluster", self.score, clean, notes)
        verdict.notes["limits"].append(ONE_START)
        return verdict


def reach_cluster(
    clean_z: Tensor, centres: Tensor, members: Tensor, neighbors: int, pull: Pull
) -> TriggerObjective:
    """The objective of inversion c: stamped images lie among the members of cluster c.

    Args:
        clean_z: unit rows (N, D), the clean vectors.
        centres: (C, D), the means of the clusters.
        members: int64 (N,), the cluster of each clean vector.
        neighbors: clean vectors that vote on the cluster of a stamped image.
        pull: the loss, see `SslCleanse`.
    """
    k = min(neighbors, len(clean_z))
    spread = (clean_z - centres[members]).square().sum(1).mean().clamp(min=1e-6)

    def objective(z: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        g, n, _ = z.shape
        if pull == "distance":
            loss = 2 - 2 * (z.mean(1) * centres[indices]).sum(1)
        else:
            logits = SHARPNESS / spread * (2 * z @ centres.T - centres.square().sum(1))  # (g, n, C)
            target = indices[:, None, None].expand(g, n, 1)
            loss = -logits.log_softmax(2).gather(2, target).mean((1, 2))
        nearest = (z.detach() @ clean_z.T).topk(k, 2).indices  # (g, n, k)
        votes = F.one_hot(members[nearest], len(centres)).sum(2)  # (g, n, C)
        return loss, (votes.argmax(2) == indices[:, None]).to(z.dtype).mean(1)

    return objective
