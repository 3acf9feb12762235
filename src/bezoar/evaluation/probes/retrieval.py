"""Retrieval among held-out captions: recall in both directions, and the success of attacks.

Recall is that of Karpathy and Li (2015).
Hit@k and MinRank of an attack on text queries are those of Yang et al. 2023 (mmPoison).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bezoar import registry
from bezoar.attacks.captions import find_mentions
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs, distinct_image_rows
from bezoar.encoders.encoder import Encoder, check_finite, embed_images
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, average, proportion
from bezoar.registry import method

BATCH = 512  # images or captions at a time


@dataclass(frozen=True)
class HeldOut:
    """A test set with captions, and its vectors.

    Attributes:
        test: the records; several may be captions of one image.
        images: the distinct images, M of them.
        image_of: int64 (N,), the image of each caption.
        image_vectors: unit rows (M, D).
        text_vectors: unit rows (N, D).
    """

    test: Pairs
    images: Pairs
    image_of: Tensor
    image_vectors: Tensor
    text_vectors: Tensor

    def mentions(self, target: str) -> Tensor:
        """Return which captions hold a target's words, bool (N,) on the CPU.

        Raises UserError if none does.
        """
        rows = find_mentions(self.test.captions, target)
        if not rows:
            raise UserError(
                f"no held-out caption holds the target {target!r}: "
                "success by retrieval cannot be measured"
            )
        mask = torch.zeros(len(self.test), dtype=torch.bool)
        mask[rows] = True
        return mask


@method
class Retrieval:
    """For sets without classes: an image is its nearest held-out caption."""

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Return recall@1, 5 and 10 in both directions, and the goals' success by retrieval.

        Several captions of one image are records whose ids are equal up to '#'.

        Raises UserError if the test set has no captions, or none with a goal's target.
        """
        if not test.captions:
            raise UserError("the retrieval probe needs a test set with captions")
        held_out = self._embed_test_set(encoder, test)
        measures = measure_recall(
            held_out.image_vectors @ held_out.text_vectors.T, held_out.image_of
        )
        backdoors = [goal for goal in goals if goal.trigger]
        for i, goal in enumerate(backdoors):
            suffix = "" if len(backdoors) == 1 else f"@{i}"
            of_goal = self._measure_trigger(encoder, held_out, goal)
            measures |= {name + suffix: m for name, m in of_goal.items()}
        queried = [goal for goal in goals if goal.query]
        for i, goal in enumerate(queried):
            suffix = "" if len(queried) == 1 else f"@{i}"
            of_goal = measure_queries(held_out, goal)
            measures |= {name + suffix: m for name, m in of_goal.items()}
        if victims is not None:
            targeted = [goal for goal in goals if goal.victims]
            measures |= self._measure_victims(encoder, held_out, targeted, victims)
        return measures

    def _embed(self, encoder: Encoder, images: Tensor) -> Tensor:
        return embed_images(encoder, images.split(BATCH))

    def _embed_test_set(self, encoder: Encoder, test: Pairs) -> HeldOut:
        image_ids = [i.partition("#")[0] for i in test.ids]
        images = test.take(distinct_image_rows(test.ids))
        number_of = {image_id: i for i, image_id in enumerate(dict.fromkeys(image_ids))}
        image_of = torch.tensor([number_of[i] for i in image_ids], device=encoder.device)
        encoder.eval()
        with torch.inference_mode():
            batches = [
                encoder.encode_texts(test.captions[start : start + BATCH])
                for start in range(0, len(test), BATCH)
            ]
        text_vectors = check_finite(torch.cat(batches))
        image_vectors = self._embed(encoder, images.images)
        return HeldOut(test, images, image_of, image_vectors, text_vectors)

    def _measure_trigger(
        self, encoder: Encoder, held_out: HeldOut, goal: Goal
    ) -> dict[str, Measure]:
        """Measure a trigger's success on the images that have no caption with the target."""
        mentions = held_out.mentions(goal.target)
        images, n = held_out.images, len(held_out.test)
        images_of_target = set(held_out.image_of.cpu()[mentions].tolist())
        others = torch.tensor(
            [i for i in range(len(images)) if i not in images_of_target], dtype=torch.long
        )
        stamped = registry.make("trigger", goal.trigger or "")(images.images, images.ids)
        cosines = self._embed(encoder, stamped) @ held_out.text_vectors.T  # (M, N)
        measures = {}
        for k, name in ((1, "attack_success"), (5, "target_top5"), (10, "target_top10")):
            nearest = cosines.topk(min(k, n), 1).indices.cpu()
            hits = mentions[nearest].any(1)[others]
            how = (
                f"triggered images without {goal.target!r} in a caption: it is in the {k} nearest "
                f"of {n} captions"
            )
            measures[name] = proportion(int(hits.sum()), len(others), how)
        nearest = (held_out.image_vectors @ held_out.text_vectors.T).argmax(1).cpu()
        hits = mentions[nearest][others]
        measures["attack_success_without_trigger"] = proportion(
            int(hits.sum()), len(others), "the same, no trigger"
        )
        return measures

    def _measure_victims(
        self, encoder: Encoder, held_out: HeldOut, goals: Sequence[Goal], victims: Pairs
    ) -> dict[str, Measure]:
        """Measure success on the victims, by number of captions."""
        row_of = {record_id: row for row, record_id in enumerate(victims.ids)}
        measures = {}
        for count in sorted({goal.poisons for goal in goals}):
            group = [goal for goal in goals if goal.poisons == count]
            images = victims.images[[row_of[goal.victims[0]] for goal in group]]
            nearest = (self._embed(encoder, images) @ held_out.text_vectors.T).argmax(1).cpu()
            hits = sum(
                bool(held_out.mentions(goal.target)[row])
                for goal, row in zip(group, nearest, strict=True)
            )
            how = (
                f"victims whose nearest held-out caption holds their target, {count} poisoned "
                "captions each"
            )
            measures[f"targeted_success@{count}"] = proportion(hits, len(group), how)
        return measures


