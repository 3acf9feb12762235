"""Image towers: fresh, of timm's and torchvision's, and published checkpoints, hostile ones among
them.
"""

import json
import logging
import os
import pickle
import resource
import zipfile
from urllib.error import URLError

import open_clip
import pytest
import torch
import torchvision
from encoders.toys import jumbled, pixels
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from bezoar import encoders, registry
from bezoar.data.files import checkpoints, torch_files
from bezoar.encoders import checkpoint_layouts
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.open_clip_models import without_weight_warnings
from bezoar.encoders.small_towers import MEAN_STD
from bezoar.errors import UserError

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TINY_VIT = {**TINY, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}


def network(text, size=0):
    return registry.make("network", text)(size).eval()


class Narrow(ResNet):
    """torchvision's network with fewer channels, and perhaps SimCLR's stem for small images: quick
    to make and to run.
    """

    def __init__(self, depth=18, stem="imagenet", width=8):
        super().__init__(Bottleneck if depth == 50 else BasicBlock, [0, 0, 0, 0])
        block, counts = (Bottleneck, [3, 4, 6, 3]) if depth == 50 else (BasicBlock, [2, 2, 2, 2])
        self.inplanes = width
        self.conv1 = nn.Conv2d(
            3, width, *((7, 2, 3) if stem == "imagenet" else (3, 1, 1)), bias=False
        )
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = self.maxpool if stem == "imagenet" else nn.Identity()
        for i, count in enumerate(counts):
            setattr(self, f"layer{i + 1}", self._make_layer(block, width << i, count, 1 + (i > 0)))
        self.fc = nn.Linear(8 * width * block.expansion, 10)


@pytest.fixture(scope="module")
def resnets():
    """torchvision's ResNet-18, narrow, by stem."""
    return {
        stem: jumbled(Narrow(stem=stem), seed) for seed, stem in enumerate(("imagenet", "cifar"))
    }


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Small architectures that open_clip knows for the length of these tests."""
    folder = tmp_path_factory.mktemp("configs")
    quick = {**TINY, "quick_gelu": True}
    for name, config in {"tiny-rn": TINY, "tiny-rn-quickgelu": quick, "tiny-vit": TINY_VIT}.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
    return {name: jumbled(open_clip.create_model(name)) for name in ("tiny-rn", "tiny-vit")}


def features(resnet, x):
    """What a classifier's last layer reads."""
    read = []
    hook = resnet.fc.register_forward_pre_hook(lambda layer, inputs: read.append(inputs[0]))
    with torch.no_grad():
        resnet(x)
    hook.remove()
    return read[0]


def sequence(resnet, stem):
    """Its parts without names and without the classifier, as SimCLR's re-implementation and
    BadEncoder keep them.
    """
    parts = [
        m
        for m in list(resnet.children())[:-1]
        if stem == "imagenet" or not isinstance(m, nn.Identity)
    ]
    return nn.Sequential(*parts)


# ----------------------------------------------------------------------------------------------
# fresh networks


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_is_torchvisions_trunk(depth):
    theirs = jumbled(torchvision.models.resnet18() if depth == 18 else Narrow(50))
    ours = network(f"resnet:depth={depth},stem=imagenet" + (",width=8" if depth == 50 else ""), 64)
    ours.image.load_state_dict(
        {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    )
    x = torch.randn(2, 3, 64, 64)
    expected = features(theirs, x)
    assert expected.shape == (2, 512 if depth == 18 else 256)
    torch.testing.assert_close(ours.image(x), expected)


def test_resnet_takes_pixels_as_badencoder_does(resnets):
    ours, x = network("resnet:width=8", 32), pixels(32)
    ours.image.load_state_dict(
        {k: v for k, v in resnets["cifar"].state_dict().items() if not k.startswith("fc.")}
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in MEAN_STD["cifar"])
    expected = features(resnets["cifar"], (x.float() / 255 - mean) / std)
    torch.testing.assert_close(ours.encode_images(x), nn.functional.normalize(expected, dim=-1))
    assert ours.image.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert ours.text is None


def test_the_width_of_a_resnet_multiplies_its_features():
    assert network("resnet:width=8", 16).encode_images(pixels(16)).shape == (2, 64)
    assert network("resnet:depth=50,width=4,stem=imagenet", 32).encode_images(pixels(32)).shape == (
        2,
        128,
    )


def test_large_images_are_read_some_at_a_time_where_nothing_is_trained(monkeypatch):
    encoder = network("resnet:width=4", 16)
    parts = []
    encoder.image.register_forward_pre_hook(lambda _, inputs: parts.append(len(inputs[0])))
    monkeypatch.setitem(encoders.encoder.PIXELS_AT_ONCE, "cpu", 3 * 16**2)
    x = pixels(16)[:1].expand(7, -1, -1, -1)
    whole = encoder.eval().encode_images(x)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_images(x), whole.detach())
        assert parts == [7, 3, 3, 1]
        assert encoder.encode_images(x[:0]).shape == (0, whole.shape[1])
        encoder.train().encode_images(x)  # batch norms see all images
        assert parts[-1] == 7


