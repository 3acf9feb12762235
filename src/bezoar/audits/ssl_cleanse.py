"""SSL-Cleanse: Neural Cleanse without classes; clusters of clean vectors stand for them (Zheng et al., ECCV 2024)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar import inversion, pseudo_classes
from bezoar.encoder import Encoder
from bezoar.errors import UserError
from bezoar.heads import Report, silent
from bezoar.inversion import Aim, Descent
from bezoar.pairs import Pairs
from bezoar.registry import method
from bezoar.scores import proportion
from bezoar.verdict import Verdict

EACH, MOST = 16, 40  # clean images a cluster, and clusters, where their number is not given


@method
class SslCleanse:
    """Value as in `cleanse`, over clusters: how far the easiest cluster's mask lies below the median one's.

    k-means on the unit vectors (seeded); k as given, else one cluster for 16 clean images, but at least 10, which the
    index needs, and at most 40. For each cluster lowers the mean squared distance of stamped images to the cluster's vectors
    (2 - 2 z . mean, of unit vectors) + weight |m|_1, all clusters in one batch; a stamped image succeeded where most of its
    nearest clean vectors are of the cluster. The published penalty is mean(m p), under which a black trigger would be free,
    and so would have no size to be an outlier by; here it is the mask's.

    Published (the repository's): k by the knee of the inertia (12 on ImageNet-100), lr 0.1, weight up to 0.1, times or over
    1.5 with a patience of 5, success 0.98 to 0.99 by 5 neighbours.
    """

    clusters: Annotated[int, "k of k-means; 0: by the number of clean images"] = 0
    neighbors: Annotated[int, "clean vectors that say which cluster a stamped image is of"] = 5
    steps: Annotated[int, "of Adam at most"] = 120
    batch: Annotated[int, "clean images a step, stamped by every cluster's trigger"] = 8
    goal: Annotated[float, "share of a step's images that the cluster's trigger is to move into it"] = 0.98
    lr: Annotated[float, "learning rate"] = 0.1
    weight: Annotated[float, "of the mask's size in pixels at the start"] = 3e-3
    up: Annotated[float, "the weight is multiplied by this after `patience` successes"] = 1.5
    down: Annotated[float, "... and divided by this after as many failures"] = 1.5**1.5
    patience: Annotated[int, "successes or failures in a row that change the weight"] = 3
    wait: Annotated[int, "steps without progress after which a cluster is done"] = 25
    scale: Annotated[Literal["log", "linear"], "of the norms that the value compares"] = "log"

    needs: ClassVar[tuple[str, ...]] = ("report",)

    def __post_init__(self) -> None:
        if self.clusters < 0 or self.clusters == 1 or self.neighbors < 1:
            raise ValueError("needs at least 2 clusters (0: by the number of images) and 1 neighbour")
        self.descent()

    def descent(self) -> Descent:
        """The search for each cluster's trigger."""
        return Descent(
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

    def __call__(self, encoder: Encoder, clean: Pairs, seed: int, report: Report = silent) -> Verdict:
        """clean: labels and classes are not read. Raises UserError where images do not make clusters, or NaN."""
        inversion.enough(clean)
        count = self.clusters or min(MOST, max(inversion.FEWEST, len(clean) // EACH))
        if len(clean) < 2 * count:
            raise UserError(f"{count} clusters need at least {2 * count} clean images; there are {len(clean)}")
        with inversion.resting(encoder) as see:
            z = inversion.vectors(see, clean.images)
            centres = pseudo_classes.clusters(z, count, seed)
            member = (2 * z @ centres.T - centres.square().sum(1)).argmax(1)
            if len(centres) < 2 or member.unique().numel() < len(centres):
                raise UserError(f"the vectors of {len(clean)} clean images do not fall into {count} clusters; ask for fewer")
            aim = into(z, member, self.neighbors)
            found = inversion.invert(see, clean, aim, len(centres), self.descent(), seed, report)
        names = [f"cluster {i}" for i in range(len(centres))]
        value, evidence, notes = inversion.outlier(found, names, "cluster", self.scale, len(clean))
        first = int(found.norms.argmin())
        how = f"clean images that the trigger of {names[first]} moves into it, by {self.neighbors} neighbours"
        evidence["success"] = proportion(round(float(found.success[first]) * len(clean)), len(clean), how)
        medoids = (z @ centres.T).argmax(0).tolist()
        shown = {name: clean.ids[i] for name, i in zip(names, medoids, strict=True)}
        limits = [*inversion.limits(clean), *notes.pop("limits")]
        return Verdict(value, evidence, found.inversions(names), {"nearest_to_centre": shown, **notes, "limits": limits})


def into(known: Tensor, member: Tensor, neighbors: int) -> Aim:
    """The aim of inversion c: images among the members of cluster c. known: unit rows (N, D); member: int64 (N,)."""
    share = F.one_hot(member).to(known)
    means = share.T @ known / share.sum(0)[:, None]
    k = min(neighbors, len(known))

    def aim(z: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        loss = 2 - 2 * (z.mean(1) * means[which]).sum(1)
        near = (z.detach() @ known.T).topk(k, 2).indices
        votes = F.one_hot(member[near], share.shape[1]).sum(2)
        return loss, (votes.argmax(2) == which[:, None]).to(torch.float32).mean(1)

    return aim
