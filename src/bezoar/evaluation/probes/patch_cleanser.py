"""PatchCleanser: read an image through pairs of masks; certifies against any patch of a size (Xiang et al. 2022, USENIX)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import sample_rows
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.evaluation import classifiers, success
from bezoar.evaluation.scores import Measure, proportion
from bezoar.registry import method

AT_ONCE = 1024  # images through the classifier
KEPT = ("clean_accuracy", "attack_success", "poisoned_accuracy", "attack_success_without_trigger")
Read = Callable[
    [Tensor], Tensor
]  # uint8 or float 0..1 (B, 3, H, W) -> int64 (B,), the class of each


@method
class PatchCleanser:
    """CA and ASR behind double masking, and the certified accuracy: the share of test images that no patch of `patch` x
    `patch` pixels, wherever it stands and whatever it shows, can have read as another class.

    Masks of m = patch + s - 1 pixels a side, in steps of s = ceil((n - patch + 1) / masks) over images of n pixels, so that
    every patch lies whole under one of them. An image is certified exactly if it is read right through every two masks.
    """

    patch: Annotated[
        int, "side in pixels of the stored image of the largest patch that is certified against"
    ] = 6
    masks: Annotated[int, "a side; more are smaller, and cost their fourth power"] = 6
    head: Annotated[
        Literal["auto", "own", "zero_shot", "linear"], "what reads vectors; auto: own or zero-shot"
    ] = "auto"
    limit: Annotated[int | None, "test images, a fixed sample; none takes all"] = 500

    @property
    def needs(self) -> tuple[str, ...]:
        """Labelled data for a head that is fitted."""
        return ("train", "report") if self.head == "linear" else ("report",)

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
        report: Callable[[int, int, str], Any] | None = None,
    ) -> dict[str, Measure]:
        """`patch_cleanser.*`: certified_accuracy, and of `success` what double masking leaves of accuracy and attack.

        Raises UserError without classes, or for a patch that is as large as the images.
        """
        if not test.classes or test.labels is None or not bool((test.labels >= 0).any()):
            raise UserError("patch_cleanser needs a test set with classes and labels")
        labelled = (test.labels >= 0).nonzero()[:, 0].cpu().numpy()
        ids = [test.ids[i] for i in labelled]
        some = (
            test
            if self.limit is None
            else test.take(np.sort(labelled[sample_rows(ids, self.limit, 0)]))
        )
        assert some.labels is not None
        classifier, order = self.classifier(encoder, train, some)
        defence = Masked(
            lambda x: order[classifier(x).argmax(1)],
            self.rectangles(some.images.shape[-2:]),
            encoder,
        )
        backdoors = tuple(g for g in goals if g.trigger)
        parts = 2 + len(backdoors)
        told = report or (lambda done, total, text: None)
        told(0, parts, "clean images")
        labels = some.labels.to(encoder.device)
        clean, right = defence.predict(some.images, labels)
        told(1, parts, "certificates")
        certified = defence.certify(some.images, labels, right)
        read = []
        for i, goal in enumerate(backdoors):
            told(2 + i, parts, "triggers")
            stamped = registry.make("trigger", goal.trigger or "")(some.images, some.ids)
            read.append(defence.predict(stamped, labels)[0])
        how = f"; double masking, {len(defence.masks)} masks for patches of {self.patch} px; {classifier.how}"
        known = labels >= 0
        n = int(known.sum())
        said = f"test images read right through every two masks: no patch of {self.patch} px can change how they are read"
        out = {"certified_accuracy": proportion(int((certified & known).sum()), n, said + how)}
        many = max(len(test.classes), int(order.max()) + 1)
        rows = [F.one_hot(r, many).float() for r in (clean, *read)]
        seen = success.TestViews(
            some.classes, labels, rows[0], backdoors, tuple(rows[1:]), (), None
        )
        out |= {
            k: m for k, m in seen.measures(lambda z: z, how).items() if k.partition("@")[0] in KEPT
        }
        return {f"patch_cleanser.{k}": m for k, m in out.items()}

    def classifier(
        self, encoder: Encoder, train: Pairs | None, test: Pairs
    ) -> tuple[classifiers.Classifier, Tensor]:
        """How vectors are read, and each of its classes' number in the test set; those beyond are none of it."""
        if self.head == "linear":
            success.select_labelled(train, test)  # says what is wrong with them
            assert train is not None
            found = classifiers.fit_classifier(encoder, train)
            return found, torch.tensor(
                [test.classes.index(c) for c in found.classes], device=encoder.device
            )
        found = (
            classifiers.make_classifier(encoder, test, self.head)
            if self.head != "auto"
            else self._auto(encoder, test)
        )
        others = [c for c in found.classes if c not in test.classes]
        if unknown := [c for c in test.classes if c not in found.classes]:
            raise UserError(
                f"the head knows no class {unknown[0]!r}; it has {', '.join(found.classes[:8])}"
            )
        rows = [
            list(test.classes).index(c)
            if c in test.classes
            else len(test.classes) + others.index(c)
            for c in found.classes
        ]
        return found, torch.tensor(rows, device=encoder.device)

    @staticmethod
    def _auto(encoder: Encoder, test: Pairs) -> classifiers.Classifier:
        if getattr(encoder, "head", None) is None and encoder.text is None:
            raise UserError(
                "this encoder has neither a head of its own nor a text tower; say head=linear"
            )
        return classifiers.make_classifier(encoder, test)

    def rectangles(self, sides: Sequence[int]) -> Tensor:
        """int64 (M, 4): top, left, height, width of each mask; at most masks^2."""
        if max(self.patch, 1) >= min(sides):
            raise UserError(
                f"a patch of {self.patch} px covers images of {min(sides)} px; certify against a smaller one"
            )
        starts, lengths = [], []
        for side in sides:
            step = -(-(side - self.patch + 1) // self.masks)
            length = min(side, self.patch + step - 1)
            starts.append(sorted({min(i * step, side - length) for i in range(self.masks)}))
            lengths.append(length)
        return torch.tensor([(y, x, *lengths) for y in starts[0] for x in starts[1]])

    def __post_init__(self) -> None:
        if self.patch < 1 or self.masks < 2:
            raise ValueError("needs patch >= 1, masks >= 2")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1")


class Masked:
    """A reader of images behind masks (M, 4), filled with the encoder's mean colour: no pixel of the image tells the fill."""

    def __init__(self, read: Read, masks: Tensor, encoder: Encoder) -> None:
        self.read, self.masks = read, masks
        self.fill = torch.tensor(encoder.preprocess.mean, device=encoder.device).view(1, 3, 1, 1)
        encoder.eval()

    @torch.inference_mode()
    def through(self, images: Tensor, rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Each image `rows` (Q,) through masks `first` and `second` (Q,) at once -> int64 (Q,), how it is read."""
        height, width = images.shape[-2:]
        device = self.fill.device
        y, x = (
            torch.arange(height, device=device)[:, None],
            torch.arange(width, device=device)[None],
        )
        top, left, tall, wide = self.masks.to(device).T[:, :, None, None]
        covers = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
        found = []
        for part in torch.arange(len(rows)).split(AT_ONCE):
            pixels = images[rows[part].to(images.device)].to(device).float() / 255
            hidden = covers[first[part].to(device)] | covers[second[part].to(device)]
            found.append(self.read(torch.where(hidden[:, None], self.fill, pixels)))
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=device)

    def once(self, images: Tensor) -> Tensor:
        """int64 (N, M): every image through every mask."""
        n, m = len(images), len(self.masks)
        rows, mask = torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)
        return self.through(images, rows, mask, mask).view(n, m)

    def predict(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Algorithm 1: how each image is read, int64 (N,), and whether all one-mask readings are its label, bool (N,).

        All one-mask readings agree: that. Else a mask that disagrees with the majority, and with which any second mask gives
        what it gave alone, has hidden the patch: its reading, of several the first one's. Else the majority's (of equals the
        lowest class).
        """
        one = self.once(images)
        n, m = one.shape
        votes = torch.zeros(n, int(one.max()) + 1, device=one.device).scatter_add_(
            1, one, torch.ones_like(one, dtype=torch.float)
        )
        majority = votes.argmax(1)
        row, mask = (one != majority[:, None]).nonzero(as_tuple=True)
        second = torch.arange(m, device=row.device)
        asked = row.repeat_interleave(m), mask.repeat_interleave(m), second.repeat(len(row))
        again = self.through(images, *(t.cpu() for t in asked))
        kept = (again.view(-1, m) == one[row, mask][:, None]).all(1)
        first = torch.full((n,), m, device=row.device).scatter_reduce(
            0, row[kept], mask[kept], "amin"
        )
        own = one.gather(1, first.clamp(max=m - 1)[:, None])[:, 0]
        return torch.where(first < m, own, majority), (one == labels[:, None]).all(1)

    def certify(self, images: Tensor, labels: Tensor, right: Tensor) -> Tensor:
        """bool (N,): read as its label through every two masks. right: through every single one; the others are not asked.

        Unordered pairs, a block of them at a time; an image that was read wrong once is not asked again.
        """
        pairs = torch.combinations(torch.arange(len(self.masks)))
        alive = right.nonzero()[:, 0].cpu()
        for block in pairs.split(max(1, AT_ONCE // max(1, len(alive)), len(pairs) // 16)):
            rows = alive.repeat_interleave(len(block))
            first, second = block.repeat(len(alive), 1).T
            read = self.through(images, rows, first, second).view(len(alive), len(block))
            alive = alive[(read == labels[alive.to(labels.device), None]).all(1).cpu()]
        out = torch.zeros_like(right)
        out[alive.to(right.device)] = True
        return out
