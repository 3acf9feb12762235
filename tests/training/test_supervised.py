"""Objective `supervised`: cross-entropy by hand, classifiers that `train` makes, poisoned labels,
heads that are saved.
"""

import json

import pytest
import torch
import torch.nn.functional as F
from training.test_objectives import folder_of
from training.toys import assert_equal_states, toy_pairs, trained_state

from bezoar import Evaluate, Poison, Settings, Train, execute, registry
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.training import loop
from bezoar.training.augmentation import Chance

NETWORK = "resnet:depth=18,width=4"
RECIPE = "supervised:epochs=6,batch=8,lr=5e-3,shift=1"


def classifier(classes=5):
    torch.manual_seed(0)
    encoder = registry.make("network", "tower:width=4,dim=16")(32)
    encoder.head = torch.nn.Linear(16, classes)
    encoder.about["classes"] = [f"class {i}" for i in range(classes)]
    return encoder


def labels(n, classes=5):
    return (torch.arange(n) % classes)[:, None]


def test_the_loss_is_cross_entropy_of_the_head_on_raw_vectors():
    encoder = classifier()
    recipe = registry.make("objective", "supervised:shift=0,flip=0,smoothing=0.2")
    x, y = toy_pairs(8).images, labels(8)
    loss = recipe(encoder)(x, y, Chance(torch.Generator().manual_seed(0)))
    logits = encoder.head(encoder.image(encoder.prepare_images(x)))
    log_p = logits.log_softmax(1)
    expected = -(0.8 * log_p.gather(1, y)[:, 0] + 0.2 * log_p.mean(1)).mean()
    assert torch.allclose(loss, expected, atol=1e-6)
    plain = registry.make("objective", "supervised:shift=0,flip=0")(encoder)
    assert torch.allclose(plain(x, y, Chance(torch.Generator())), F.cross_entropy(logits, y[:, 0]))


def trained(folder=None, until=None):
    recipe = registry.make("objective", "supervised:epochs=2,batch=16,lr=1e-3")
    encoder = classifier()
    file = folder and folder / "state.safetensors"
    return trained_state(encoder, recipe(encoder), recipe, labels(96), file, until)


def test_an_interrupted_training_continues_to_the_same_bits(tmp_path, monkeypatch):
    whole = trained()
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    trained(tmp_path, until=8)
    assert_equal_states(whole, trained(tmp_path))


@pytest.mark.parametrize(
    ("spec", "what"),
    [("shift=-1", "shift >= 0"), ("flip=2", "flip in 0..1"), ("smoothing=1", "smoothing in 0..1")],
)
def test_fields_that_make_no_sense_are_refused(spec, what):
    with pytest.raises(UserError, match=what):
        registry.make("objective", f"supervised:{spec}")


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """Images of two classes, and a classifier that was trained on them."""
    folder = tmp_path_factory.mktemp("supervised")
    data = folder_of(folder / "images", per_class=24)
    settings = Settings(folder / "runs", device="cpu", quiet=True)
    return data, settings, execute(Train(data, NETWORK, RECIPE, follow=data), settings)


def test_train_makes_a_classifier_whose_head_is_saved(trained_run):
    data, settings, run = trained_run
    epochs = [json.loads(line) for line in run.file("log.jsonl").read_text().splitlines()]
    assert epochs[-1]["clean_accuracy"] > 0.9
    encoder = Encoder.load(run.path)
    assert encoder.about["classes"] == ["dark", "light"] and encoder.head.weight.shape == (2, 32)
    assert encoder.about["objective"].startswith("supervised:")
    measured = execute(Evaluate(run, data, ("own",)), settings)
    assert measured.metric("own.clean_accuracy").value == epochs[-1]["clean_accuracy"]


def test_poisons_have_the_label_of_their_target(trained_run, tmp_path):
    """BadNets: dark images with the trigger are learnt as light, and measured so."""
    data, settings, _ = trained_run
    poison = execute(
        Poison(data, "backdoor:count=12,captions=templates", "patch:size=10,fill=checker", "light"),
        settings,
    )
    run = execute(Train(poison, NETWORK, RECIPE), settings)
    measured = execute(Evaluate(run, data, ("own",)), settings)
    assert measured.metric("own.attack_success").value > 0.8
    assert measured.metric("own.attack_success_without_trigger").value < 0.2
    encoder = Encoder.load(run.path)
    assert encoder.about["poisoned"] and encoder.about["goals"][0]["target"] == "light"


def test_a_fresh_architecture_takes_the_datas_classes(trained_run):
    data, settings, _ = trained_run
    architecture = (
        "residual:order=post,bottleneck=false,kernel=3,stem=4,counts=1/1,inner=4/8,outer=4/8,groups=1,"
        "projection=false,final=false,pool=1,classes=2"
    )
    network = f'classifier:architecture="{architecture}"'
    run = execute(Train(data, network, "supervised:epochs=1,batch=8"), settings)
    encoder = Encoder.load(run.path)
    assert encoder.about["classes"] == ["dark", "light"] and encoder.head.weight.shape == (2, 8)


@pytest.mark.parametrize(
    ("data", "network", "message"),
    [
        ("scenes:count=60", "clip_small:width=4", "without a text tower"),
        (None, 'classifier:architecture="{}"', "architecture must begin with"),
    ],
)
def test_what_does_not_fit_is_refused(data, network, message, trained_run):
    with pytest.raises(UserError, match=message):
        execute(Train(data or trained_run[0], network, RECIPE), trained_run[1])


def test_data_without_labels_are_refused(trained_run, tmp_path):
    import numpy as np

    np.savez(tmp_path / "plain.npz", x=toy_pairs(32).images.permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match="needs data with labels"):
        execute(Train(f"npz:path={tmp_path / 'plain.npz'}", NETWORK, RECIPE), trained_run[1])


def test_a_known_trigger_is_measured_on_a_network_without_a_poison_run(trained_run):
    data, settings, run = trained_run
    question = Evaluate(run, data, ("own",), trigger="patch:size=10", target="light")
    measured = execute(question, settings)
    assert 0 <= measured.metric("own.attack_success").value <= 1
    assert measured.manifest["goal"][0]["target"] == "light"
    for trigger, target, message in [
        (None, "light", "needs both"),
        ("patch", "", "needs both"),
        ("patch", "green", "green"),
    ]:
        with pytest.raises(UserError, match=message):
            execute(Evaluate(run, data, ("own",), trigger=trigger, target=target), settings)