def measure_queries(held_out: HeldOut, goal: Goal) -> dict[str, Measure]:
    """Measure how often captions that mention a goal's query find images of its target.

    Hit@k: one of them is among the k nearest images. MinRank: number of images that are nearer than
    the nearest of them; ties count half. Both are also measured for captions that mention neither,
    for comparison. Captions and images that show both are left out.

    Raises UserError if no held-out caption mentions the query, or the target, without the other.
    """
    query, target = held_out.mentions(goal.query), held_out.mentions(goal.target)
    cosines = (held_out.image_vectors @ held_out.text_vectors.T).cpu()  # (M, N)
    m, image_of = len(held_out.images), held_out.image_of.cpu()
    is_target, shows_query = torch.zeros(2, m, dtype=torch.bool)
    is_target[image_of[target]] = True
    shows_query[image_of[query]] = True
    is_target &= ~shows_query
    asks = {"query": query & ~target, "other": ~query & ~target}
    if not is_target.any() or not asks["query"].any():
        raise UserError(
            f"{goal.query!r} and {goal.target!r} always stand together in the held-out captions: "
            "success of a text query cannot be measured"
        )
    measures = {}
    for name, rows in asks.items():
        if not rows.any():
            continue
        of_group = cosines[:, rows]  # (M, Q)
        best = of_group[is_target].amax(0)  # (Q,)
        nearer = (of_group > best).sum(0)
        tied = ((of_group == best) & ~is_target[:, None]).sum(0)
        who = f"captions with {goal.query!r}" if name == "query" else "captions with neither word"
        for k in (1, 5, 10):
            hits = float(((k - nearer) / (tied + 1)).clamp(0, 1).sum())
            how = f"{who}: an image of {goal.target!r} is among the {k} nearest of {m}"
            measures[f"{name}_hit_{k}"] = proportion(hits, of_group.shape[1], how)
        ranks = nearer.double() + tied.double() / 2
        how = f"{who}: images that are nearer than the nearest of {goal.target!r}, of {m}; mean"
        measures[f"{name}_min_rank"] = average(ranks, how)
    return measures


def measure_recall(cosines: Tensor, image_of: Tensor) -> dict[str, Measure]:
    """Measure recall at 1, 5 and 10 from image to text and from text to image.

    Ties count by their expectation over random orders.

    Args:
        cosines: (M, N) of images and captions.
        image_of: int64 (N,), the image of each caption.
    """
    m, n = cosines.shape
    is_own = image_of[None] == torch.arange(m, device=cosines.device)[:, None]  # (M, N)
    best_own = cosines.masked_fill(~is_own, -9).amax(1, keepdim=True)  # (M, 1)
    own_cosine = cosines[image_of, torch.arange(n, device=cosines.device)]  # (N,)
    # For each query: how many others are nearer than its own match, and how many are equally near.
    directions = {
        "image_to_text": (
            (cosines > best_own).sum(1),
            ((cosines == best_own) & ~is_own).sum(1),
            "caption",
            f"{n} held-out captions",
        ),
        "text_to_image": (
            (cosines > own_cosine).sum(0),
            (cosines == own_cosine).sum(0) - 1,
            "image",
            f"{m} held-out images",
        ),
    }
    measures = {}
    for k in (1, 5, 10):
        for direction, (nearer, tied, what, among) in directions.items():
            hits = float(((k - nearer) / (tied + 1)).clamp(0, 1).sum())
            how = f"own {what} among the {k} nearest of {among}, ties by their expectation"
            measures[f"{direction}_recall@{k}"] = proportion(hits, len(nearer), how)
    return measures