def test_tower_is_clip_smalls_image_tower():
    pair = network("clip_small:width=8,dim=16", 32)
    alone = network("tower:width=8,dim=16", 32)
    alone.image.load_state_dict(pair.image.state_dict())
    assert torch.equal(alone.encode_images(pixels(32)), pair.encode_images(pixels(32)))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("resnet:width=8", 32),
        ("resnet:depth=34,stem=imagenet,width=8,mean_std=none", 48),
        ("tower:width=8,dim=16", 40),
        ("timm:resnet10t", 32),
        ("torchvision:shufflenet_v2_x0_5", 32),
        ("torchvision:shufflenet_v2_x0_5/IMAGENET1K_V1,fresh=true", 224),
        ("clip_image:tiny-rn", 32),
    ],
)
def test_saved_encoders_are_read_back(text, size, tmp_path, clips):
    torch.manual_seed(3)
    encoder = network(text, size)
    encoder.save(tmp_path)
    loaded = Encoder.load(tmp_path)
    x = pixels(size)
    assert loaded.preprocess == encoder.preprocess and loaded.preprocess.size == size
    assert loaded.about == encoder.about and loaded.about["vocabulary"] == []
    assert torch.equal(loaded.encode_images(x), encoder.encode_images(x))
    assert registry.make("network", text).vocabulary(["a dog"]) == ()


@pytest.mark.parametrize(
    "text", ["resnet:width=8", "tower:width=8", "timm:resnet10t", "torchvision:shufflenet_v2_x0_5"]
)
def test_the_same_seed_gives_the_same_fresh_weights(text):
    states = []
    for _ in range(2):
        torch.manual_seed(5)
        states.append(network(text, 32).state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize(
    ("text", "size", "says"),
    [
        ("resnet:depth=20", 32, "depth must be one of 18, 34, 50, 101"),
        ("resnet:mean_std=mnist", 32, "mean_std must be one of cifar, stl10"),
        ("timm:resnet1x8", 32, "timm has no model 'resnet1x8'"),
        ("timm:resnet18/openai", 32, "either with /pretrained"),
        ("timm:resnet18/weights.pth", 32, "no weights file 'weights.pth'"),
        ("torchvision:resnet19", 32, "torchvision has no classifier 'resnet19'"),
        (
            "torchvision:resnet18/V9",
            32,
            "has no weights 'V9' for resnet18; it has: IMAGENET1K_V1, DEFAULT",
        ),
        ("torchvision:squeezenet1_1", 32, "does not end in one linear layer"),
        ("torchvision:densenet121", 16, "takes no images of 16 px"),
        ("clip_image:RN51", 32, "open_clip has no architecture 'RN51'"),
    ],
)
def test_networks_that_cannot_be_made_say_so_in_one_line(text, size, says):
    with pytest.raises(UserError, match=says) as caught:
        network(text, size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"), [("resnet", 4), ("resnet:stem=imagenet", 16), ("tower", 128)]
)
def test_sizes_out_of_range_are_refused(text, size):
    with pytest.raises(ValueError, match=f"images of {size} px"):
        network(text, size)


# ------------------------------------------------------------------------------- published weights
# by name


def test_torchvisions_weights_bring_their_preprocessing(monkeypatch, tmp_path):
    source = jumbled(torchvision.models.shufflenet_v2_x0_5())
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *a, **k: source.state_dict()
    )
    encoder = network("torchvision:shufflenet_v2_x0_5/IMAGENET1K_V1", 32)
    transforms = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.transforms()
    x = pixels(224, 1)
    assert encoder.preprocess.interpolation == "bilinear"
    # their transform resizes to 256 and crops 224 out of it; ours reads the whole image, so it is
    # compared without that
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (transforms.mean, transforms.std))
    expected = features(source, (x.float() / 255 - mean) / std)
    torch.testing.assert_close(encoder.encode_images(x), nn.functional.normalize(expected, dim=-1))
    encoder.save(tmp_path)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    assert torch.equal(Encoder.load(tmp_path).encode_images(x), encoder.encode_images(x)), (
        "a saved encoder needs no download"
    )


