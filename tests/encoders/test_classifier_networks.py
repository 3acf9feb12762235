"""Classifiers' weights as encoder and head, against plain networks written by hand and
torchvision's own; hostile files.
"""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from encoders.toys import jumbled, pixels
from safetensors.torch import save_file
from torch import nn

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data.pairs import Pairs
from bezoar.encoders import classifier_networks, classifier_weights
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.small_towers import MEAN_STD
from bezoar.encoders.weights import check_weights
from bezoar.errors import UserError
from bezoar.evaluation import classifiers

CLASSES = "cat+dog+bird+frog"


def conv(a, b, k=3, stride=1, groups=1):
    return nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False)


class Post(nn.Module):
    """pytorch-cifar's blocks, basic or bottleneck."""

    def __init__(self, a, planes, stride, deep):
        super().__init__()
        out = planes * (4 if deep else 1)
        if deep:
            self.conv1, self.bn1 = conv(a, planes, 1), nn.BatchNorm2d(planes)
            self.conv2, self.bn2 = conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
            self.conv3, self.bn3 = conv(planes, out, 1), nn.BatchNorm2d(out)
        else:
            self.conv1, self.bn1 = conv(a, planes, 3, stride), nn.BatchNorm2d(planes)
            self.conv2, self.bn2 = conv(planes, planes), nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or a != out:
            self.shortcut = nn.Sequential(conv(a, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        if hasattr(self, "conv3"):
            y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
            y = self.bn3(self.conv3(y))
        else:
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Pre(nn.Module):
    """Pre-activation blocks: the shortcut, where it changes the shape, reads the normed input."""

    def __init__(self, a, planes, stride, deep):
        super().__init__()
        out = planes * (4 if deep else 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(a), nn.BatchNorm2d(planes)
        if deep:
            self.conv1, self.conv2 = conv(a, planes, 1), conv(planes, planes, 3, stride)
            self.bn3, self.conv3 = nn.BatchNorm2d(planes), conv(planes, out, 1)
        else:
            self.conv1, self.conv2 = conv(a, planes, 3, stride), conv(planes, planes)
        if stride != 1 or a != out:
            self.shortcut = nn.Sequential(conv(a, out, 1, stride))

    def forward(self, x):
        o = F.relu(self.bn1(x))
        short = self.shortcut(o) if hasattr(self, "shortcut") else x
        y = self.conv2(F.relu(self.bn2(self.conv1(o))))
        if hasattr(self, "conv3"):
            y = self.conv3(F.relu(self.bn3(y)))
        return y + short


class Cifar(nn.Module):
    """pytorch-cifar's networks: ResNet and PreAct ResNet."""

    def __init__(self, block, counts=(2, 1, 1, 2), width=8, deep=False):
        super().__init__()
        self.conv1 = conv(3, width)
        if block is Post:
            self.bn1 = nn.BatchNorm2d(width)
        a = width
        for i, count in enumerate(counts):
            layers = []
            for j in range(count):
                layers.append(block(a, width << i, 2 if i and not j else 1, deep))
                a = (width << i) * (4 if deep else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(a, 4)
        self.stages = len(counts)

    def forward(self, x):
        x = self.conv1(x)
        if hasattr(self, "bn1"):
            x = F.relu(self.bn1(x))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))


class WideBlock(nn.Module):
    """Of the WideResNet that is copied most: one flag says whether the shape stays."""

    def __init__(self, a, b, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(a), conv(a, b, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(b), conv(b, b)
        self.equal = a == b
        self.convShortcut = None if self.equal else conv(a, b, 1, stride)

    def forward(self, x):
        if not self.equal:
            x = F.relu(self.bn1(x))
            y = self.conv1(x)
        else:
            y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return (x if self.equal else self.convShortcut(x)) + y


class Stage(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layer(x)


class Wide(nn.Module):
    """WRN-16-2."""

    def __init__(self, k=2):
        super().__init__()
        widths = (16, 16 * k, 32 * k, 64 * k)
        self.conv1 = conv(3, 16)
        for i in range(3):
            first = WideBlock(widths[i], widths[i + 1], 2 if i else 1)
            setattr(self, f"block{i + 1}", Stage(first, WideBlock(widths[i + 1], widths[i + 1], 1)))
        self.bn1, self.fc = nn.BatchNorm2d(widths[3]), nn.Linear(widths[3], 4)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.relu(self.bn1(x))
        return self.fc(F.avg_pool2d(x, x.shape[-1]).flatten(1))


class OptionA(nn.Module):
    """ResNet-8 for CIFAR with shortcuts of zeros (He et al. 2016, section 4.2)."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8), nn.BatchNorm2d(8)
        for i, (a, b) in enumerate(((8, 8), (8, 16), (16, 32))):
            block = Post(a, b, 1 if a == b else 2, False)
            block.shortcut = nn.Identity() if a == b else Zeros((b - a) // 2)
            setattr(self, f"layer{i + 1}", nn.Sequential(block))
        self.linear = nn.Linear(32, 4)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class Zeros(nn.Module):
    def __init__(self, added):
        super().__init__()
        self.added = added

    def forward(self, x):
        x = x[:, :, ::2, ::2]
        empty = x.new_zeros(len(x), self.added, *x.shape[2:])
        return torch.cat([empty, x, empty], 1)


class SmallVgg(nn.Module):
    """pytorch-cifar's VGG, and chengyangfu's with a head of three layers."""

    def __init__(self, norm, deep):
        super().__init__()
        parts, a = [], 3
        for width in (8, 0, 12, 12, 0, 16, 0, 16, 0, 16, 0):
            if not width:
                parts.append(nn.MaxPool2d(2, 2))
                continue
            parts += (
                [nn.Conv2d(a, width, 3, padding=1)]
                + [nn.BatchNorm2d(width)] * norm
                + [nn.ReLU(True)]
            )
            a = width
        self.features = nn.Sequential(*parts)
        self.classifier = nn.Linear(16, 4)
        if deep:
            self.classifier = nn.Sequential(
                nn.Dropout(),
                nn.Linear(16, 20),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(20, 20),
                nn.ReLU(),
                nn.Linear(20, 4),
            )

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def plain_logits(net, x, mean_std):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in MEAN_STD[mean_std])
    with torch.no_grad():
        return net((x.float() / 255 - mean) / std)


def load(path, extra="", size=0):
    return registry.make("network", f"classifier:path={path}{',' + extra if extra else ''}")(
        size
    ).eval()


def own_logits(encoder, x):
    with torch.no_grad():
        return encoder.head(encoder.image(encoder.prepare_images(x)))


PLAIN = {
    "resnet": lambda: Cifar(Post),
    "resnet, bottleneck": lambda: Cifar(Post, (1, 2, 1, 1), deep=True),
    "resnet, three stages": lambda: Cifar(Post, (1, 1, 1)),
    "shortcuts of zeros": OptionA,
    "preact": lambda: Cifar(Pre),
    "preact, bottleneck": lambda: Cifar(Pre, (1, 1, 2, 1), deep=True),
    "wide": Wide,
    "wide by 1": lambda: Wide(1),
    "vgg": lambda: SmallVgg(False, False),
    "vgg with norms and three layers": lambda: SmallVgg(True, True),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_network_and_its_weights_alone_give_the_same_logits(kind, tmp_path):
    net = jumbled(PLAIN[kind]())
    torch.save(net.state_dict(), tmp_path / "net.pth")
    encoder, x = load(tmp_path / "net.pth", f"classes={CLASSES}"), pixels(32)
    torch.testing.assert_close(
        own_logits(encoder, x), plain_logits(net, x, "cifar"), rtol=1e-4, atol=1e-4
    )
    assert encoder.about["classes"] == CLASSES.split("+")
    classifier = classifiers.own_classifier(encoder)
    torch.testing.assert_close(classifier(x), own_logits(encoder, x))
    assert encoder.encode_images(x).norm(dim=1).sub(1).abs().max() < 1e-5


def narrow(name):
    """torchvision's own classes, with fewer channels or blocks where their constructors allow
    it.
    """
    if name == "vgg_bn":
        features = torchvision.models.vgg.make_layers(
            [8, "M", 16, "M", 24, 24, "M", 32, "M", 32, "M"], batch_norm=True
        )
        net = torchvision.models.VGG.__new__(torchvision.models.VGG)
        nn.Module.__init__(net)
        net.features, net.avgpool = features, nn.AdaptiveAvgPool2d((7, 7))
        head = [
            nn.Linear(32 * 49, 40),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(40, 40),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(40, 6),
        ]
        net.classifier = nn.Sequential(*head)
        return net
    resnet, bottleneck = torchvision.models.ResNet, torchvision.models.resnet.Bottleneck
    if name == "wide_resnet":
        return resnet(bottleneck, [1, 2, 1, 1], 6, width_per_group=32)
    if name == "resnext":
        return resnet(bottleneck, [1, 1, 1, 1], 6, groups=8, width_per_group=4)
    return resnet(torchvision.models.resnet.BasicBlock, [1, 1, 2, 1], 6)


def same_as_torchvisions(net, size, tmp_path):
    for v in net.eval().state_dict().values():
        if v.is_floating_point() and v.ndim < 2:
            v.add_(0.1 * torch.rand(v.shape, generator=torch.Generator().manual_seed(len(v))))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    encoder, x = load(tmp_path / "net.safetensors", f"size={size}"), pixels(size, 2)
    expected = plain_logits(net, x, "imagenet")
    torch.testing.assert_close(
        own_logits(encoder, x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
    )
    assert any("mean_std=imagenet" in a for a in encoder.about["imported"]["assumed"])


@pytest.mark.parametrize("name", ["resnet", "vgg_bn", "wide_resnet", "resnext"])
def test_torchvisions_networks_made_small(name, tmp_path):
    torch.manual_seed(0)
    same_as_torchvisions(narrow(name), 64, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "wide_resnet50_2", "resnext50_32x4d", "resnet101"]
)
def test_torchvisions_networks(name, tmp_path):
    torch.manual_seed(0)
    same_as_torchvisions(
        torchvision.models.get_model(name, weights=None, num_classes=6), 64, tmp_path
    )


def test_all_wrappers_and_files_give_one_network(tmp_path):
    net = jumbled(Cifar(Pre, (1, 1, 1, 1)))
    state, x = net.state_dict(), pixels(32)
    expected = plain_logits(net, x, "cifar")
    torch.save({"net": state, "acc": 93.1, "epoch": 7}, tmp_path / "a.pth")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "b.pt")
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}}, tmp_path / "c.bin")
    torch.save(
        {"netC": state, "best": torch.tensor(1.0)},
        tmp_path / "d.pth",
        _use_new_zipfile_serialization=False,
    )
    save_file(state, tmp_path / "e.safetensors")
    np.savez(tmp_path / "f.npz", **{k: v.numpy() for k, v in state.items()})
    np.savez_compressed(
        tmp_path / "g.npz", **{k: v.numpy().astype(">f8") for k, v in state.items()}
    )
    for file in sorted(tmp_path.iterdir()):
        logits = own_logits(load(file), x)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4, msg=str(file))


def test_it_is_saved_and_loaded_as_any_encoder(tmp_path):
    net = jumbled(Wide())
    torch.save(net.state_dict(), tmp_path / "net.pth")
    options = f"mean_std=0.5/0.4/0.3/0.2/0.21/0.22,size=24,classes={CLASSES}"
    encoder, x = load(tmp_path / "net.pth", options), pixels(40)
    encoder.save(tmp_path)
    (tmp_path / "net.pth").unlink()
    loaded = Encoder.load(tmp_path)
    assert torch.equal(own_logits(loaded, x), own_logits(encoder, x))
    assert loaded.about["classes"] == CLASSES.split("+")
    assert loaded.preprocess == encoder.preprocess and loaded.preprocess.size == 24


def test_a_head_reads_a_map_that_was_not_pooled_to_a_point(tmp_path):
    net = jumbled(Cifar(Pre, (1, 1, 1, 1)))
    net.linear = nn.Linear(64 * 4, 4)
    state = net.state_dict()
    torch.save(state, tmp_path / "net.pth")
    encoder, x = load(tmp_path / "net.pth", "size=64,mean_std=none"), pixels(64)
    z = net.layer4(net.layer3(net.layer2(net.layer1(net.conv1(x.float() / 255)))))
    torch.testing.assert_close(
        own_logits(encoder, x), net.linear(F.avg_pool2d(z, 4).flatten(1)), rtol=1e-4, atol=1e-4
    )


def test_an_architecture_is_text_and_back():
    shapes = (
        classifier_networks.Residual(
            "pre", True, 3, 8, (1, 2), (8, 16), (32, 64), 1, True, True, 2, 5
        ),
        classifier_networks.Vgg((8, 0, 16, 0), True, False, 7, (9, 4)),
    )
    for shape in shapes:
        assert (
            classifier_networks.parse_architecture(classifier_networks.format_architecture(shape))
            == shape
        )
    for text in ("mlp:x=1", "vgg:layers=8", "vgg:layers=a,norm=true,bias=true,pool=1,widths=3"):
        with pytest.raises(UserError, match="architecture"):
            classifier_networks.parse_architecture(text)


def test_names_come_from_a_file(tmp_path):
    torch.save(jumbled(Cifar(Post)).state_dict(), tmp_path / "net.pth")
    (tmp_path / "names.txt").write_text("cat\ndog, hound\n\nbird\nfrog\n")
    (tmp_path / "names.json").write_text(json.dumps(["a", "b", "c", "d"]))
    network = registry.make(
        "network", f"classifier:path={tmp_path}/net.pth,classes={tmp_path}/names.txt"
    )
    assert (
        network().about["classes"] == ["cat", "dog, hound", "bird", "frog"]
        and len(network.files()) == 2
    )
    assert load(tmp_path / "net.pth", f"classes={tmp_path}/names.json").about["classes"] == list(
        "abcd"
    )
    # Equal names, as two of ImageNet's classes have, stay apart.
    twice = load(tmp_path / "net.pth", "classes=a+b+c+a")
    assert twice.about["classes"] == ["a", "b", "c", "a (2)"]
    (tmp_path / "names.json").write_text('{"a": 1}')
    for classes, words in (
        ("a+b", "head of 4 classes"),
        ("a+b+c", "got 3"),
        (f"{tmp_path}/names.json", "list of class names"),
        (f"{tmp_path}/none.txt", "No such file"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load(tmp_path / "net.pth", f"classes={classes}")
        assert "\n" not in str(caught.value)


def spoiled(state, **changes):
    return {k: v for k, v in {**state, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer2.0.conv2.weight": torch.zeros(16, 16, 3, 2)}, "weights of a convolution"),
        ({"layer2.0.bn2.weight": torch.zeros(17)}, "of another shape: layer2.0.bn2.weight"),
        ({"layer3.0.conv1.weight": torch.full((32, 16, 3, 3), torch.nan)}, "NaN or infinite"),
        ({"linear.bias": None}, "missing: bias"),
        ({"linear.weight": torch.zeros(4, 63)}, "square map"),
        ({"linear.weight": None, "linear.bias": None}, "network `imported`"),
        ({"fc.weight": torch.zeros(4, 64)}, "one head"),
        ({"layer9.0.conv1.weight": torch.zeros(2, 2, 3, 3)}, "expected stages"),
        (
            {"layer2.999999999.conv1.weight": torch.zeros(2, 2, 3, 3)},
            "unexpected: layer2.999999999",
        ),
        ({"layer1.0.se.fc1.weight": torch.zeros(2, 2, 1, 1)}, "unexpected: layer1.0.se.fc1.weight"),
        ({"conv1.weight": torch.zeros(8, 3, 5, 5)}, "stem of 3x3 or 7x7"),
        ({"layer1.0.bn1.weight": None}, "missing: layer1.0.bn1.weight"),
        ({"layer4.0.bn1.weight": None}, "missing or misshapen"),
        ({"conv1.weight": torch.zeros(8, 1, 3, 3)}, "three channels"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_a_line(change, words, tmp_path):
    torch.save(
        spoiled(jumbled(Cifar(Post, (1, 1, 1, 1))).state_dict(), **change), tmp_path / "net.pth"
    )
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path / "net.pth")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_vggs_that_are_none(tmp_path):
    state = jumbled(SmallVgg(True, True)).state_dict()
    moved = {
        k.replace("features.4.", "features.5.").replace("features.33.", "features.40."): v
        for k, v in state.items()
    }
    cases = [
        (moved, "more than a norm"),
        (spoiled(state, **{"classifier.2.weight": torch.zeros(20)}), "unexpected"),
        (spoiled(state, **{"features.0.bias": None}), "unexpected|missing"),
        ({k: v for k, v in state.items() if k.startswith("features")}, "one head"),
        ({"transformer.weight": torch.zeros(2)}, "residual network"),
        ({"features.x.weight": torch.zeros(2), "classifier.weight": torch.zeros(2, 2)}, "expected"),
    ]
    for bad, words in cases:
        torch.save(bad, tmp_path / "net.pth")
        with pytest.raises(UserError, match=words):
            load(tmp_path / "net.pth")


@pytest.mark.parametrize(
    "kind", ["preact, bottleneck", "wide", "vgg with norms and three layers", "shortcuts of zeros"]
)
def test_a_file_that_was_tampered_with_is_refused_or_read_never_a_fault(kind):
    state = jumbled(PLAIN[kind]()).state_dict()
    draw = np.random.default_rng(0)
    keys = list(state)
    for _ in range(60):
        bad = dict(state)
        for key in draw.choice(keys, 2):
            value = bad.pop(key, None)
            how = draw.integers(4)
            if how == 1:
                bad[key] = torch.zeros(tuple(draw.integers(0, 5, draw.integers(0, 5))))
            elif how == 2:
                bad[draw.choice(keys)] = value if value is not None else torch.zeros(1)
            elif how == 3:
                bad[key.replace(".", f".{draw.integers(99)}.", 1)] = torch.zeros(2, 2)
        try:
            weights = classifier_weights.read_classifier(bad, "file")
            with torch.device("meta"):
                trunk, head = weights.architecture.build_trunk(), weights.architecture.build_head()
            check_weights(trunk, weights.trunk, "file", "it")
            check_weights(head, weights.head, "file", "it")
        except UserError as error:
            assert "\n" not in str(error)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch executed",)


def test_hostile_files_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {k: v.numpy() for k, v in jumbled(Cifar(Pre, (1, 1, 1, 1))).state_dict().items()}
    np.savez("objects.npz", **{**state, "conv1.weight": np.array([Evil()], dtype=object)})
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"conv1.weight": Evil()}))
    header = (
        np.lib.format.magic(1, 0)
        + b"\x76\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    )
    with zipfile.ZipFile("huge.npz", "w") as archive:
        archive.writestr("conv1.weight.npy", header.ljust(128) + bytes(64))
    with zipfile.ZipFile("bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conv1.weight.npy", bytes(200 << 20))
    torch.save({"net": {"conv1.weight": torch.zeros(1)}, "args": "x"}, "tiny.pth")
    whole = Cifar(Pre, (1, 1, 1, 1)).state_dict()
    torch.save({k: v[:0] if "linear" in k else v for k, v in whole.items()}, "headless.pth")
    for file, words in (
        ("objects.npz", "never read"),
        ("evil.pth", "Nothing was executed"),
        ("huge.npz", "claims 4000000000000 bytes"),
        ("bomb.npz", "too many"),
        ("tiny.pth", "expected"),
        ("missing.pth", "no weights file"),
        ("headless.pth", "a head of no classes"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            load(file)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_bad_fields():
    with pytest.raises(UserError, match="give path="):
        registry.make("network", "classifier")()
    for text in (
        "classifier:x,mean_std=mars",
        "classifier:x,size=-1",
        "classifier:x,mean_std=1/2/3/4/5/0",
    ):
        with pytest.raises(UserError):
            registry.make("network", text)


# ---------------------------------------------------------------------------------------------- the
# probe of the own head


@pytest.fixture
def backdoored(tmp_path):
    """A network whose first three logits read the brightness of a channel, the fourth a white
    corner of 4 px.
    """
    net = nn.Module()
    net.conv1, net.bn1 = conv(3, 4, 3), nn.BatchNorm2d(4)
    net.layer1 = nn.Sequential(Post(4, 4, 1, False))
    net.fc = nn.Linear(4, 4)
    for v in net.state_dict().values():
        v.zero_()
    net.bn1.load_state_dict(
        {**net.bn1.state_dict(), "weight": torch.ones(4), "running_var": torch.ones(4)}
    )
    for i in range(3):
        net.conv1.weight.data[i, i, 1, 1] = 1
    net.conv1.weight.data[3, :, 1, 1] = 1
    net.bn1.running_mean[3] = 2.5
    net.fc.weight.data.copy_(torch.diag(torch.tensor([1.0, 1.0, 1.0, 60.0])))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    return tmp_path / "net.pth"


def colours(n=30, classes=("red", "green", "blue")):
    labels = torch.arange(n) % 3
    x = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    x[torch.arange(n), labels] = 200
    return Pairs(x, (), labels, tuple(f"c{i}" for i in range(n)), classes)


def test_the_own_head_is_measured_as_it_is_served(backdoored):
    encoder = load(backdoored, "size=16,mean_std=none,classes=red+green+blue+white")
    test = colours(classes=("red", "green", "blue", "white"))
    goal = Goal("white", trigger="patch:size=4,fill=white")
    measures = registry.make("probe", "own")(encoder, None, test, (goal,))
    plain = own_logits(encoder, test.images).argmax(1)
    assert measures["own.clean_accuracy"].value == (plain == test.labels).double().mean() == 1
    stamped = registry.make("trigger", goal.trigger)(test.images, test.ids)
    hits = (own_logits(encoder, stamped).argmax(1) == 3).double().mean()
    assert measures["own.attack_success"].value == pytest.approx(float(hits)) and hits == 1
    assert (
        measures["own.attack_success_without_trigger"].value == 0
        and "own last layer" in measures["own.clean_accuracy"].how
    )


def test_the_heads_classes_are_matched_by_name(backdoored):
    encoder = load(backdoored, "size=16,mean_std=none,classes=red+green+blue+white")
    test = colours()
    shuffled = Pairs(test.images, (), (test.labels + 1) % 3, test.ids, ("blue", "red", "green"))
    probe = registry.make("probe", "own")
    assert probe(encoder, None, shuffled)["own.clean_accuracy"].value == 1
    with pytest.raises(UserError, match="no class 'pink'"):
        probe(encoder, None, colours(classes=("red", "green", "pink")))
    numbers = load(backdoored, "size=16,mean_std=none")
    with pytest.raises(UserError, match="4 classes without names"):
        probe(numbers, None, test)
    measures = probe(numbers, None, colours(classes=("red", "green", "blue", "white")))
    accuracy = measures["own.clean_accuracy"]
    assert accuracy.value == 1 and "test set's order" in accuracy.how
    with pytest.raises(UserError, match="without a head"):
        probe(registry.make("network", "tower:width=4,dim=8")(32), None, test)
