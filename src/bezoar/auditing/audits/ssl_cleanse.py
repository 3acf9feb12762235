"""SSL-Cleanse: Neural Cleanse without classes; clusters of clean vectors stand for them (Zheng et al., ECCV 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from bezoar.auditing import trigger_inversion
from bezoar.auditing.trigger_inversion import InversionRecipe, OutlierStatistic, TriggerObjective
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import kmeans
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.evaluation.verdict import Verdict
from bezoar.registry import method

EACH, MOST = 16, 40  # clean images a cluster, and clusters, where their number is not given
SHARP = 4.0  # of the softmax over clusters


@method
class SslCleanse:
    """Value = log(median |m|_1 / least |m|_1) over the clusters' masks m, as in `cleanse`.

    k-means on the unit vectors (seeded); k as given, else one cluster for 16 clean images, but at least 10, which an
    anomaly index needs, and at most 40. For each cluster lowers a loss + weight |m|_1, all clusters in one batch; a stamped
    image succeeded where most of its nearest clean vectors are of the cluster.

    pull=distance is the published loss, the squared distance of stamped images to the cluster's vectors (2 - 2 z . mean):
    the whole image has to look like the cluster, and of harmless clusters some are far. pull=contrast, the cross-entropy of
    the cluster under a softmax of -4 |z - centre|^2 / (mean squared distance to the own centre), has it nearer there than
    elsewhere alone. The published penalty, mean(m p), would let a black trigger be free, so that its size says nothing;
    here it is the mask's.

    Published (the repository's): k by the knee of the inertia (12 on ImageNet-100), lr 0.1, weight up to 0.1, times or over
    1.5 with a patience of 5, success 0.98 to 0.99 by 5 neighbours.
    """

    clusters: Annotated[int, "k of k-means; 0: by the number of clean images"] = 0
    neighbors: Annotated[int, "clean vectors that say which cluster a stamped image is of"] = 5
    steps: Annotated[int, "of Adam at most"] = 120
    batch: Annotated[int, "clean images a step, stamped by every cluster's trigger"] = 8
    goal: Annotated[
        float, "share of a step's images that the cluster's trigger is to move into it"
    ] = 0.98
    lr: Annotated[float, "learning rate"] = 0.1
    weight: Annotated[float, "of the mask's size in pixels at the start"] = 3e-3
    up: Annotated[float, "the weight is multiplied by this after `patience` successes"] = 1.5
    down: Annotated[float, "... and divided by this after as many failures"] = 1.5**1.5
    patience: Annotated[int, "successes or failures in a row that change the weight"] = 3
    wait: Annotated[int, "steps without progress after which a cluster is done"] = 25
    pull: Annotated[
        Literal["contrast", "distance"], "loss: nearer to the cluster than to others, or near it"
    ] = "contrast"
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
        self.descent()

    def descent(self) -> InversionRecipe:
        """The search for each cluster's trigger."""
        return InversionRecipe(
            self.steps,
            self.batch,
            (self.lr,),
            weight=self.weight,
            up=self.up,
            down=self.down,
            patience=self.patience,
            goal=self.goal,
            wait=self.wait,
        )

    def __call__(
        self, encoder: Encoder, clean: Pairs, seed: int, report: ProgressReport = no_report
    ) -> Verdict:
        """clean: labels and classes are not read. Raises UserError where images do not make clusters, or NaN."""
        trigger_inversion.check_image_count(clean)
        count = self.clusters or min(MOST, max(trigger_inversion.MIN_NORMS, len(clean) // EACH))
        if len(clean) < 2 * count:
            raise UserError(
                f"{count} clusters need at least {2 * count} clean images; there are {len(clean)}"
            )
        with trigger_inversion.freeze_tower(encoder) as see:
            z = trigger_inversion.embed_clean(see, clean.images)
            centres = kmeans.cluster_centres(z, count, seed)
            member = (2 * z @ centres.T - centres.square().sum(1)).argmax(1)
            if len(centres) < 2 or member.unique().numel() < len(centres):
                raise UserError(
                    f"the vectors of {len(clean)} clean images do not fall into {count} clusters; ask for fewer"
                )
            aim = into(z, centres, member, self.neighbors, self.pull)
            found = trigger_inversion.invert_triggers(
                see, clean, aim, len(centres), self.descent(), seed, report
            )
        names = [f"cluster {i}" for i in range(len(centres))]
        verdict = trigger_inversion.outlier_verdict(found, names, "cluster", self.score, len(clean))
        medoids = (z @ centres.T).argmax(0).tolist()
        shown = {name: clean.ids[i] for name, i in zip(names, medoids, strict=True)}
        limits = [*trigger_inversion.inversion_limits(clean), *verdict.notes["limits"]]
        return replace(
            verdict, notes={"nearest_to_centre": shown, **verdict.notes, "limits": limits}
        )


def into(
    known: Tensor, centres: Tensor, member: Tensor, neighbors: int, pull: str
) -> TriggerObjective:
    """The aim of inversion c: images among the members of cluster c.

    known: unit rows (N, D); centres: (C, D), their clusters' means; member: int64 (N,), the cluster of each.
    """
    k, spread = (
        min(neighbors, len(known)),
        (known - centres[member]).square().sum(1).mean().clamp(min=1e-6),
    )

    def aim(z: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        if pull == "distance":
            loss = 2 - 2 * (z.mean(1) * centres[which]).sum(1)
        else:
            near = SHARP / spread * (2 * z @ centres.T - centres.square().sum(1))
            loss = (
                -near.log_softmax(2)
                .gather(2, which[:, None, None].expand(*z.shape[:2], 1))
                .mean((1, 2))
            )
        around = (z.detach() @ known.T).topk(k, 2).indices
        votes = F.one_hot(member[around], len(centres)).sum(2)
        return loss, (votes.argmax(2) == which[:, None]).to(z.dtype).mean(1)

    return aim
