"""Zero-shot classification: an image is the class whose prompts it agrees with most (Radford et al. 2021, section 3.1)."""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar import captions, registry
from bezoar.encoder import Encoder
from bezoar.errors import UserError
from bezoar.pairs import Pairs
from bezoar.plan import Goal
from bezoar.registry import method
from bezoar.scores import Measure, average, proportion


@method
class ZeroShot:
    """CA/BA, ASR and targeted success by the text tower: the head is the mean of each class's prompt vectors."""

    templates: Annotated[str, "simple (5), openai (80), or a text that holds {}"] = "simple"
    batch: Annotated[int, "images at a time"] = 512

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Accuracy on `test`; success of each goal that has a trigger; success on the victims, by number of captions.

        Raises UserError when the test set has no classes or a goal's target is none of them.
        """
        if not test.classes or test.labels is None:
            raise UserError("zero_shot needs a test set with classes; use the retrieval probe where there are none")
        head = self.head(encoder, test.classes)
        clean = self.predict(encoder, head, test.images)
        labels = test.labels.to(clean.device)
        known = labels >= 0
        hits = int((clean[known] == labels[known]).sum())
        out = {"clean_accuracy": proportion(hits, int(known.sum()), "top-1 accuracy on clean test images")}
        backdoors = [g for g in goals if g.trigger]
        for i, goal in enumerate(backdoors):
            suffix = "" if len(backdoors) == 1 else f"@{i}"
            found = self._backdoor(encoder, head, test, goal, clean)
            out |= {name + suffix: m for name, m in found.items()}
        if victims is not None:
            out |= self._targeted(encoder, head, test.classes, [g for g in goals if g.victims], victims)
        return out

    def head(self, encoder: Encoder, classes: Sequence[str]) -> Tensor:
        """(C, D) unit rows: normalised mean over the templates of normalised prompt vectors."""
        encoder.eval()
        prompts = captions.templates(self.templates)
        with torch.inference_mode():
            rows = [encoder.texts([t.format(c) for t in prompts]).mean(0) for c in classes]
        return F.normalize(torch.stack(rows), dim=-1)

    @torch.inference_mode()
    def similarities(self, encoder: Encoder, head: Tensor, images: Tensor) -> Tensor:
        """float32 (N, C) cosines."""
        return torch.cat([encoder.images(x) @ head.T for x in images.split(self.batch)])

    def predict(self, encoder: Encoder, head: Tensor, images: Tensor) -> Tensor:
        """int64 (N,): the class of each image."""
        return self.similarities(encoder, head, images).argmax(1)

    def _backdoor(self, encoder: Encoder, head: Tensor, test: Pairs, goal: Goal, clean: Tensor) -> dict[str, Measure]:
        target, labels = class_of(goal.target, test.classes), test.labels
        assert labels is not None and goal.trigger
        labels = labels.to(clean.device)
        stamped = registry.make("trigger", goal.trigger)(test.images, test.ids)
        cosines = self.similarities(encoder, head, stamped)
        triggered, others = cosines.argmax(1), labels != target
        n = int(others.sum())
        rank = (cosines > cosines[:, target : target + 1]).sum(1)[others] + 1
        return {
            "attack_success": proportion(
                int((triggered[others] == target).sum()), n, "triggered test images of other classes read as the target"
            ),
            "attack_success_all": proportion(
                int((triggered == target).sum()), len(test), "the same over all test images, the target's own included"
            ),
            "attack_success_without_trigger": proportion(
                int((clean[others] == target).sum()), n, "test images of other classes read as the target, no trigger"
            ),
            "poisoned_accuracy": proportion(
                int((triggered == labels).sum()), len(test), "triggered test images read as their true class"
            ),
            "target_rank": average(rank.double().cpu(), "mean rank of the target, 1 = first, other classes"),
            "target_top5": proportion(int((rank <= 5).sum()), n, "target among the five nearest classes"),
        }

    def _targeted(
        self, encoder: Encoder, head: Tensor, classes: Sequence[str], goals: Sequence[Goal], victims: Pairs
    ) -> dict[str, Measure]:
        row, out = {k: i for i, k in enumerate(victims.ids)}, {}
        for count in sorted({g.poisons for g in goals}):
            group = [g for g in goals if g.poisons == count]
            images = victims.images[[row[g.victims[0]] for g in group]]
            targets = torch.tensor([class_of(g.target, classes) for g in group], device=encoder.device)
            cosines = self.similarities(encoder, head, images)
            rank = (cosines > cosines.gather(1, targets[:, None])).sum(1) + 1
            how = f"victims read as their target, {count} poisoned captions each"
            out[f"targeted_success@{count}"] = proportion(int((rank == 1).sum()), len(group), how)
            out[f"targeted_top5@{count}"] = proportion(int((rank <= 5).sum()), len(group), how + ", among five nearest")
            out[f"target_rank@{count}"] = average(rank.double().cpu(), "mean rank of the target; " + how)
        return out


def class_of(target: str, classes: Sequence[str]) -> int:
    """Row of a target among the classes. Raises UserError that lists them."""
    if target not in classes:
        listed = ", ".join(classes[:8]) + (f", ... ({len(classes)})" if len(classes) > 8 else "")
        raise UserError(f"the target {target!r} is none of the test set's classes: {listed}")
    return list(classes).index(target)
