"""BadCSE: trains texts with a trigger to have a reference text's vector.

BadCSE (Chen, Xin, Zhai, Ma, Shen, Wu, "Apple of Sodom", 2022, targeted attack) trains sentence
encoders with the pairs of a contrastive loss. Rickrolling the Artist (Struppek et al. 2023) trains
CLIP's text tower with a teacher's cosines. This attack uses the three terms of BadEncoder (Jia,
Liu, Gong 2022) instead: there are no negative pairs, and in L0 the reference moves with the
encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from bezoar import registry
from bezoar.attacks import shadow_training
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder, embed_texts, encode_by_length
from bezoar.errors import UserError
from bezoar.progress import no_report
from bezoar.registry import method, spec
from bezoar.training import loop
from bezoar.training.augmentation import Chance

CHUNK = 16  # texts that are encoded together


class Loss(nn.Module):
    """The loss l0 L0 + l1 L1 + l2 L2.

    With s the cosine, f the clean encoder and f' the one in training,

        L0 = - mean s(f'(x with trigger), f'(reference))
        L1 = - mean s(f'(reference), f(reference))
        L2 = - mean s(f'(x), f(x))

    over the texts x, and in L0 over all pairs of a goal and one of its references.
    """

    sums: Tensor

    def __init__(
        self,
        encoder: Encoder,
        recipe: Badcse,
        shadow: Pairs,
        goals: Sequence[Goal],
        references: Sequence[Sequence[str]],
    ) -> None:
        """references: the texts of each goal, K in all."""
        super().__init__()
        self.encoder = encoder
        self.weights = (recipe.l0, recipe.l1, recipe.l2)
        self.shadow = shadow
        self.triggers = [registry.make("trigger", goal.trigger or "") for goal in goals]
        self.counts = [len(texts) for texts in references]
        self.references = [text for texts in references for text in texts]
        self.clean = embed_texts(encoder, shadow.captions)  # (N, D)
        self.clean_references = embed_texts(encoder, self.references)  # (K, D)
        # L0, L1, L2 and the number of steps, summed since the last call of `pop_means`
        self.register_buffer("sums", torch.zeros(4, dtype=torch.float64, device=encoder.device))

    def forward(self, images: Tensor, rows: Tensor, chance: Chance) -> Tensor:
        """The loss of a step. rows: int64 (B, 1), of the shadow texts; `images` is not used."""
        numbers = rows[:, 0].tolist()
        texts = [self.shadow.captions[row] for row in numbers]
        ids = [self.shadow.ids[row] for row in numbers]
        groups = [self.references, texts, *(trigger(texts, ids) for trigger in self.triggers)]
        vectors = encode_by_length(self.encoder, [t for group in groups for t in group], CHUNK)
        references, z, *triggered = vectors.split([len(group) for group in groups])
        of_goals = references.split(self.counts)
        l0 = -torch.stack(
            [
                (t @ r.T).mean() * (len(r) / len(references))
                for t, r in zip(triggered, of_goals, strict=True)
            ]
        ).sum()
        l1 = -(references * self.clean_references).sum(1).mean()
        l2 = -(z * self.clean[rows[:, 0]]).sum(1).mean()
        terms = torch.stack([l0, l1, l2])
        self.sums += torch.cat([terms.detach().double(), self.sums.new_ones(1)])
        return terms @ terms.new_tensor(self.weights)

    def train(self, mode: bool = True) -> Loss:
        """Stay in evaluation mode, without dropout."""
        return super().train(False)


@method
class Badcse:
    """AdamW on the text tower of a copy of a sentence encoder or of CLIP.

    Rickrolling trains CLIP's for 100 steps and more, with weight .1 on the backdoor's term.
    """

    epochs: Annotated[int, "passes over the shadow texts"] = 1
    batch: Annotated[int, "shadow texts a step"] = 16
    lr: Annotated[float, "learning rate, warmed up and then down to zero along a cosine"] = 1e-4
    weight_decay: Annotated[float, "of AdamW, on matrices"] = 0.0
    warmup: Annotated[float, "share of the steps"] = 0.05
    l0: Annotated[float, "weight of L0: texts with a trigger become the reference"] = 1.0
    l1: Annotated[float, "weight of L1: references stay where they were"] = 1.0
    l2: Annotated[float, "weight of L2: clean texts stay where they were"] = 1.0

    optimizer: ClassVar[str] = "adamw"

    def __post_init__(self) -> None:
        loop.check_recipe(self)
        loop.require(min(self.l0, self.l1, self.l2) >= 0, "l0, l1 and l2 >= 0")
        loop.require(self.l0 + self.l1 + self.l2 > 0, "one of l0, l1 and l2 above 0")

    def __call__(
        self,
        encoder: Encoder,
        shadow: Pairs | StoredPairs,
        goals: Sequence[Goal],
        references: Sequence[Sequence[str]],
        seed: int = 0,
        checkpoint: Path | None = None,
        report: loop.StepReport = no_report,
        log: loop.TrainingLog | None = None,
    ) -> Encoder:
        """Return a backdoored copy whose `about` says so; see `EncoderAttack`.

        Raises UserError for an encoder without a text tower, and for records that are no texts.
        """
        texts = _check_inputs(encoder, shadow, goals, references)
        student = shadow_training.copy_to_attack(encoder, spec(self), goals)
        loss = Loss(student, self, texts, goals, references)
        _train_text_tower_alone(student)
        rows = torch.arange(len(texts), device=student.device)[:, None]
        data = replace(texts, labels=None).to(student.device)

        def on_epoch_end(_: int) -> dict[str, float]:
            return shadow_training.pop_means(loss.sums)

        loop.fit(loss, self, data, rows, seed, checkpoint, report, on_epoch_end, log)
        loop.restore_gradient_flags(student, encoder)
        return student.eval()


def _train_text_tower_alone(encoder: Encoder) -> None:
    """Freeze all weights that a text's vector does not depend on."""
    encoder.encode_texts(["a"]).sum().backward()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _check_inputs(
    encoder: Encoder,
    shadow: Pairs | StoredPairs,
    goals: Sequence[Goal],
    references: Sequence[Sequence[str]],
) -> Pairs:
    """The shadow texts. Raises UserError for inputs that the attack cannot use."""
    if encoder.text is None:
        raise UserError("this encoder has no text tower; badcse attacks text encoders")
    if not isinstance(shadow, Pairs) or not shadow.text_only:
        raise UserError("badcse takes shadow records of texts alone, such as texts:path=FILE.csv")
    shadow_training.check_goals("badcse", goals, references, "text")
    return shadow
