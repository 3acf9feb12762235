"""Zero-shot classification: an image is the class whose prompts it agrees with most (Radford et al. 2021, section 3.1)."""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar.attacks import captions
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import success
from bezoar.evaluation.scores import Measure
from bezoar.registry import method


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
        seen = success.TestViews.of(encoder, test, goals, victims, self.batch)
        head = self.head(encoder, test.classes)
        return seen.measures(lambda z: z @ head.T)

    def head(self, encoder: Encoder, classes: Sequence[str]) -> Tensor:
        """(C, D) unit rows: normalised mean over the templates of normalised prompt vectors."""
        encoder.eval()
        prompts = captions.prompt_templates(self.templates)
        with torch.inference_mode():
            rows = encoder.encode_texts([t.format(c) for c in classes for t in prompts])
        return F.normalize(rows.unflatten(0, (len(classes), len(prompts))).mean(1), dim=-1)

    @torch.inference_mode()
    def similarities(self, encoder: Encoder, head: Tensor, images: Tensor) -> Tensor:
        """float32 (N, C) cosines."""
        return torch.cat([encoder.encode_images(x) @ head.T for x in images.split(self.batch)])
