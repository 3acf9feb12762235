"""Universal triggers that an encoder learns to resist (after ABD, arXiv 2409.15968).

A backdoor moves every image in one direction by one change of the pixels. The change is unknown, so
some are searched for: patches, patterns blended over the image, and changes of its colours. Each
ascends the loss that the encoder descends, with the gradient of the same backward pass ("free"
adversarial training, arXiv 1904.12843), and is drawn anew after `LIFE` steps.
"""

import torch
from torch import Tensor, nn

from bezoar.training.augmentation import Chance
from bezoar.training.collectives import average

PATCH_SIDES = (1 / 8, 3 / 8)  # least and largest side of a patch, as shares of the image's
ALPHA = 0.35  # share of the pattern in an image that it is blended over
REACH = 0.35  # how far a map of colours goes from the identity, in each of its entries
LIFE = 40  # steps until a trigger is drawn anew
PIXEL_STEP, COLOUR_STEP = 0.05, 0.02  # of the ascent, a step of each entry
KINDS = 3


class UniversalTriggers(nn.Module):
    """`count` triggers, thirds of patches, patterns, colour changes, as buffers that are saved."""

    # float32 (P, 1, H, W), how much of the pattern a pixel takes; P: patches and patterns
    masks: Tensor
    patterns: Tensor  # float32 (P, 3, H, W) in 0..1
    colours: Tensor  # float32 (C, 3, 4), affine maps of a pixel's colour
    steps: Tensor  # int64, how often images were stamped

    def __init__(self, count: int, height: int, width: int, device: torch.device) -> None:
        super().__init__()
        coloured = count // KINDS
        painted = count - coloured
        self.patches = (painted + 1) // 2
        self.register_buffer("masks", torch.zeros(painted, 1, height, width, device=device))
        self.register_buffer("patterns", torch.zeros(painted, 3, height, width, device=device))
        self.register_buffer("colours", torch.zeros(coloured, 3, 4, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        for ascending in (self.patterns, self.colours):
            ascending.requires_grad_()
            ascending.register_post_accumulate_grad_hook(self.ascend)

    @torch.no_grad()
    def ascend(self, values: Tensor) -> None:
        """Move patterns or colours along the sign of their gradient, within their bounds."""
        assert values.grad is not None
        direction = average(values.grad).sign()
        if values is self.patterns:
            values.add_(direction, alpha=PIXEL_STEP).clamp_(0, 1)
        else:
            identity = torch.eye(3, 4, device=values.device)
            values.add_(direction, alpha=COLOUR_STEP)
            values.clamp_(identity - REACH, identity + REACH)
        values.grad = None

    @torch.no_grad()
    def draw(self, number: int, chance: Chance) -> None:
        """Draw a trigger: its place, size and colours."""
        painted, _, height, width = self.masks.shape
        drawn = torch.rand(3, height, width, generator=chance.generator)
        if number >= painted:
            change = REACH * (2 * drawn.flatten()[:12].view(3, 4) - 1)
            self.colours[number - painted] = (torch.eye(3, 4) + change).to(self.colours)
            return
        self.patterns[number] = drawn.to(self.patterns)
        if number >= self.patches:
            self.masks[number] = ALPHA
            return
        side, top, left = torch.rand(3, generator=chance.generator).tolist()
        least, largest = (max(1, round(share * min(height, width))) for share in PATCH_SIDES)
        size = least + round(side * (largest - least))
        y, x = round(top * (height - size)), round(left * (width - size))
        self.masks[number] = 0
        self.masks[number, :, y : y + size, x : x + size] = 1

    def forward(self, images: Tensor, chance: Chance) -> Tensor:
        """Stamp each image with one of the triggers, in turn. float32 (B, 3, H, W) in 0..1."""
        painted, count = len(self.masks), len(self.masks) + len(self.colours)
        step = int(self.steps)
        for number in range(count):
            if step == 0 or (step + number * LIFE // count) % LIFE == 0:
                self.draw(number, chance)
        self.steps += 1
        numbers = torch.arange(len(images), device=images.device) % count
        is_painted = numbers < painted
        rows = numbers[is_painted]
        masks, maps = self.masks[rows], self.colours[numbers[~is_painted] - painted]  # (N, 3, 4)
        turned = torch.einsum("nij,njhw->nihw", maps[:, :, :3], images[~is_painted])
        stamped = images.clone()
        stamped[is_painted] = (1 - masks) * images[is_painted] + masks * self.patterns[rows]
        stamped[~is_painted] = (turned + maps[:, :, 3, None, None]).clamp(0, 1)
        return stamped
