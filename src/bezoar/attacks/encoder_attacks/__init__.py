"""Attacks on an encoder's weights. One method a file, each an `EncoderAttack`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.encoders.encoder import Encoder
from bezoar.training.loop import StepReport, TrainingLog


class EncoderAttack(Protocol):
    """An attack that makes a backdoored copy of an encoder."""

    def __call__(
        self,
        encoder: Encoder,
        shadow: Pairs | StoredPairs,
        goals: Sequence[Goal],
        references: Sequence[Any],
        seed: int = 0,
        checkpoint: Path | None = None,
        report: StepReport = ...,
        log: TrainingLog | None = None,
    ) -> Encoder:
        """Put a backdoor into a copy of an encoder.

        Args:
            encoder: the clean encoder. It is not changed.
            shadow: images or texts to attack with. Labels, and captions of images, are not used.
            goals: the triggers and their targets.
            references: the reference inputs of each goal: uint8 (R, 3, H, W), or R texts.
            seed: seed of the order of the images and of every draw.
            checkpoint: file for the state of the training; an existing one is resumed.
            report: called with the step, the number of steps and the loss.
            log: filled during training.

        Returns:
            A copy whose `about` says `poisoned` and names the attack and its goals.

        Raises:
            UserError: if the encoder cannot be attacked, or the goals, references and shadow images
                do not fit together.
        """
        ...
