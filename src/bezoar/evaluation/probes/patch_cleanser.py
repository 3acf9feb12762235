"""PatchCleanser (Xiang et al. 2022, USENIX): masks images twice, and certifies against patches."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

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
from bezoar.evaluation.probes import add_prefix, select_measures
from bezoar.evaluation.scores import Measure, proportion
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method

BATCH = 1024  # images through the classifier at a time
REPORTED = (
    "clean_accuracy",
    "attack_success",
    "poisoned_accuracy",
    "attack_success_without_trigger",
)
Read = Callable[[Tensor], Tensor]  # uint8 or float 0..1 (B, 3, H, W) -> int64 (B,), their classes


@method
class PatchCleanser:
    """CA and ASR with double masking, and certified accuracy.

    Certified accuracy is the share of test images that no patch of `patch` x `patch` pixels can
    change the reading of, whatever its place and content. Masks have m = patch + s - 1 pixels a
    side, in steps of s = ceil((n - patch + 1) / masks) over images of n pixels, so that every patch
    lies whole under one of them. An image is certified if and only if it is read right through
    every pair of masks.
    """

    patch: Annotated[
        int, "side in pixels of the stored image of the largest patch that is certified against"
    ] = 6
    masks: Annotated[int, "a side; more are smaller, and cost their fourth power"] = 6
    head: Annotated[
        Literal["auto", "own", "zero_shot", "linear"], "the classifier; auto: own or zero-shot"
    ] = "auto"
    limit: Annotated[int | None, "test images, a fixed sample; none takes all"] = 500

    @property
    def needs(self) -> tuple[str, ...]:
        """The probe's further arguments; labelled data are only needed to fit a head."""
        return ("train", "report") if self.head == "linear" else ("report",)

    def __post_init__(self) -> None:
        if self.patch < 1 or self.masks < 2:
            raise ValueError("needs patch >= 1, masks >= 2")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1")

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
        report: ProgressReport = no_report,
    ) -> dict[str, Measure]:
        """Return `patch_cleanser.*`: certified_accuracy, and accuracy and success with masks.

        Raises UserError if the test set has no classes and labels, the patch is as large as the
        images, or there is no head.
        """
        sample = self._sample(test)
        assert sample.labels is not None
        labels = sample.labels.to(encoder.device)
        classifier, number_of = self._make_classifier(encoder, train, sample)
        defence = DoubleMasking(
            lambda x: number_of[classifier(x).argmax(1)],
            self.mask_rectangles(sample.images.shape[-2:]),
            encoder,
        )
        backdoors = tuple(goal for goal in goals if goal.trigger)
        parts = 2 + len(backdoors)
        report(0, parts, "clean images")
        clean, is_right = defence.predict(sample.images, labels)
        report(1, parts, "certificates")
        is_certified = defence.certify(sample.images, labels, is_right)
        triggered = []
        for i, goal in enumerate(backdoors):
            report(2 + i, parts, "triggers")
            stamped = registry.make("trigger", goal.trigger or "")(sample.images, sample.ids)
            triggered.append(defence.predict(stamped, labels)[0])

        how = (
            f"; double masking, {len(defence.masks)} masks for patches of {self.patch} px; "
            f"{classifier.how}"
        )
        is_known = labels >= 0
        certified = proportion(
            int((is_certified & is_known).sum()),
            int(is_known.sum()),
            f"test images read right through every two masks: no patch of {self.patch} px can "
            f"change how they are read{how}",
        )
        count = max(len(test.classes), int(number_of.max()) + 1)
        one_hot = [F.one_hot(numbers, count).float() for numbers in (clean, *triggered)]
        views = success.TestViews(
            sample.classes, labels, one_hot[0], backdoors, tuple(one_hot[1:]), (), None
        )
        measures = select_measures(views.measures(lambda z: z, how), REPORTED)
        return add_prefix("patch_cleanser", {"certified_accuracy": certified, **measures})

    def _sample(self, test: Pairs) -> Pairs:
        """Return the test images to certify: at most `limit`, with labels."""
        if not test.classes or test.labels is None or not bool((test.labels >= 0).any()):
            raise UserError("patch_cleanser needs a test set with classes and labels")
        if self.limit is None:
            return test
        rows = (test.labels >= 0).nonzero()[:, 0].cpu().numpy()
        sample = sample_rows([test.ids[row] for row in rows], self.limit, 0)
        return test.take(np.sort(rows[sample]))

    def _make_classifier(
        self, encoder: Encoder, train: Pairs | None, test: Pairs
    ) -> tuple[classifiers.Classifier, Tensor]:
        """Return a classifier of images, and the test set's numbers of its classes, int64 (C,).

        Classes that the test set lacks get numbers beyond its own.
        """
        if self.head == "linear":
            success.select_labelled(train, test)  # raises what is wrong with them
            assert train is not None
            classifier = classifiers.fit_classifier(encoder, train)
        elif self.head != "auto":
            classifier = classifiers.make_classifier(encoder, test, self.head)
        else:
            if getattr(encoder, "head", None) is None and encoder.text is None:
                raise UserError(
                    "this encoder has neither a head of its own nor a text tower; say head=linear"
                )
            classifier = classifiers.make_classifier(encoder, test)
        classes = classifier.classes
        if unknown := [name for name in test.classes if name not in classes]:
            raise UserError(
                f"the head knows no class {unknown[0]!r}; it has {', '.join(classes[:8])}"
            )
        others = [name for name in classes if name not in test.classes]
        numbered = [*test.classes, *others]
        numbers = [numbered.index(name) for name in classes]
        return classifier, torch.tensor(numbers, device=encoder.device)

    def mask_rectangles(self, sides: Sequence[int]) -> Tensor:
        """Return the masks of images (H, W), int64 (M, 4): top, left, height, width."""
        if max(self.patch, 1) >= min(sides):
            raise UserError(
                f"a patch of {self.patch} px covers images of {min(sides)} px; "
                "certify against a smaller one"
            )
        starts, lengths = [], []
        for side in sides:
            step = -(-(side - self.patch + 1) // self.masks)
            length = min(side, self.patch + step - 1)
            starts.append(sorted({min(i * step, side - length) for i in range(self.masks)}))
            lengths.append(length)
        return torch.tensor([(y, x, *lengths) for y in starts[0] for x in starts[1]])


class DoubleMasking:
    """Reads images through one and two masks, filled with the encoder's mean colour, not the
    image's.
    """

    def __init__(self, read: Read, masks: Tensor, encoder: Encoder) -> None:
        """read: reads images as classes. masks: int64 (M, 4), top, left, height and width."""
        self.read, self.masks = read, masks
        self.fill = torch.tensor(encoder.preprocess.mean, device=encoder.device).view(1, 3, 1, 1)
        encoder.eval()

    @torch.inference_mode()
    def read_through(self, images: Tensor, rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Read images through two masks at once.

        Args:
            images: uint8 (N, 3, H, W).
            rows: int64 (Q,), which image to read.
            first: int64 (Q,), the mask to read it through.
            second: int64 (Q,), the other mask; the same one for a single mask.

        Returns:
            The class of each, int64 (Q,).
        """
        device = self.fill.device
        covers = self._covers(images.shape[-2:])
        classes = []
        for part in torch.arange(len(rows)).split(BATCH):
            pixels = images[rows[part].to(images.device)].to(device).float() / 255
            hidden = covers[first[part].to(device)] | covers[second[part].to(device)]
            classes.append(self.read(torch.where(hidden[:, None], self.fill, pixels)))
        return torch.cat(classes) if classes else torch.empty(0, dtype=torch.int64, device=device)

    def _covers(self, sides: Sequence[int]) -> Tensor:
        """Return which pixels each mask covers, bool (M, H, W)."""
        height, width = sides
        y = torch.arange(height, device=self.fill.device)[:, None]
        x = torch.arange(width, device=self.fill.device)[None]
        top, left, tall, wide = self.masks.to(self.fill.device).T[:, :, None, None]
        covers: Tensor = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)
        return covers

    def read_through_each(self, images: Tensor) -> Tensor:
        """Read every image through every mask, int64 (N, M)."""
        n, m = len(images), len(self.masks)
        rows, mask = torch.arange(n).repeat_interleave(m), torch.arange(m).repeat(n)
        return self.read_through(images, rows, mask, mask).view(n, m)

    def predict(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Read images with double masking (algorithm 1).

        If all one-mask readings agree, the result is that class. Otherwise, if a mask disagrees
        with the majority and no second mask changes its reading, it has hidden the patch, and the
        result is its reading; of several such masks, the first one's. Otherwise it is the
        majority's class; of equal ones, the lowest.

        Args:
            images: uint8 (N, 3, H, W).
            labels: int64 (N,), their classes.

        Returns:
            The class of each image, int64 (N,); and whether all its one-mask readings are its
            label, bool (N,).
        """
        one_mask = self.read_through_each(images)
        n, m = one_mask.shape
        votes = torch.zeros(n, int(one_mask.max()) + 1, device=one_mask.device)
        votes.scatter_add_(1, one_mask, torch.ones_like(one_mask, dtype=torch.float))
        majority = votes.argmax(1)
        # Each dissenting mask again, with every second one.
        row, mask = (one_mask != majority[:, None]).nonzero(as_tuple=True)
        second = torch.arange(m, device=row.device).repeat(len(row))
        pairs = (row.repeat_interleave(m), mask.repeat_interleave(m), second)
        two_masks = self.read_through(images, *(x.cpu() for x in pairs)).view(-1, m)
        is_stable = (two_masks == one_mask[row, mask][:, None]).all(1)
        first_stable = torch.full((n,), m, device=row.device).scatter_reduce(
            0, row[is_stable], mask[is_stable], "amin"
        )
        reading = one_mask.gather(1, first_stable.clamp(max=m - 1)[:, None])[:, 0]
        is_right = (one_mask == labels[:, None]).all(1)
        return torch.where(first_stable < m, reading, majority), is_right

    def certify(self, images: Tensor, labels: Tensor, is_right: Tensor) -> Tensor:
        """Return which images are read as their label through every two masks, bool (N,).

        An image that was read wrong once is not read again.

        Args:
            images: uint8 (N, 3, H, W).
            labels: int64 (N,).
            is_right: bool (N,), which are read right through every single mask; the others are not
                read.
        """
        pairs = torch.combinations(torch.arange(len(self.masks)))
        alive = is_right.nonzero()[:, 0].cpu()
        step = max(1, BATCH // max(1, len(alive)), len(pairs) // 16)
        for block in pairs.split(step):
            rows = alive.repeat_interleave(len(block))
            first, second = block.repeat(len(alive), 1).T
            classes = self.read_through(images, rows, first, second).view(len(alive), len(block))
            expected = labels[alive.to(labels.device), None]
            alive = alive[(classes == expected).all(1).cpu()]
        is_certified = torch.zeros_like(is_right)
        is_certified[alive.to(is_right.device)] = True
        return is_certified
