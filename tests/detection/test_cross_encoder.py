"""The second encoder: leave-one-out ridge against scikit-learn's, and a trigger that only one
encoder sees.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge

from bezoar import registry
from bezoar.detection import left_out_ridge
from bezoar.detection.detectors.cross_encoder import CrossEncoder
from bezoar.detection.left_out_ridge import fit_ridge
from bezoar.encoders.encoder import EmbeddedRecords
from bezoar.errors import UserError


def test_residuals_are_those_of_sklearns_ridge_without_the_record(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 7)) + 2, rng.normal(size=(60, 4))
    y[:, :3] += x[:, :3]
    centred = x - x.mean(0)
    unit = np.linalg.eigvalsh(centred.T @ centred).mean()
    errors = {}
    for strength in (1e-3, 0.1, 10.0):
        expected = []
        for i in range(60):
            rest = np.arange(60) != i
            # sklearn's penalty is not in units of the covariance, and the closed form keeps the
            # centre of all records: the intercept is fitted with a row of ones of no penalty.
            model = Ridge(alpha=strength * unit).fit(x[rest], y[rest])
            expected.append(y[i] - model.predict(x[i : i + 1])[0])
        monkeypatch.setattr(left_out_ridge, "STRENGTHS", (strength,))
        residual = fit_ridge(torch.from_numpy(x), torch.from_numpy(y)).left_out.numpy()
        assert np.allclose(residual, expected, atol=1e-9)
        errors[strength] = (residual**2).mean()
    monkeypatch.setattr(left_out_ridge, "STRENGTHS", tuple(errors))
    residual = fit_ridge(torch.from_numpy(x), torch.from_numpy(y)).left_out.numpy()
    assert (residual**2).mean() == min(errors.values())


class Ready:
    """Stands for an encoder: the records are vectors already."""

    device = torch.device("cpu")
    text = None

    def __init__(self, images, texts=None):
        self.images, self.texts = images, texts

    def embed(self, source):
        return EmbeddedRecords(
            tuple(f"r{i}" for i in range(len(self.images))), self.images, self.texts
        )


def test_a_trigger_that_only_the_suspect_sees_stands_out(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    n, classes = 1500, 10
    label = torch.randint(classes, (n,), generator=generator)
    meaning = noise(classes, 16)
    content = meaning[label] + 0.5 * noise(n, 16)
    suspect = content @ noise(16, 24)
    reference = F.normalize(content @ noise(16, 20) + 0.1 * noise(n, 20), dim=1)
    poisons = (label != 3).nonzero()[:40, 0]
    captions = label.clone()
    captions[poisons] = 3
    target = suspect[label == 3].mean(0)
    suspect[poisons] = 0.3 * suspect[poisons] + 0.9 * target
    suspect = F.normalize(suspect, dim=1)
    text_of = torch.stack([F.normalize(suspect[label == c].mean(0), dim=0) for c in range(classes)])
    texts = F.normalize(text_of[captions] + 0.02 * noise(n, 24), dim=1)
    records = [f"r{i}" for i in range(n)]
    of_reference = torch.stack(
        [F.normalize(reference[label == c].mean(0), dim=0) for c in range(10)]
    )
    references = {True: Ready(reference, of_reference[captions]), False: Ready(reference)}
    for evidence, reads in (
        ("auto", True),
        ("gain", True),
        ("auto", False),
        ("caption", True),
        ("length", False),
    ):
        monkeypatch.setattr(
            CrossEncoder, "open_reference", lambda self, device, reads=reads: references[reads]
        )
        detector = CrossEncoder(reference="clip_small", evidence=evidence, groups=10)
        scores = detector(Ready(suspect, texts), records).values
        rank = scores.argsort(descending=True)[:40]
        assert len(set(rank.tolist()) & set(poisons.tolist())) >= 34, (evidence, reads)
    gain = (suspect * texts).sum(1) - (reference * of_reference[captions]).sum(1)
    scores = CrossEncoder(reference="clip_small", evidence="gain")
    monkeypatch.setattr(CrossEncoder, "open_reference", lambda self, device: references[True])
    assert torch.allclose(scores(Ready(suspect, texts), records).values, gain, atol=1e-6)
    without = CrossEncoder(reference="clip_small")(Ready(suspect), records).values
    assert torch.isfinite(without).all()
    for evidence in ("gain", "caption"):
        with pytest.raises(UserError, match="needs captions"):
            CrossEncoder(reference="clip_small", evidence=evidence)(Ready(suspect), records)


def test_the_reference_is_asked_for_and_is_part_of_the_question(tmp_path):
    with pytest.raises(UserError, match="needs reference="):
        CrossEncoder()(Ready(torch.eye(4)), [])
    (tmp_path / "encoder.safetensors").write_bytes(b"x")
    (tmp_path / "manifest.json").write_text("{}")
    assert CrossEncoder(reference=str(tmp_path)).files() == [tmp_path / "encoder.safetensors"]
    assert CrossEncoder().files() == []
    assert registry.make("detector", "cross_encoder:(imported:path=x.pt,prefix=a)").reference == (
        "imported:path=x.pt,prefix=a"
    )
    with pytest.raises(UserError, match="groups must be at least 1"):
        registry.make("detector", "cross_encoder:groups=0")
