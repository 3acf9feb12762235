"""SafeCLIP: its mixture against scikit-learn's, its warm-up and its ranking."""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from detection.test_detectors import Fake, clean
from sklearn.mixture import GaussianMixture

from bezoar import registry
from bezoar.data.pairs import Pairs
from bezoar.detection import training_traces
from bezoar.detection.detectors import safeclip
from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.training.augmentation import Chance

CPU = torch.device("cpu")
NETWORK = "clip_small:width=4,dim=16"


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return clean(100)


def make(text: str):
    return registry.make("detector", text)


def test_odds_are_those_of_sklearns_mixture():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0.1, 0.1, 80), rng.normal(0.6, 0.15, 400)])
    low, high = (part for part in np.array_split(np.sort(x), 2))
    mixture = GaussianMixture(
        2,
        tol=1e-12,
        max_iter=5000,
        reg_covar=0,
        means_init=[[low.mean()], [high.mean()]],
        weights_init=[0.5, 0.5],
        precisions_init=[[[1 / low.var()]], [[1 / high.var()]]],
    ).fit(x[:, None])
    p = mixture.predict_proba(x[:, None])[:, mixture.means_.argmin()]
    result = safeclip.lower_component_odds(x)
    assert scipy.special.expit(result) == pytest.approx(p, abs=1e-4)
    order = rng.permutation(len(x))
    assert np.array_equal(safeclip.lower_component_odds(x[order]), result[order])
    with pytest.raises(UserError, match="nothing to split"):
        safeclip.lower_component_odds(np.ones(9))


def test_odds_of_few_values_are_finite():
    for values in ([0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.1] * 50 + [0.9]):
        assert np.isfinite(safeclip.lower_component_odds(np.array(values)).astype(np.float32)).all()


def test_thinned_drops_tokens_moves_up_the_others_and_keeps_the_largest():
    tokens = torch.tensor([[5, 9, 2, 7, 3, 0, 0], [4, 0, 0, 0, 0, 0, 0], [0] * 7])
    drawn = torch.rand(3, 7, generator=torch.Generator().manual_seed(4))
    result = safeclip.drop_tokens(tokens, 0.5, Chance(torch.Generator().manual_seed(4)))
    for row, uniform, thin in zip(tokens.tolist(), drawn.tolist(), result.tolist(), strict=True):
        left = [t for t, u in zip(row, uniform, strict=True) if t and (u >= 0.5 or t == max(row))]
        assert thin == left + [0] * (7 - len(left))
    assert torch.equal(safeclip.drop_tokens(tokens, 0.0, Chance(torch.Generator())), tokens)


def test_the_warm_up_never_lets_an_image_meet_a_text(pairs):
    study = training_traces.SmallModel.build(pairs, NETWORK, 0, CPU)
    apart = safeclip.SeparateContrast(study.encoder, 0.1, 0.2)
    images, tokens = pairs.images[:8], study.tokens[:8]

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return apart(images, tokens, Chance(torch.Generator().manual_seed(0)))

    image = torch.autograd.grad(loss(tokens), study.encoder.image.parameters(), retain_graph=True)
    other = torch.autograd.grad(loss(tokens.flip(0)), study.encoder.image.parameters())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(image, other, strict=True))
    a, b = F.normalize(torch.randn(2, 5, 3), dim=2)
    logits = (a @ b.T / 0.1).double().exp()
    plain = [-math.log(logits[i, i] / m.sum()) for i in range(5) for m in (logits[i], logits[:, i])]
    assert float(apart.contrast(a, b)) == pytest.approx(sum(plain) / 10, rel=1e-4)


def test_safeclip_ranks_foreign_captions_first():
    pairs = clean(400)
    rng = np.random.default_rng(0)
    wrong = np.zeros(400, bool)
    wrong[rng.choice(400, 30, replace=False)] = True
    names = ("red", "green", "blue", "yellow")
    captions = [
        c.replace(names[k], names[(k + 1) % 4]) if w else c
        for c, k, w in zip(pairs.captions, pairs.labels.tolist(), wrong, strict=True)
    ]
    pairs = replace(pairs, captions=tuple(captions))
    scores = make("safeclip:epochs=1,batch=32,together=0.005,network=(clip_small:width=8,dim=16)")(
        Fake(), pairs
    )
    assert scores.ids == pairs.ids and stats.auroc(scores.values.numpy(), wrong) > 0.8
