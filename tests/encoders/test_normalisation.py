"""The normalisation that batch norms tell: every usual one is found again; guesses are settled, and
what is stated is kept.
"""

import pytest
import torch
from encoders.test_classifier_networks import Cifar, Post, Pre
from torch import nn

from bezoar import registry
from bezoar.encoders import normalisation
from bezoar.encoders.encoder import Encoder, Preprocess
from bezoar.encoders.small_towers import MEAN_STD
from bezoar.runs import inputs


def images(n=128, size=32, seed=0):
    """Smooth colours, as pictures have them."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(n, 3, 6, 6, generator=generator)
    large = nn.functional.interpolate(small, size, mode="bicubic")
    tint = torch.tensor([1.0, 0.95, 0.85]).view(1, 3, 1, 1)
    return (large * tint).clamp(0, 1).mul(255).byte()


def trained_with(name, net=None):
    """A network whose batch norms have seen the images under a normalisation, and its weights'
    file.
    """
    torch.manual_seed(0)
    net = Cifar(Post) if net is None else net
    x = images(seed=1).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in MEAN_STD[name])
    net.train()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # what one batch leaves is all
    with torch.no_grad():
        net((x - mean) / std)
    return net.eval()


def load(net, folder, extra=""):
    torch.save(net.state_dict(), folder / "net.pth")
    return registry.make("network", f"classifier:path={folder / 'net.pth'}{extra}")(0, ())


@pytest.mark.parametrize("kind", [Post, Pre])
@pytest.mark.parametrize("name", MEAN_STD)
def test_every_usual_normalisation_is_found_again(name, kind, tmp_path):
    encoder = load(trained_with(name, Cifar(kind)), tmp_path)
    before = encoder.preprocess
    divergences = normalisation.measure_divergences(encoder, images())
    assert next(iter(divergences)) == name
    assert encoder.preprocess == before and set(divergences) == set(MEAN_STD)
    assert normalisation.settle_mean_std(encoder, images()) == ""
    assert (encoder.preprocess.mean, encoder.preprocess.std) == MEAN_STD[name]
    numbers = "/".join(map(str, (*MEAN_STD[name][0], *MEAN_STD[name][1])))
    assert f"mean_std={numbers}," in encoder.about["network"]
    assert not normalisation.is_guessed(encoder)
    assert encoder.about["imported"]["mean_std"].startswith(f"{name}: ")


def test_the_divergence_is_the_symmetric_one_of_two_normal_distributions():
    """Against torch's own, on a network that is a batch norm alone."""
    norm = nn.BatchNorm2d(3).eval()
    norm.running_mean, norm.running_var = torch.tensor([0.1, 0.2, 0.4]), torch.tensor([1.0, 0.5, 2])
    encoder = Encoder(nn.Sequential(norm, nn.Flatten()), Preprocess(32, *MEAN_STD["none"]))
    x = images().float() / 255
    kept = torch.distributions.Normal(norm.running_mean, (norm.running_var + norm.eps).sqrt())
    read = torch.distributions.Normal(
        x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + norm.eps).sqrt()
    )
    kl = torch.distributions.kl_divergence
    expected = ((kl(kept, read) + kl(read, kept)) / 2).median()
    assert normalisation.measure_divergences(encoder, images())["none"] == pytest.approx(
        float(expected), rel=1e-3
    )


def test_a_stated_normalisation_is_kept(tmp_path):
    encoder = load(trained_with("half"), tmp_path, ",mean_std=imagenet")
    doubt = normalisation.settle_mean_std(encoder, images())
    assert "imagenet does not fit" in doubt and doubt.endswith("say mean_std=half")
    assert normalisation.mean_std_name(encoder.preprocess) == "imagenet"
    right = load(trained_with("half"), tmp_path, ",mean_std=half")
    assert normalisation.settle_mean_std(right, images()) == ""


def test_without_batch_norms_the_guess_is_said_to_be_one():
    encoder = Encoder(nn.Flatten(), Preprocess(32, *MEAN_STD["half"]))
    encoder.about["imported"] = {"assumed": ["mean_std=half"]}
    encoder.about["network"] = "timm:model=vit"
    assert "no batch norm" in normalisation.settle_mean_std(encoder, images())
    assert encoder.preprocess.mean == (0.5, 0.5, 0.5)


def test_a_guess_as_good_as_the_best_stays(tmp_path):
    """Deviations that differ by less than other images account for are no reason to change."""
    encoder = load(trained_with("cifar"), tmp_path)  # cifar is what a 3x3 stem is taken for
    assert normalisation.settle_mean_std(encoder, images(seed=2)) == ""
    assert encoder.about["imported"]["mean_std"].startswith("cifar: cifar is ")
    text = inputs.describe_weights(encoder)
    assert text.count("cifar is ") == 1 and "normalisation cifar: " in text