def test_timms_weights_bring_their_preprocessing(monkeypatch, tmp_path):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda model, **k: jumbled(model))
    encoder = network("timm:vit_tiny_patch16_224/pretrained", 32)
    assert (encoder.preprocess.size, encoder.preprocess.mean) == (224, (0.5, 0.5, 0.5))
    assert encoder.about["network"] == "timm:model=vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    encoder.save(tmp_path)
    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    x = pixels(224, 1)
    assert torch.equal(Encoder.load(tmp_path).encode_images(x), encoder.encode_images(x)), (
        "a saved encoder needs no download"
    )


def offline(*args, **kwargs):
    raise URLError("Name or service\nnot known")


@pytest.mark.parametrize(
    "text", ["timm:resnet18.a1_in1k/pretrained", "torchvision:resnet18/IMAGENET1K_V1"]
)
def test_without_a_network_published_weights_are_a_users_error(text, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(UserError, match=r"could not make .*Name or service") as caught:
        network(text)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- checkpoints
# by layout


def badencoder(resnets):
    model = nn.ModuleDict(
        {"f": nn.ModuleDict({"f": sequence(resnets["cifar"], "cifar")}), "g": nn.Linear(64, 8)}
    )
    return {
        "epoch": 1000,
        "state_dict": model.state_dict(),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
    }


def simclr(resnets, stem):
    return nn.ModuleDict({"f": sequence(resnets[stem], stem), "g": nn.Linear(64, 8)}).state_dict()


def moco(resnets):
    model = nn.ModuleDict({"encoder_q": resnets["imagenet"], "encoder_k": Narrow()})
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    return {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": state | {"module.queue": torch.randn(8, 16)},
    }


def counted(resnets):
    """What thop's counters leave behind."""
    return resnets["imagenet"].state_dict() | {
        "layer1.total_ops": torch.zeros(1),
        "total_params": torch.zeros(1),
    }


MADE = {  # name -> (stem, what the file holds, layout, mean_std, what is left out)
    "badencoder": ("cifar", badencoder, "badencoder", "cifar", ["g"]),
    "simclr": ("cifar", lambda r: simclr(r, "cifar"), "simclr", "cifar", ["g"]),
    "simclr with a max-pool": (
        "imagenet",
        lambda r: simclr(r, "imagenet"),
        "simclr",
        "imagenet",
        ["g"],
    ),
    "moco": ("imagenet", moco, "moco", "imagenet", ["encoder_q.fc", "encoder_k", "queue"]),
    "torchvision": (
        "imagenet",
        lambda r: {"model": r["imagenet"].state_dict()},
        "torchvision",
        "imagenet",
        ["fc"],
    ),
    "small torchvision": (
        "cifar",
        lambda r: r["cifar"].state_dict(),
        "torchvision",
        "cifar",
        ["fc"],
    ),
    "counted": ("imagenet", counted, "torchvision", "imagenet", ["fc"]),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("name", MADE)
def test_layouts_are_read_strictly_and_give_the_source_s_features(name, zipped, resnets, tmp_path):
    stem, make, layout, mean_std, left_out = MADE[name]
    path, side = tmp_path / "model.pth", 40
    torch.save(make(resnets), path, _use_new_zipfile_serialization=zipped)
    encoder = network(f"imported:path={path},size={side}")
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(encoder.image(x), features(resnets[stem], x))
    facts = encoder.about["imported"]
    assert (facts["layout"], facts["left_out"]) == (layout, left_out)
    assert f"mean_std={mean_std}" in facts["assumed"] and not any(
        "size" in a for a in facts["assumed"]
    )
    assert (encoder.preprocess.mean, encoder.preprocess.std) == MEAN_STD[mean_std]


def test_an_imported_encoder_is_saved_and_read_without_the_checkpoint(resnets, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(badencoder(resnets), path)
    configured = registry.make("network", f"imported:path={path},mean_std=stl10")
    assert configured.files() == [path]
    encoder = configured().eval()
    encoder.save(tmp_path)
    path.unlink()
    loaded = Encoder.load(tmp_path)
    assert torch.equal(loaded.encode_images(pixels(32)), encoder.encode_images(pixels(32)))
    assert loaded.about["network"] == "resnet:depth=18,stem=cifar,width=8,mean_std=stl10"
    assert loaded.about["imported"] == encoder.about["imported"] and loaded.about["imported"][
        "assumed"
    ] == ["size=32"]


def test_simclrs_imagenet_encoder_reads_pixels_as_they_are(tmp_path):
    """BadEncoder's `visual.`, and the same weights as SimCLR's conversion has them: shortcuts
    before convolutions.
    """
    source = jumbled(Narrow(50))
    state = source.state_dict()
    order = sorted(
        state,
        key=lambda k: (
            (k.split(".")[:2], "downsample" not in k) if k.startswith("layer") else ([""], True)
        ),
    )
    x = torch.randn(1, 3, 32, 32)
    for name, held in {
        "bad": {f"visual.{k}": v for k, v in state.items()},
        "clean": {k: state[k] for k in order},
    }.items():
        torch.save({"state_dict": held}, tmp_path / f"{name}.pth")
        encoder = network(f"imported:path={tmp_path / name}.pth,size=32")
        torch.testing.assert_close(encoder.image(x), features(source, x))
        assert encoder.about["imported"]["assumed"] == ["mean_std=none"]
        assert encoder.about["network"] == "resnet:depth=50,stem=imagenet,width=8,mean_std=none"


def test_counters_of_batches_may_be_missing(resnets, tmp_path):
    state = {
        k: v
        for k, v in resnets["cifar"].state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "model.pth")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        network(f"imported:path={tmp_path / 'model.pth'}").image(x), features(resnets["cifar"], x)
    )


def test_half_precision_and_safetensors(resnets, tmp_path):
    state = {
        k: v.half() if v.is_floating_point() else v
        for k, v in resnets["cifar"].state_dict().items()
    }
    save_file(state, tmp_path / "model.safetensors")
    encoder = network(f"imported:path={tmp_path / 'model.safetensors'}")
    assert encoder.image.conv1.weight.dtype == torch.float32
    assert torch.equal(encoder.image.conv1.weight, state["conv1.weight"].float())


@pytest.mark.parametrize("prefix", ["visual.", ""])
@pytest.mark.parametrize("name", ["tiny-rn", "tiny-vit"])
def test_clips_image_tower_alone(name, prefix, clips, tmp_path):
    source = clips[name].visual
    torch.save(
        {"state_dict": {prefix + k: v for k, v in source.state_dict().items()}},
        tmp_path / "model.pth",
    )
    encoder = network(f"imported:path={tmp_path / 'model.pth'}")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.image(x), source(x))
    assert encoder.about["network"] == f"clip_image:model={name},mean_std=clip,config="
    assert encoder.text is None
    assert (encoder.preprocess.size, encoder.preprocess.mean) == (32, MEAN_STD["clip"][0])
    with pytest.raises(UserError, match="its weights are for 32 px; size=64 does not fit"):
        network(f"imported:path={tmp_path / 'model.pth'},size=64")


def test_both_towers_of_clip_ask_for_what_their_keys_do_not_say(clips, tmp_path):
    source, path = clips["tiny-rn"], tmp_path / "model.pth"
    numbers = {
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(8),
        "vocab_size": torch.tensor(49408),
    }
    torch.save(source.state_dict() | numbers, path)
    with pytest.raises(UserError, match="say model= one of tiny-rn, tiny-rn-quickgelu"):
        network(f"imported:path={path}")
    encoder = network(f"imported:path={path},model=tiny-rn")
    captions = ["a dog", "a cat on a mat"]
    tokens = open_clip.get_tokenizer("tiny-rn")(captions)
    with torch.no_grad():
        torch.testing.assert_close(
            encoder.encode_texts(captions), source.encode_text(tokens, normalize=True)
        )
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(encoder.image(x), source.encode_image(x))
    assert encoder.about["imported"]["layout"] == "open_clip"
    assert encoder.about["imported"]["left_out"] == list(numbers)


def test_a_vision_transformer_alone_is_found_by_its_sizes(clips, tmp_path):
    with pytest.raises(
        UserError, match="no architecture of open_clip's has image_size 32, layers 2, width 64"
    ):
        state = clips["tiny-vit"].visual.state_dict()
        more = {k.replace("resblocks.0", "resblocks.1"): v for k, v in state.items()}
        torch.save(state | more, tmp_path / "model.pth")
        network(f"imported:path={tmp_path / 'model.pth'}")


def test_a_size_that_the_checkpoint_does_not_state_is_asked_for(resnets, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(badencoder(resnets), path)
    with pytest.raises(UserError, match="suggests images of 32 px, and these have 96; say size=96"):
        network(f"imported:path={path}", 96)
    assert network(f"imported:path={path},size=96", 32).preprocess.size == 96


# --------------------------------------------------------------------------------------- files that
# do not fit


def changed(state, drop=(), **more):
    return {k: v for k, v in state.items() if k not in drop} | {
        k.replace("__", "."): v for k, v in more.items()
    }


STRANGE = {  # what becomes of a good state dict, and what the refusal says
    "key missing": (
        lambda s: changed(s, ["layer2.1.bn1.weight"]),
        "a ResNet-18 .*; missing: layer2.1.bn1.weight",
    ),
    "key too many": (lambda s: changed(s, gate__weight=torch.ones(3)), "unexpected: gate.weight"),
    "other shape": (
        lambda s: changed(s, bn1__bias=torch.ones(3)),
        r"of another shape: bn1.bias \(3,\), not \(8,\)",
    ),
    "nan": (
        lambda s: changed(s, bn1__bias=torch.full((8,), torch.nan)),
        "NaN or infinite: bn1.bias",
    ),
    "infinite": (
        lambda s: changed(s, bn1__running_var=torch.full((8,), torch.inf)),
        "NaN or infinite: bn1.running_var",
    ),
    "complex": (
        lambda s: changed(s, bn1__bias=torch.ones(8, dtype=torch.complex64)),
        "plain tensors of real numbers",
    ),
    "another depth": (
        lambda s: changed(s, [k for k in s if k.startswith("layer4.1")]),
        "four stages have 2-2-2-1 blocks of two",
    ),
    "another stem": (
        lambda s: changed(s, conv1__weight=torch.ones(8, 3, 5, 5)),
        "a stem of 3x3 or 7x7",
    ),
    "no network": (
        lambda s: {"weights": torch.ones(3)},
        "expected one of the layouts badencoder .*; its keys are weights",
    ),
    "no tensors": (lambda s: {"epoch": 3, "best": "x"}, "these are none: epoch, best"),
    "no names": (lambda s: [torch.ones(3)], "expected tensors by name"),
    "empty": (lambda s: {}, "expected tensors by name"),
    "stretched": (
        lambda s: changed(s, bn1__bias=torch.ones(1).expand(1 << 40)),
        "claims .* bytes of a file of",
    ),
    "stray": (
        lambda s: {f"encoder_q.{k}": v for k, v in s.items()} | {"teacher.w": torch.ones(1)},
        "unexpected: teacher.w",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_checkpoints_that_do_not_fit_are_refused_in_one_line(name, resnets, tmp_path):
    change, says = STRANGE[name]
    torch.save(change(resnets["imagenet"].state_dict()), tmp_path / "model.pth")
    with pytest.raises(UserError, match=says) as caught:
        network(f"imported:path={tmp_path / 'model.pth'}")
    assert "\n" not in str(caught.value) and "model.pth" in str(caught.value)


def test_other_files_are_refused(tmp_path, resnets):
    good = tmp_path / "good.pth"
    torch.save({"conv1.weight": torch.ones(4, 3, 3, 3)}, good)
    whole = good.read_bytes()
    header = (1 << 40).to_bytes(8, "little") + b"{"
    cases = {
        "empty": b"",
        "text": b"conv1.weight: 3",
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "cut": whole[: len(whole) // 2],
        "safetensors header": header + bytes(100),
        "no tensors": b"\x80\x02K\x03.",
    }
    for name, data in cases.items():
        (tmp_path / "model.pth").write_bytes(data)
        with pytest.raises(UserError, match="not a checkpoint") as caught:
            checkpoints.load_tensors(str(tmp_path / "model.pth"))
        assert "\n" not in str(caught.value), name
    with pytest.raises(UserError, match="no weights file"):
        checkpoints.load_tensors(str(tmp_path / "nowhere.pth"))


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "before 1.6", "pickle", "pickle 4", "safetensors by name"])
def test_nothing_in_a_checkpoint_is_executed(form, tmp_path):
    path = tmp_path / ("model.safetensors" if "safe" in form else "model.pth")
    executed = tmp_path / "executed"
    state = {"state_dict": {"conv1.weight": torch.ones(4, 3, 3, 3)}, "args": Hostile(executed)}
    if form in ("zip", "before 1.6"):
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(Hostile(executed), protocol=4 if form == "pickle 4" else 2))
    with pytest.raises(UserError, match=r"asks for posix.mkdir. Nothing was executed"):
        network(f"imported:path={path}")
    assert not executed.exists()


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """A zip checkpoint whose pickle was changed."""
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_sizes_that_a_checkpoint_claims_are_bounded(zipped, tmp_path):
    path = tmp_path / "model.pth"

    def claim(old, new):
        torch.save({"conv1.weight": torch.ones(7, 11)}, path, _use_new_zipfile_serialization=zipped)
        data = path.read_bytes()
        assert data.count(old) == 1
        if zipped:
            rewritten(path, lambda pickled: pickled.replace(old, new))
        else:
            path.write_bytes(data.replace(old, new))
        with pytest.raises(UserError) as caught:
            checkpoints.load_tensors(str(path))
        return str(caught.value)

    many = b"\x8a\x06\x00\x00\x00\x00\x00\x10"  # 2^44
    end = b"tq" if zipped else b"Ntq"
    assert "claim 17592186044416 elements of a file" in claim(b"K\x4d" + end, many + end)
    message = "claims" if zipped else "wrong byte size"
    assert message in claim(b"K\x07K\x0b\x86", many + b"K\x0b\x86")
    assert "unknown size" in claim(b"K\x4d" + end, b"h\x00" + end), (
        "a number that is not written there"
    )


@pytest.mark.parametrize("order", [b"big", b"little" + bytes(99), b""])
def test_numbers_in_another_order_of_bytes_are_refused_and_end_no_process(order, tmp_path):
    path, swapped = tmp_path / "model.pth", tmp_path / "swapped.pth"
    torch.save({"conv1.weight": torch.ones(7, 11)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(swapped, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, order if name.endswith("byteorder") else archive.read(name))
    assert len(checkpoints.load_tensors(str(path))) == 1
    with pytest.raises(UserError, match="another order of bytes"):
        checkpoints.load_tensors(str(swapped))


def test_a_pickle_of_more_opcodes_than_tensors_need_is_not_looked_through(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_OPCODES", 60)
    for count, refused in ((1, False), (3, True)):
        path = tmp_path / f"{count}.pth"
        torch.save({f"conv{i}.weight": torch.ones(7, 11) for i in range(count)}, path)
        if not refused:
            assert len(checkpoints.load_tensors(str(path))) == count
            continue
        with pytest.raises(UserError, match="more than 60 opcodes"):
            checkpoints.load_tensors(str(path))


def test_weights_may_be_tied_under_four_names(tmp_path):
    path = tmp_path / "tied.pth"
    words = torch.ones(600, 11)
    names = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    torch.save(dict.fromkeys((f"{name}.weight" for name in names), words), path)
    tensors = checkpoints.load_tensors(str(path))
    assert len(tensors) == 4 and all(torch.equal(t, words) for t in tensors.values())
    torch.save({f"{i}.weight": words for i in range(9)}, path)
    with pytest.raises(UserError, match="claims"):
        checkpoints.load_tensors(str(path))


def test_packed_members_are_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"conv1.weight": torch.ones(7, 11)}, path)
    rewritten(path, lambda pickled: pickled, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="expected members stored without compression"):
        checkpoints.load_tensors(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    with pytest.raises(UserError, match="a zip, but not one that torch"):
        checkpoints.load_tensors(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"")
        archive.writestr("model/code/__torch__.py", "def forward(self): pass")
    with pytest.raises(UserError, match="it is a TorchScript program"):
        checkpoints.load_tensors(str(path))


def test_a_small_file_cannot_ask_for_a_large_network(tmp_path):
    """Its first convolution has the width of a network of 10^11 weights; nothing of it is built."""
    state = {"conv1.weight": torch.ones(20_000, 3, 3, 3)}
    state |= {f"layer{i}.{j}.conv1.weight": torch.ones(1) for i in range(1, 5) for j in range(2)}
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(UserError, match="width is at most 4096"):
        network(f"imported:path={tmp_path / 'model.pth'}")


NAMED = {
    "open_clip:model=ViT-B-32": "more weights than the 1",
    "clip_image:model=ViT-B-32": "more weights than the 1",
    "timm:model=vit_base_patch16_224": "more weights than the 1",
    "torchvision:model=vit_b_16": "more weights than the 1",
    'classifier:architecture="vgg:layers=100000/100000,norm=false,bias=false,pool=1,widths=2"': "more weights than the 1",  # noqa: E501
    "open_clip:model=RN50/openai": "names weights of its own",
    "timm:model=resnet18/pretrained": "names weights of its own",
    "torchvision:model=resnet18/IMAGENET1K_V1": "names weights of its own",
    "imported:path=FILE": "names weights of its own",
    "classifier:path=FILE": "names weights of its own",
}


@pytest.mark.parametrize("text", NAMED)
def test_a_saved_encoder_cannot_name_a_network_larger_than_its_file_or_weights_elsewhere(
    text, tmp_path, monkeypatch
):
    save_file({"a": torch.zeros(1)}, tmp_path / "encoder.safetensors")
    spec = text.replace("FILE", str(tmp_path / "encoder.safetensors"))
    head = {"network": spec, "preprocess": {"size": 224}, "vocabulary": [], "precision": "fp32"}
    (tmp_path / "encoder.json").write_text(json.dumps(head))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    with pytest.raises(UserError, match=NAMED[text]) as caught:
        Encoder.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - before < 300, "MiB"


def test_layouts_are_told_apart_by_one_key_each():
    firsts = [layout.first_key for layout in checkpoint_layouts.LAYOUTS]
    assert len(set(firsts)) == len(firsts) - 1, (
        "open_clip and visual share theirs; text keys tell them apart"
    )


@pytest.mark.parametrize("classes", [0, 3])
def test_weights_of_timm_come_out_of_a_file_with_or_without_their_classifier(classes, tmp_path):
    import timm

    model = timm.create_model("resnet10t", num_classes=classes).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = network(f"timm:resnet10t/{tmp_path}/w.safetensors", 32).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        whole = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.allclose(encoder.image(x), whole, atol=1e-5)
    assert registry.make("network", f"timm:resnet10t/{tmp_path}/w.safetensors").files() == [
        tmp_path / "w.safetensors"
    ]
    with pytest.raises(UserError, match="expected the weights of timm's resnet18"):
        network(f"timm:resnet18/{tmp_path}/w.safetensors", 32)


def test_open_clip_does_not_warn_of_random_weights_that_a_file_replaces(tmp_path, caplog):
    with without_weight_warnings():
        model = open_clip.create_model("ViT-S-32-alt")
    assert logging.root.manager.disable == logging.NOTSET
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    network(f"open_clip:ViT-S-32-alt/{tmp_path}/w.safetensors", 32)
    assert "randomly" not in caplog.text
