"""Checks at test time: does this input carry a trigger?

A check scores every image; higher is more suspicious. A score depends on that image and on the
clean images alone, so checks go into any program:

    check = MaskingPath(paths=4)                            # or registry.make("check",
    "masking_path:paths=4") scores = check(encoder, images, clean=clean)            # images, clean:
    Pairs; scores.values float32 (N,)

A check of texts has `reads_texts = True`; all others are asked of images alone. `needs` names the
keyword arguments of a check; `CheckArguments` has their types. A threshold is the caller's;
`bezoar check` takes a quantile of clean images that calibrated nothing.
"""

from typing import Any, Protocol, TypedDict

from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation.classifiers import Classifier
from bezoar.evaluation.scores import Scores
from bezoar.progress import ProgressReport

IMAGES_AT_ONCE = 1024  # altered images that go through the encoder at once


class CheckArguments(TypedDict, total=False):
    """What a check may ask for by `needs`."""

    clean: Pairs  # a few hundred clean images that it is calibrated on
    classifier: Classifier  # reads images as classes
    report: ProgressReport  # called with the progress


class Check(Protocol):
    """Scores images as they would arrive at an encoder; gets the arguments that `needs` names."""

    def __call__(self, encoder: Encoder, images: Pairs, *args: Any, **kwargs: Any) -> Scores: ...
