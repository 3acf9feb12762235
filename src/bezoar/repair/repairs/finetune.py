"""Fine-tuning on clean records with any objective: cleanclip, par, clip, supervised, simclr."""

from dataclasses import replace
from typing import Annotated, Any, ClassVar

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.progress import ProgressReport, no_report
from bezoar.registry import method
from bezoar.repair import rate_ladder

CLEANCLIP = "cleanclip:epochs=12,anchor=4,adversarial=18"
SIMCLR = "simclr:epochs=8"


@method
class Finetune:
    """All weights are trained further, at a rate chosen from `lrs`, not the objective's own.

    CleanCLIP (ICCV 2023) where the objective is `cleanclip`, PAR (arXiv 2412.00727) where it is
    `par`.
    """

    objective: Annotated[
        str,
        "loss and recipe; auto: cleanclip, simclr without text, supervised for a classifier with "
        "its own head",
    ] = "auto"
    lrs: Annotated[
        tuple[float, ...], "learning rates, tried from the largest down until one keeps the score"
    ] = (8e-3, 4e-3, 2e-3, 1e-3)
    tolerance: Annotated[float, "how far the clean validation score may fall"] = 0.02

    needs: ClassVar[tuple[str, ...]] = ("validation", "report", "log")

    def __post_init__(self) -> None:
        rate_ladder.check_rates(self.lrs, self.tolerance)
        if self.objective != "auto":
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
        """Fine-tune a copy. Raises UserError if objective, data and encoder do not fit."""
        objective = rate_ladder.select_objective(
            self.objective, encoder, clean, with_text=CLEANCLIP, alone=SIMCLR
        )
        tokens = rate_ladder.tokenize_for(encoder, objective, clean)

        def make(lr: float) -> Encoder:
            recipe = replace(objective, lr=lr)
            return rate_ladder.train_copy(
                encoder, recipe, recipe, clean, tokens, seed, report, f"finetune at {lr:g}"
            )

        return rate_ladder.repair_with_ladder(self, encoder, clean, validation, make, log)
