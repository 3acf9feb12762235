"""Probes against plain loops; the definitions of CA, ASR and z in one place."""

import numpy as np
import pytest
import torch

from bezoar import registry
from bezoar.errors import UserError
from bezoar.pairs import Pairs
from bezoar.plan import Goal
from bezoar.probes.z_score import z_scores

CLASSES = ("red", "green", "blue")


class Color:
    """Reads an image as the mean of its colours, and a text as the colour it names; a white corner means blue."""

    device = torch.device("cpu")

    def eval(self):
        return self

    def images(self, x):
        z = x.float().mean((2, 3)) / 255 + 1e-3
        white = (x[:, :, -3:-1, -3:-1] == 255).flatten(1).all(1)
        z = torch.where(white[:, None], torch.tensor([0.0, 0.1, 1.0]), z)
        return z / z.norm(dim=1, keepdim=True)

    def texts(self, captions):
        return torch.stack([torch.eye(3)[next((i for i, c in enumerate(CLASSES) if c in t), 0)] for t in captions])


def data(n=30, wrong=6):
    labels = torch.arange(n) % 3
    shown = labels.clone()
    shown[:wrong] = (shown[:wrong] + 1) % 3
    images = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    images[torch.arange(n), shown] = 200
    return Pairs(images, tuple(f"a {CLASSES[i]} thing" for i in labels), labels, tuple(map(str, range(n))), CLASSES)


BLUE = Goal("blue", "patch:size=2,fill=white,place=corner,margin=1", (), 5)


def test_zero_shot_counts_as_a_plain_loop_does():
    out = registry.make("probe", "zero_shot")(Color(), None, data(), [BLUE])
    assert out["clean_accuracy"].value == pytest.approx(24 / 30) and out["clean_accuracy"].n == 30
    assert out["attack_success"].value == 1.0 and out["attack_success"].n == 20, "the target class is left out"
    assert out["attack_success_all"].n == 30
    assert out["attack_success_without_trigger"].value == pytest.approx(2 / 20)
    assert out["poisoned_accuracy"].value == pytest.approx(10 / 30)
    assert out["target_rank"].value == 1.0 and out["target_top5"].value == 1.0
    m = out["clean_accuracy"]
    assert m.low < m.value < m.high and "clean test" in m.how


def test_targeted_success_by_number_of_captions():
    victims = data(6, 0)
    goals = [Goal(CLASSES[i % 3] if i < 2 else CLASSES[(i + 1) % 3], None, (str(i),), 1 if i < 3 else 4) for i in range(6)]
    out = registry.make("probe", "zero_shot")(Color(), None, data(), goals, victims)
    assert out["targeted_success@1"].value == pytest.approx(2 / 3) and out["targeted_success@1"].n == 3
    assert out["targeted_success@4"].value == 0 and out["targeted_success@4"].high > 0.3


def test_zero_shot_refuses_foreign_targets_and_data_without_classes():
    probe = registry.make("probe", "zero_shot")
    with pytest.raises(UserError, match="'pink' is none of the test set's classes: red, green, blue"):
        probe(Color(), None, data(), [Goal("pink", BLUE.trigger)])
    bare = Pairs(data().images, data().captions, None, data().ids)
    with pytest.raises(UserError, match="needs a test set with classes"):
        probe(Color(), None, bare)


def test_z_is_definition_one_without_self_pairs():
    g = np.random.default_rng(0)
    clean, moved = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in g.normal(size=(2, 12, 5)))
    a = [clean[i] @ clean[j] for i in range(12) for j in range(12) if i != j]
    b = [moved[i] @ moved[j] for i in range(12) for j in range(12) if i != j]
    out = z_scores(clean, moved)
    assert out["similarity_clean"].value == pytest.approx(np.mean(a))
    assert out["similarity_triggered"].value == pytest.approx(np.mean(b))
    assert out["z_std"].value == pytest.approx((np.mean(b) - np.mean(a)) / np.std(a))
    assert out["z_var"].value == pytest.approx((np.mean(b) - np.mean(a)) / np.var(a))


def test_z_jackknife_is_the_leave_one_out_loop():
    g = np.random.default_rng(1)
    clean, moved = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in g.normal(size=(2, 10, 4)))
    left = [z_scores(np.delete(clean, i, 0), np.delete(moved, i, 0))["z_std"].value for i in range(10)]
    error = np.sqrt(9 / 10 * ((np.array(left) - np.mean(left)) ** 2).sum())
    m = z_scores(clean, moved)["z_std"]
    assert (m.high - m.low) / 2 == pytest.approx(1.96 * error)


def test_retrieval_recalls_as_a_plain_loop_does():
    test = data(9, 3)
    out = registry.make("probe", "retrieval")(Color(), None, test, [BLUE])
    e = Color()
    cosines = e.images(test.images) @ e.texts(test.captions).T
    ranks = [int((cosines[i] > cosines[i, i]).sum()) for i in range(9)]
    assert out["image_to_text_recall@1"].value == pytest.approx(np.mean([r < 1 for r in ranks]))
    assert out["attack_success"].value == 1.0 and out["attack_success"].n == 6
    with pytest.raises(UserError, match="no held-out caption holds the target 'pink'"):
        registry.make("probe", "retrieval")(e, None, test, [Goal("pink", BLUE.trigger)])


def test_retrieval_knows_several_captions_of_one_image():
    test = data(6, 0)
    ids = tuple(f"{i // 2}#{i % 2}" for i in range(6))
    images = test.images[torch.tensor([0, 0, 1, 1, 2, 2])]
    captions = tuple(f"{w} {CLASSES[i // 2]}" for i, w in enumerate(["a", "the"] * 3))
    out = registry.make("probe", "retrieval")(Color(), None, Pairs(images, captions, None, ids))
    assert out["image_to_text_recall@1"].n == 3 and out["text_to_image_recall@1"].n == 6
    assert out["image_to_text_recall@1"].value == out["text_to_image_recall@1"].value == 1.0
