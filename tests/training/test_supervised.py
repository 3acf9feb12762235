"""Supervised training: classes of poisoned records, the loss against its formula, a run from data to a classifier."""

import math

import pytest
import torch
from training.toys import toy_pairs

from bezoar import Settings, execute, registry
from bezoar.data.pairs import Pairs
from bezoar.data.randomness import generator
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.training.augmentation import Chance
from bezoar.training.objectives.supervised import name_classes
from bezoar.verbs.poison import Poison
from bezoar.verbs.train import Train

ARCHITECTURE = (
    "residual:order=pre,bottleneck=false,kernel=3,stem=4,counts=1/1,inner=4/8,outer=4/8,groups=1,"
    "projection=true,final=true,pool=1,classes={classes}"
)


def network(classes: int) -> str:
    architecture = ARCHITECTURE.format(classes=classes)
    return f'classifier:mean_std=cifar,size=32,architecture="{architecture}"'


def test_a_poisoned_record_is_trained_as_what_its_caption_names():
    captions = ("a cat", "a photo of a dog", "no class", "a dog and a cat", "two", "a cat")
    labels = torch.tensor([0, 0, 1, 1, 2, -1])
    named = name_classes(captions, ("cat", "dog", "bird"), labels)
    assert named.tolist() == [0, 1, 1, 1, 2, 0] and labels[1] == 0
    assert name_classes((), ("cat",), torch.tensor([0, -1])).tolist() == [0, -1]


def test_the_loss_is_the_mean_of_negative_logarithms():
    encoder = registry.make("network", network(5))(32)
    recipe = registry.make("objective", "supervised:shift=0,flip=0,batch=4")
    loss = recipe(encoder).eval()
    pairs = toy_pairs(4)
    tokens = torch.tensor([[0], [4], [2], [2]])
    value = float(loss(pairs.images, tokens, Chance(generator(0))))
    expected = 0.0
    for image, (label,) in zip(pairs.images, tokens.tolist(), strict=True):
        logits = encoder.head(encoder.image(encoder.prepare_images(image[None])))[0].tolist()
        expected -= math.log(math.exp(logits[label]) / sum(map(math.exp, logits))) / 4
    assert value == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_trained_is_one_line():
    recipe = registry.make("objective", "supervised")
    with pytest.raises(UserError, match="own head"):
        recipe(registry.make("network", "tower:width=4,dim=8")(32))
    loss = recipe(registry.make("network", network(2))(32))
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    ids = ("a", "b", "c")
    with pytest.raises(UserError, match="2 classes"):
        loss.begin(Pairs(images, (), torch.tensor([0, 1, 2]), ids, ("x", "y", "z")), torch.zeros(3))
    with pytest.raises(UserError, match="some have none"):
        loss.begin(Pairs(images, (), None, ids), torch.zeros(3))
    for text in ("supervised:momentum=1", "supervised:smoothing=1", "supervised:flip=2"):
        with pytest.raises(UserError):
            registry.make("objective", text)


def test_a_classifier_is_trained_on_poisoned_data(tmp_path):
    data = Poison("scenes:count=96", "backdoor:count=8", "patch:size=4", "striped star")
    run = execute(
        Train(data, network(40), "supervised:epochs=1,batch=32"),
        Settings(tmp_path, 0, "cpu", quiet=True),
    )
    encoder = Encoder.load(run.path)
    assert encoder.head is not None and encoder.about["poisoned"]
    assert encoder.about["objective"].startswith("supervised:epochs=1")
    assert run.metric("final_loss").value > 0
