"""Retrieval among held-out captions: recall both ways, and how often an attack puts the target first (Karpathy & Li 2015)."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from bezoar import registry
from bezoar.attacks.captions import find_mentions
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation.scores import Measure, proportion
from bezoar.registry import method


@method
class Retrieval:
    """For sets without classes: an image is 'read as the target' when the nearest held-out caption holds its words."""

    batch: Annotated[int, "images at a time"] = 512

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """recall@1, 5, 10 from image to text and text to image; attack success by retrieval of the target.

        Several captions of one image are records whose ids share what stands before '#'. Raises UserError without captions.
        """
        if not test.captions:
            raise UserError("the retrieval probe needs a test set with captions")
        owners = [i.partition("#")[0] for i in test.ids]
        first = {k: r for r, k in reversed(list(enumerate(owners)))}
        images = test.take(sorted(first.values()))
        owner = {k.partition("#")[0]: r for r, k in enumerate(images.ids)}
        belongs = torch.tensor([owner[k] for k in owners], device=encoder.device)
        with torch.inference_mode():
            encoder.eval()
            texts = _finite(
                torch.cat(
                    [
                        encoder.encode_texts(test.captions[i : i + 512])
                        for i in range(0, len(test), 512)
                    ]
                )
            )
            z = self._embed(encoder, images.images)
            out = self._recall(z @ texts.T, belongs)
            for name, goal in _named([g for g in goals if g.trigger], "@"):
                out |= {
                    k + name: m
                    for k, m in self._backdoor(
                        encoder, images, test, texts, belongs, z, goal
                    ).items()
                }
            if victims is not None:
                out |= self._targeted(
                    encoder, test, texts, [g for g in goals if g.victims], victims
                )
        return out

    def _embed(self, encoder: Encoder, images: Tensor) -> Tensor:
        return _finite(torch.cat([encoder.encode_images(x) for x in images.split(self.batch)]))

    @staticmethod
    def _recall(cosines: Tensor, belongs: Tensor) -> dict[str, Measure]:
        """cosines: (images, captions). belongs: int64 (captions,), whose image a caption's is."""
        n, m = cosines.shape
        mine = belongs[None] == torch.arange(n, device=cosines.device)[:, None]
        best = cosines.masked_fill(~mine, -9).amax(1, keepdim=True)
        own = cosines[belongs, torch.arange(m, device=cosines.device)]
        found = {
            "image_to_text": (
                (cosines > best).sum(1),
                ((cosines == best) & ~mine).sum(1),
                f"{m} held-out captions",
            ),
            "text_to_image": (
                (cosines > own).sum(0),
                (cosines == own).sum(0) - 1,
                f"{n} held-out images",
            ),
        }
        out = {}
        for k in (1, 5, 10):
            for name, (above, beside, of) in found.items():
                what = "caption" if name == "image_to_text" else "image"
                hits = float(((k - above) / (beside + 1)).clamp(0, 1).sum())
                how = f"own {what} among the {k} nearest of {of}, ties by their expectation"
                out[f"{name}_recall@{k}"] = proportion(hits, len(above), how)
        return out

    def _backdoor(
        self,
        encoder: Encoder,
        images: Pairs,
        test: Pairs,
        texts: Tensor,
        belongs: Tensor,
        clean: Tensor,
        goal: Goal,
    ) -> dict[str, Measure]:
        assert goal.trigger
        holds = _holding(test, goal.target)
        own = set(belongs.cpu()[holds].tolist())
        others = torch.tensor([i for i in range(len(images)) if i not in own])
        stamped = registry.make("trigger", goal.trigger)(images.images, images.ids)
        moved = self._embed(encoder, stamped)
        out = {}
        for k, name in ((1, "attack_success"), (5, "target_top5"), (10, "target_top10")):
            hit = holds[(moved @ texts.T).topk(min(k, len(test)), 1).indices.cpu()].any(1)[others]
            how = f"triggered images without {goal.target!r} in a caption: it is in the {k} nearest of {len(test)} captions"
            out[name] = proportion(int(hit.sum()), len(others), how)
        hit = holds[(clean @ texts.T).argmax(1).cpu()][others]
        out["attack_success_without_trigger"] = proportion(
            int(hit.sum()), len(others), "the same, no trigger"
        )
        return out

    def _targeted(
        self, encoder: Encoder, test: Pairs, texts: Tensor, goals: Sequence[Goal], victims: Pairs
    ) -> dict[str, Measure]:
        row, out = {k: i for i, k in enumerate(victims.ids)}, {}
        for count in sorted({g.poisons for g in goals}):
            group = [g for g in goals if g.poisons == count]
            near = (
                (self._embed(encoder, victims.images[[row[g.victims[0]] for g in group]]) @ texts.T)
                .argmax(1)
                .cpu()
            )
            hits = sum(bool(_holding(test, g.target)[near[i]]) for i, g in enumerate(group))
            how = f"victims whose nearest held-out caption holds their target, {count} poisoned captions each"
            out[f"targeted_success@{count}"] = proportion(hits, len(group), how)
        return out


def _finite(z: Tensor) -> Tensor:
    if not torch.isfinite(z).all():
        raise UserError(
            "the encoder gives NaN or infinite vectors; its weights or its input size are wrong"
        )
    return z


def _holding(test: Pairs, target: str) -> Tensor:
    rows = find_mentions(test.captions, target)
    if not rows:
        raise UserError(
            f"no held-out caption holds the target {target!r}: success by retrieval cannot be measured"
        )
    mask = np.zeros(len(test), dtype=bool)
    mask[rows] = True
    return torch.from_numpy(mask)


def _named(goals: Sequence[Goal], mark: str) -> list[tuple[str, Goal]]:
    return [("" if len(goals) == 1 else f"{mark}{i}", g) for i, g in enumerate(goals)]
