"""The classifier that came with the encoder's weights (BadNets, Gu et al. 2017)."""

from collections.abc import Sequence

from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import classifiers, success
from bezoar.evaluation.probes import add_prefix
from bezoar.evaluation.scores import Measure
from bezoar.registry import method


@method
class Own:
    """CA/BA and ASR by the network's head. A class that the test set lacks counts as wrong."""

    def __call__(
        self,
        encoder: Encoder,
        train: Pairs | None,
        test: Pairs,
        goals: Sequence[Goal] = (),
        victims: Pairs | None = None,
    ) -> dict[str, Measure]:
        """Return the measures of `TestViews.measures` as `own.*`; see `Probe`.

        Raises UserError if the encoder has no head of its own, or one with other classes.
        """
        classifier = classifiers.own_classifier(encoder, test.classes)
        how = f"; {classifier.how}, {len(classifier.classes)} classes"
        logits = classifiers.LogitEncoder(classifier)
        views = success.TestViews.of(logits, test, goals, victims)
        return add_prefix("own", views.measures(lambda z: z, how))
