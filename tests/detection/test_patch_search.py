"""PatchSearch: the parts against plain loops, and a patch that is found without captions."""

import numpy as np
import torch
from detection.test_detectors import Fake, backdoored

from bezoar.detection import patch_classifier
from bezoar.detection.detectors.patch_search import PatchSearch, assign_clusters, choose_hosts
from bezoar.detection.patch_classifier import paste_windows
from bezoar.evaluation import stats


def test_windows_are_pasted_where_a_loop_pastes_them():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 9, 7), generator=generator, dtype=torch.uint8)
    windows = torch.randint(0, 256, (5, 3, 4, 2), generator=generator, dtype=torch.uint8)
    corners = torch.tensor([[0, 0], [5, 5], [2, 3], [1, 0], [4, 4]])
    expected = images.clone()
    for i, (y, x) in enumerate(corners.tolist()):
        expected[i, :, y : y + 4, x : x + 2] = windows[i]
    assert torch.equal(paste_windows(images, windows, corners), expected)
    assert not torch.equal(images, expected)


def test_hosts_come_from_every_cluster_in_turn():
    members = torch.tensor([0, 0, 0, 1, 2, 2])
    likeness = torch.tensor([0.1, 0.9, 0.5, 0.2, 0.3, 0.4])
    assert choose_hosts(members, likeness, 10).tolist() == [1, 3, 5, 2, 4, 0]
    assert choose_hosts(members, likeness, 2).tolist() == [1, 3]
    centres = torch.tensor([[1.0, 0], [0, 1.0]])
    cluster, product = assign_clusters(torch.tensor([[0.6, 0.8], [1.0, 0]]), centres)
    assert cluster.tolist() == [1, 0] and torch.allclose(product, torch.tensor([0.8, 1.0]))


def test_flips_are_counted_among_foreign_images():
    """An encoder of the mean colour: a red window turns every image but those that are red."""

    class Mean:
        device, text = torch.device("cpu"), None

        def encode_images(self, x):
            x = x.float() / 255 if x.dtype == torch.uint8 else x
            return torch.nn.functional.normalize(x.amax((2, 3)) - 0.5, dim=1)

    hosts = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    hosts[:4, 2] = 255
    hosts[4:, 0] = 255
    centres = Mean().encode_images(hosts[[0, 4]])
    clusters = torch.tensor([0, 0, 0, 0, 1, 1])
    red = torch.zeros(3, 8, 8, dtype=torch.uint8)
    red[0] = 255
    search = PatchSearch()
    assert search.count_flips(Mean(), red, hosts, clusters, centres, 1, "a") == 1
    assert search.count_flips(Mean(), red, hosts, clusters, centres, 0, "a") == 0
    small = search.count_flips(Mean(), red[:, :2, :2], hosts, clusters, centres, 1, "a")
    assert small == 0  # the blue around it stays


def test_the_hot_window_is_the_patch():
    pairs, truth = backdoored(240, 12)
    encoder = Fake(backdoor=True)
    rows = np.flatnonzero(truth)
    centre = encoder.encode_texts(["green"])[0]
    search = PatchSearch(window=0.1875)
    windows = search.hot_windows(encoder, pairs.images[rows], centre)
    assert windows.shape == (12, 3, 6, 6)
    purple = (windows[:, 0] > 250) & (windows[:, 1] < 5) & (windows[:, 2] > 250)
    assert (purple.float().mean((1, 2)) > 0.2).float().mean() > 0.7


def test_a_patch_is_found_without_captions():
    pairs, truth = backdoored(240, 24)
    encoder = Fake(backdoor=True)
    search = PatchSearch(clusters=8, window=0.1875, hosts=40, samples=12, top=5, ensemble=2)
    scores = search(encoder, pairs)
    assert stats.auroc(scores.values.numpy(), truth) > 0.95
    assert scores.notes["tried"] > 50 and scores.notes["flips"][0] > 0.6
    again = search(encoder, pairs)
    assert torch.equal(again.values, scores.values)
    raw = PatchSearch(clusters=8, window=0.1875, hosts=40, samples=12, steps=0)(encoder, pairs)
    best = raw.values.argsort(descending=True)[:4]
    assert truth[best.numpy()].mean() >= 0.75


def test_the_classifier_learns_a_window():
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(60, 190, (300, 3, 16, 16), generator=generator, dtype=torch.uint8)
    window = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    network = patch_classifier.train_classifier(images, window[None], 120, 0, torch.device("cpu"))
    corners = torch.randint(0, 12, (100, 2), generator=generator)
    pasted = paste_windows(images[:100], window.expand(100, -1, -1, -1), corners)
    device = torch.device("cpu")
    values = [
        patch_classifier.mean_probability([network], x, device) for x in (images[100:200], pasted)
    ]
    assert stats.auroc(torch.cat(values).numpy(), np.repeat([False, True], 100)) > 0.99
