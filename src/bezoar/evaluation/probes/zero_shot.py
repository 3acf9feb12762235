"""Zero-shot classification by the text tower's prompts (Radford et al. 2021, section 3.1)."""

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

BATCH = 512  # images at a time


@method
class ZeroShot:
    """CA/BA and ASR by the text tower: a class is the mean of its prompts' vectors."""

    templates: Annotated[str, "simple (5), openai (80), or a text that holds {}"] = "simple"

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Return the measures of `TestViews.measures`, without a prefix; see `Probe`."""
        views = success.TestViews.of(encoder, test, goals, victims)
        head = self.head(encoder, test.classes)
        return views.measures(lambda z: z @ head.T)

    def head(self, encoder: Encoder, classes: Sequence[str]) -> Tensor:
        """Return each class's mean prompt vector over the templates, as unit rows (C, D)."""
        encoder.eval()
        prompts = captions.prompt_templates(self.templates)
        with torch.inference_mode():
            vectors = encoder.encode_texts([t.format(c) for c in classes for t in prompts])
        return F.normalize(vectors.unflatten(0, (len(classes), len(prompts))).mean(1), dim=-1)

    @torch.inference_mode()
    def similarities(self, encoder: Encoder, head: Tensor, images: Tensor) -> Tensor:
        """Return the cosines, float32 (N, C), of images uint8 (N, 3, H, W) with a head."""
        return torch.cat([encoder.encode_images(x) @ head.T for x in images.split(BATCH)])
