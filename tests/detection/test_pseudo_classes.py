"""Pseudo-classes and the detectors that look within them, against scikit-learn and plain loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detection.test_density import VectorEncoder, rows, scored, source_of
from sklearn import cluster, decomposition

from bezoar.data.pairs import Pairs
from bezoar.detection import pseudo_classes
from bezoar.detection.detectors import activation_clustering, read_captions
from bezoar.errors import UserError
from bezoar.evaluation import kmeans, stats


def captioned(n: int = 300) -> tuple[torch.Tensor, list[str]]:
    """Three kinds of vectors, each near that of its word."""
    kind = torch.arange(n) % 3
    z = torch.eye(26)[kind] + 0.05 * rows(n, d=26)
    return torch.nn.functional.normalize(z, dim=1), [
        f"A photo of the {('apple', 'bear', 'cat')[k]} in 3 x" for k in kind
    ]


def test_pseudo_classes_by_words_and_by_clusters_agree():
    z, captions = captioned()
    assert pseudo_classes.frequent_words([*captions, "bear bear"], 5) == ["bear", "apple", "cat"]
    result = {}
    for how, source in (
        ("auto", source_of(z, z, captions)),
        ("words", source_of(z, z, captions)),
        ("clusters", source_of(z, None)),
        ("auto", source_of(z, None)),
    ):
        label = pseudo_classes.assign_classes(VectorEncoder(), source, source.e, how, 3, 0)
        result[how, source.e.texts is None] = label
        assert all(len(label[i::3].unique()) == 1 for i in range(3)) and len(label.unique()) == 3
    assert torch.equal(result["auto", False], result["words", False])
    assert torch.equal(result["auto", True], result["clusters", True])
    with pytest.raises(UserError, match="need captions and an encoder"):
        pseudo_classes.assign_classes(VectorEncoder(), source_of(z), source_of(z).e, "words", 3, 0)
    with pytest.raises(UserError, match="stop words"):
        pseudo_classes.assign_classes(
            VectorEncoder(), source_of(z, z, ["the a"] * 300), source_of(z, z).e, "words", 3, 0
        )


def test_captions_of_a_stream_are_read_from_its_batches():
    _, captions = captioned(20)

    class Stream:
        def batches(self, size):
            for a in range(0, 20, 6):
                n = len(captions[a : a + 6])
                images = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
                yield Pairs(images, tuple(captions[a : a + 6]), None, tuple(map(str, range(n))))

    assert list(read_captions(Stream())) == captions
    assert read_captions(SimpleNamespace(captions=captions)) is captions


def test_k_means_is_as_good_as_sklearns():
    x = rows(500, d=4, seed=3)

    def inertia(centres) -> float:
        return float(
            torch.cdist(x.double(), torch.as_tensor(centres).double()).amin(1).square().sum()
        )

    theirs = cluster.KMeans(6, n_init=1, random_state=0).fit(x.numpy())
    assert inertia(kmeans.cluster_centres(x, 6, 0)) < 1.1 * inertia(theirs.cluster_centers_)
    assert len(kmeans.cluster_centres(x[:1].expand(50, -1), 6, 0)) == 1
    assert len(kmeans.cluster_centres(x[:4], 6, 0)) == 4


@pytest.mark.parametrize("matrices", [1, 1 << 26])
def test_axes_and_projections_are_sklearns(matrices, monkeypatch):
    monkeypatch.setattr(pseudo_classes, "MATRIX_VALUES", matrices)
    monkeypatch.setattr(pseudo_classes, "BLOCK", 57)
    z, label = rows(200, d=7), torch.arange(200) % 3 * 2  # classes 1 and 3 are empty
    mean, axis = pseudo_classes.principal_axes(z, label, 2, "cpu")
    y = pseudo_classes.project_records(z, label, mean, axis)
    for c in (0, 2, 4):
        theirs = decomposition.PCA(2).fit(z[label == c].double().numpy())
        assert mean[c].numpy() == pytest.approx(theirs.mean_)
        expected = theirs.transform(z[label == c].double().numpy())
        assert np.abs(y[label == c].numpy()) == pytest.approx(np.abs(expected), abs=1e-6)


def test_spectral_is_the_plain_one():
    z = rows(150, d=5)
    source = source_of(z)
    label = pseudo_classes.assign_classes(
        VectorEncoder(), source, source.e, "clusters", 4, 0
    ).numpy()
    expected = np.zeros(150)
    for c in set(label):
        x = z[label == c].double().numpy()
        x = x - x.mean(0)
        squared = (x @ np.linalg.svd(x)[2][0]) ** 2
        expected[label == c] = squared / squared.mean()
    assert scored("spectral:count=4", z) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_activation_clustering_is_the_plain_one():
    z = rows(150, d=5)
    z[:9] = torch.nn.functional.normalize(z[:9] * 0.1 + torch.tensor([0, 0, 0, 0, 1.0]), dim=1)
    x = z.double().numpy()
    y = decomposition.PCA(3).fit_transform(x)
    theirs = cluster.KMeans(2, n_init=50, random_state=0).fit(y)
    small = np.bincount(theirs.labels_).argmin()
    to = np.linalg.norm(y[:, None] - theirs.cluster_centers_[None], axis=2)
    nearness = (to[:, 1 - small] - to[:, small]) / to.max(1)
    expected = nearness * np.abs(nearness).mean() * (1 - 2 * (theirs.labels_ == small).mean())
    result = scored("activation_clustering:count=1,dims=3", z)
    assert result == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_two_means_is_no_worse_than_sklearns_best_of_fifty():
    for seed in range(4):
        y = rows(120, d=4, seed=seed).double().numpy()
        centres = np.stack(activation_clustering.split_in_two(y))
        theirs = cluster.KMeans(2, n_init=50, random_state=0).fit(y)
        distance = np.linalg.norm(y[:, None] - centres, axis=2)
        assert (distance.min(1) ** 2).sum() < 1.02 * theirs.inertia_
        sizes = np.bincount(distance.argmin(1), minlength=2)
        assert sizes[0] <= sizes[1]


def test_a_planted_part_of_a_class_is_found_by_both():
    z, captions = captioned(600)
    truth = np.zeros(600, bool)
    truth[np.arange(0, 120, 3)] = True  # 40 of the 200 apples
    z[truth] = torch.nn.functional.normalize(z[truth] + 0.5 * torch.eye(26)[20], dim=1)
    for name in ("spectral", "activation_clustering"):
        assert stats.auroc(scored(f"{name}:count=3", z, z, captions), truth) > 0.95, name
