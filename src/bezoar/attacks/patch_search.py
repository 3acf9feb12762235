"""Optimises a patch that a surrogate reads as the target (BadCLIP: Liang et al., CVPR 2024).

Poisons with such a patch change an encoder like the surrogate only a little. Repairs that tune the
encoder then leave the backdoor, which agrees with clean training. Both terms of the paper are kept:
triggered images agree with captions of the target more than with those of other images, and they
are nearer to the target's images than to themselves without the patch, by a margin.

Deviations: the paper weighs the second term by 500 with CLIP's temperature of .01; here the weight
is 5 with .07. On a small CLIP of scenes (accuracy .90), patches of 6 px alone were read as the
target in 0 and 2 % of images with a weight of 100, and in 2 and 5 % with 5 (two targets, 290 images
each). Captions are not augmented, and steps are fewer and larger (the code: Adam with rate .001
over 50 passes of 10,000 pairs).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.attacks import pixels
from bezoar.attacks.captions import find_mentions
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator, sample_rows
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.progress import ProgressReport, no_report

STEPS, BATCH, RATE = 200, 64, 0.05
SCALE = 1 / 0.07  # of cosines of images and captions
IMAGE_WEIGHT, MARGIN = 5.0, 1.0
MOST_IMAGES = 4000  # that the patch is optimised on, and of the target
TEXT_BATCH = 512


class PatchTrigger(Protocol):
    """The part of trigger `patch` that gives the patch's places."""

    size: int
    place: str
    margin: int
    seed: int


@dataclass(frozen=True)
class TargetVectors:
    """The vectors that the patch is optimised towards, unit rows of the surrogate."""

    images: Tensor  # vectors of the target's images, (P, D)
    # vectors of the captions that mention it, (P, D); None without a text tower
    captions: Tensor | None
    # vectors of the other images' captions, (N, D); None without a text tower
    other_captions: Tensor | None


def optimise_patch(
    encoder: Encoder,
    records: Pairs | StoredPairs,
    target: str,
    trigger: PatchTrigger,
    seed: int,
    report: ProgressReport = no_report,
) -> Tensor:
    """Optimise a patch on images that do not show the target, with Adam.

    Args:
        encoder: the surrogate, which is not changed.
        records: images and captions; those that mention the target are its images.
        target: class or word.
        trigger: size and place of the patch.
        seed: seed of its initial pixels, and of the order of images.
        report: called with the step, the number of steps and the loss.

    Returns:
        uint8 (3, size, size) on the CPU.

    Raises:
        UserError: if no caption mentions the target, or all do.
    """
    mentions = set(find_mentions(records.captions, target))
    rows = sample_rows(list(records.ids), len(records), seed).tolist()
    others = records.take([row for row in rows if row not in mentions][:MOST_IMAGES])
    of_target = records.take([row for row in rows if row in mentions][:MOST_IMAGES])
    if not len(of_target) or not len(others):
        raise UserError(f"a patch needs records that mention {target!r} and others that do not")
    modes = [(p, p.requires_grad) for p in encoder.parameters()]
    encoder.eval().requires_grad_(False)
    vectors = embed_target(encoder, of_target, others)
    chance = generator(seed, 3)
    shape = (3, trigger.size, trigger.size)
    patch = torch.rand(shape, generator=chance).to(encoder.device).requires_grad_()
    optim = torch.optim.Adam([patch], RATE)
    for step in range(STEPS):
        batch = torch.randint(len(others), (BATCH,), generator=chance)
        towards = torch.randint(len(of_target), (BATCH,), generator=chance)
        images = others.take(batch)
        loss = patch_loss(encoder, patch, trigger, images, vectors, batch, towards)
        optim.zero_grad()
        loss.backward()
        optim.step()
        with torch.no_grad():
            patch.clamp_(0, 1)
        report(step + 1, STEPS, f"patch, loss {float(loss.detach()):.3f}")
    for parameter, needs_gradient in modes:
        parameter.requires_grad_(needs_gradient)
    return pixels.to_uint8(patch.detach().cpu() * 255)


@torch.no_grad()
def embed_target(encoder: Encoder, of_target: Pairs, others: Pairs) -> TargetVectors:
    """Embed the target's images and captions, and the other images' captions."""
    images = torch.cat(
        [encoder.encode_images(b.images.to(encoder.device)) for b in of_target.batches(256)]
    )
    if encoder.text is None:
        return TargetVectors(images, None, None)
    captions, others_captions = (
        torch.cat([encoder.encode_texts(b.captions) for b in pairs.batches(TEXT_BATCH)])
        for pairs in (of_target, others)
    )
    return TargetVectors(images, captions, others_captions)


def patch_loss(
    encoder: Encoder,
    patch: Tensor,
    trigger: PatchTrigger,
    images: Pairs,
    vectors: TargetVectors,
    batch: Tensor,
    towards: Tensor,
) -> Tensor:
    """Return the loss of one step.

    With z the triggered images' vectors, x those of the images without the patch, a and w the
    target's images and captions, and v_j the captions of the batch,

        mean -log [ exp(s z.w) / (exp(s z.w) + sum over j of exp(s z.v_j)) ]
        + IMAGE_WEIGHT mean max(0, |z - a| - |z - x| + MARGIN)

    Args:
        patch: float (3, size, size) in 0..1.
        images: the batch, B records.
        vectors: the vectors of the target and of the other captions.
        batch: int64 (B,), rows of the batch in `vectors.other_captions`.
        towards: int64 (B,), for each image a row of `vectors.images` and `vectors.captions`.
    """
    clean = images.images.to(encoder.device).float() / 255
    size = (trigger.size, trigger.size)
    height, width = clean.shape[-2:]
    places = pixels.patch_positions(
        trigger.place, trigger.margin, size, (height, width), trigger.seed, images.ids
    )
    z = encoder.encode_images(pixels.paste(clean, patch, places))  # (B, D)
    with torch.no_grad():
        x = encoder.encode_images(clean)
    gap = (z - vectors.images[towards]).norm(dim=1) - (z - x).norm(dim=1)
    loss: Tensor = IMAGE_WEIGHT * (gap + MARGIN).clamp(min=0).mean()
    if vectors.captions is None or vectors.other_captions is None:
        return loss
    agreement = (z * vectors.captions[towards]).sum(1, keepdim=True)  # (B, 1)
    logits = SCALE * torch.cat([agreement, z @ vectors.other_captions[batch].T], 1)  # (B, 1 + B)
    first = torch.zeros(len(z), dtype=torch.long, device=z.device)
    of_captions: Tensor = F.cross_entropy(logits, first)
    return loss + of_captions
