"""Fine-tuning on clean records with any objective: cleanclip, par, clip, ..., or simclr for encoders without a text tower."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.heads import ProgressReport, no_report
from bezoar.registry import method, spec
from bezoar.repair import rate_ladder


@method
class Finetune:
    """All weights are trained on, from where they are. The objective's own learning rate gives way to the ladder's.

    CleanCLIP (ICCV 2023) where the objective is `cleanclip`, PAR (arXiv 2412.00727) where it is `par`.
    """

    objective: Annotated[str, "loss and recipe: see `bezoar list objective`"] = (
        "cleanclip:epochs=12,anchor=4"
    )
    lrs: Annotated[
        tuple[float, ...], "learning rates, tried from the largest down (see `ladder`)"
    ] = (8e-3, 4e-3, 2e-3, 1e-3)
    tolerance: Annotated[float, "how far the clean validation score may fall"] = 0.02

    needs: ClassVar[tuple[str, ...]] = ("validation", "report", "log")

    def __post_init__(self) -> None:
        rate_ladder.check_rates(self.lrs, self.tolerance)
        registry.make("objective", self.objective)

    def __call__(
        self,
        encoder: Encoder,
        clean: Pairs,
        seed: int,
        validation: Pairs,
        report: ProgressReport = no_report,
        log: dict[str, Any] | None = None,
    ) -> Encoder:
        """A copy, tuned. Raises UserError where objective, data and encoder do not fit each other."""
        recipe = registry.make("objective", self.objective)
        tokens = rate_ladder.tokenize_for(encoder, recipe, clean)

        def make(lr: float) -> Encoder:
            chosen = replace(recipe, lr=lr)
            return rate_ladder.train_copy(
                encoder, chosen, chosen, clean, tokens, seed, report, f"finetune at {lr:g}"
            )

        ruler = rate_ladder.ValidationMetric.of(encoder, clean, validation)
        return rate_ladder.mark_repaired(
            rate_ladder.train_at_largest_rate(encoder, ruler, self.lrs, self.tolerance, make, log),
            spec(self),
        )
