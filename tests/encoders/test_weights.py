"""Files and folders that say themselves what they are: every wrapping, timm, open_clip, the hub's
layout, bare paths.
"""

import json
import os

import huggingface_hub
import open_clip
import pytest
import timm
import torch
import torchvision
from encoders.test_classifier_networks import Cifar, Post
from encoders.toys import jumbled, pixels
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import nn

from bezoar import registry
from bezoar.encoders import timm_models
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError
from bezoar.runs.verb import resolve_text, spec_of_weights

CLIP = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


def load(path, extra=""):
    return registry.make("network", f'weights:path="{path}"{extra}')(0, ()).eval()


def logits(encoder, images):
    with torch.no_grad():
        z = encoder.image(encoder.prepare_images(images))
        return z if encoder.head is None else encoder.head(z)


def normalised(encoder, images):
    return (images.float() / 255 - encoder.mean) / encoder.std


# Files


def wrappings(state):
    """What training scripts save, by a name."""
    module = {f"module.{key}": tensor for key, tensor in state.items()}
    return {
        "plain": state,
        "state_dict": {"state_dict": module, "epoch": 3, "best": 0.9},
        "model": {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        "net": {"net": module, "acc": 91.2, "epoch": 10},
        "model_state_dict": {"model_state_dict": state, "loss": 0.1},
        "averaged": {"step": 5, "ema": module},
        "compiled": {f"_orig_mod.{key}": tensor for key, tensor in state.items()},
        "compiled within data parallelism": {
            f"module._orig_mod.{key}": tensor for key, tensor in state.items()
        },
        "lightning": {"state_dict": {f"model.{key}": tensor for key, tensor in state.items()}},
    }


@pytest.mark.parametrize("name", wrappings({}))
def test_a_classifier_is_read_out_of_every_wrapping(name, tmp_path):
    net = jumbled(Cifar(Post))
    torch.save(wrappings(net.state_dict())[name], tmp_path / "net.anything")
    encoder = load(tmp_path / "net.anything")
    images = pixels(32)
    assert torch.allclose(logits(encoder, images), net(normalised(encoder, images)), atol=1e-4)
    assert encoder.about["imported"]["layout"] == "classifier"
    assert any(text.startswith("mean_std=") for text in encoder.about["imported"]["assumed"])


def test_safetensors_names_of_classes_and_a_stated_normalisation(tmp_path):
    net = jumbled(Cifar(Post))
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    encoder = load(tmp_path / "net.safetensors", ",classes=cat+dog+bird+frog,mean_std=half")
    assert encoder.about["classes"] == ["cat", "dog", "bird", "frog"]
    assert encoder.preprocess.mean == (0.5, 0.5, 0.5)
    assert not any(t.startswith("mean_std=") for t in encoder.about["imported"]["assumed"])


def test_a_trunk_without_a_head_is_an_encoder_without_one(tmp_path):
    net = jumbled(torchvision.models.resnet18(num_classes=3))
    trunk = {key: v for key, v in net.state_dict().items() if not key.startswith("fc.")}
    torch.save({"state_dict": {f"encoder.{k}": v for k, v in trunk.items()}}, tmp_path / "a.pth")
    encoder = load(tmp_path / "a.pth")
    assert encoder.head is None and encoder.about["network"].startswith("resnet:")
    torch.save(net.state_dict(), tmp_path / "b.pth")
    assert load(tmp_path / "b.pth").head is not None


def test_a_vision_transformer_of_timm_is_told_by_its_shapes(tmp_path):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
    net = jumbled(timm.create_model("vit_base_patch16_224", num_classes=5, **options))
    torch.save({"model": net.state_dict()}, tmp_path / "checkpoint.pth")
    encoder = load(tmp_path / "checkpoint.pth")
    images = pixels(32)
    assert encoder.preprocess.size == 32
    assert torch.allclose(logits(encoder, images), net(normalised(encoder, images)), atol=1e-4)
    assert "2 attention heads" in encoder.about["imported"]["assumed"]
    with pytest.raises(UserError, match="takes no images of 64 px"):
        load(tmp_path / "checkpoint.pth", ",size=64")
    (tmp_path / "saved").mkdir()
    encoder.save(tmp_path / "saved")
    again = load(tmp_path / "saved")  # a folder of bezoar's own
    assert torch.equal(logits(again, images), logits(encoder, images))


@pytest.mark.parametrize("form", ["dino", "mae"])
def test_a_transformer_is_read_beside_what_it_was_trained_with(form, tmp_path):
    """DINO keeps a teacher with a head, and a student; MAE a decoder. Both read ImageNet's
    normalisation.
    """
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 1}
    net = jumbled(timm.create_model("vit_base_patch16_224", num_classes=0, **options))
    state = net.state_dict()
    if form == "dino":
        teacher = {f"backbone.{k}": v for k, v in state.items()}
        saved = {"teacher": teacher | {"head.mlp.0.weight": torch.zeros(3, 64)}, "epoch": 3}
        student = {f"module.{k}": v + 1 for k, v in teacher.items()}
        torch.save(saved | {"student": student}, tmp_path / "both.pth")
        with pytest.raises(UserError, match=r"holds 2 encoders.*say prefix="):
            load(tmp_path / "both.pth")
        load(tmp_path / "both.pth", ",prefix=teacher.backbone")
    else:
        decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pred.weight": torch.zeros(3, 8)}
        saved = {"model": state | decoder}
    torch.save(saved, tmp_path / "one.pth")
    encoder = load(tmp_path / "one.pth")
    images = pixels(32)
    assert torch.allclose(logits(encoder, images), net(normalised(encoder, images)), atol=1e-4)
    imported = encoder.about["imported"]
    assert "mean_std=imagenet" in imported["assumed"] and imported["left_out"]


def test_heads_of_training_beside_a_residual_networks_layers_are_left_out(tmp_path):
    """SwAV keeps its projection and its prototypes there."""
    trunk = registry.make("network", "resnet:depth=18,stem=imagenet,width=8")(64, ()).image
    heads = {"projection_head.0.weight": torch.zeros(4, 64), "prototypes.weight": torch.zeros(9, 4)}
    state = {f"module.{key}": tensor for key, tensor in (trunk.state_dict() | heads).items()}
    torch.save({"state_dict": state}, tmp_path / "swav.pth.tar")
    imported = load(tmp_path / "swav.pth.tar", ",size=64").about["imported"]
    assert imported["left_out"] == ["projection_head", "prototypes"]


def lukemelas_names(net):
    """The state dict of timm's EfficientNet by the names of efficientnet-pytorch."""
    outer = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
    outer["classifier"] = "_fc"
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    wide = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    wide |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    squeeze = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
    state = net.state_dict()
    places = list(
        dict.fromkeys(".".join(k.split(".")[:3]) for k in state if k.startswith("blocks."))
    )
    renamed = {}
    for key, tensor in state.items():
        if not key.startswith("blocks."):
            part, _, weight = key.partition(".")
            renamed[f"{outer[part]}.{weight}"] = tensor
            continue
        place = ".".join(key.split(".")[:3])
        part, _, weight = key.removeprefix(f"{place}.").rpartition(".")
        names = (wide if f"{place}.conv_pwl.weight" in state else plain) | squeeze
        renamed[f"_blocks.{places.index(place)}.{names[part]}.{weight}"] = tensor
    return renamed


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_b0"])
def test_efficientnets_by_lukemelas_names(name, tmp_path):
    net = timm.create_model(name, num_classes=7).eval()
    net.classifier.bias.data = torch.arange(7.0)
    torch.save(lukemelas_names(net), tmp_path / "efficientnet.pth")
    encoder = load(tmp_path / "efficientnet.pth", ",mean_std=half")
    images = pixels(224, 1)
    assert encoder.about["network"].startswith(f"timm:model={name}.")
    with torch.no_grad():
        expected = net(normalised(encoder, images))
    assert torch.allclose(logits(encoder, images), expected, atol=1e-4)
    smaller = load(tmp_path / "efficientnet.pth", ",mean_std=half,size=64")
    assert smaller.preprocess.size == 64 and smaller.about["imported"]["assumed"] == []
    model, weights = timm_models.rename_lukemelas(lukemelas_names(net), "")
    assert model == name and set(weights) == set(net.state_dict())


@pytest.mark.slow  # some fifty models are compared
def test_weights_that_fit_several_models_ask_for_one_unless_the_file_says_it(tmp_path):
    state = timm.create_model("efficientnet_b0", num_classes=2).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"efficientnet_b0, .*say model="):
        load(tmp_path / "weights.safetensors")
    network = load(tmp_path / "weights.safetensors", ",model=tf_efficientnet_b0").about["network"]
    assert network.startswith("timm:model=tf_efficientnet_b0")
    save_file(state, tmp_path / "efficientnet_b0_mine.safetensors")
    network = load(tmp_path / "efficientnet_b0_mine.safetensors").about["network"]
    assert network.startswith("timm:model=efficientnet_b0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1", "regnet_y_400mf"]
)
def test_torchvisions_other_classifiers(name, tmp_path):
    net = torchvision.models.get_model(name, num_classes=3).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    if name == "squeezenet1_1":  # it ends in a convolution
        with pytest.raises(UserError):
            load(tmp_path / "net.pth")
        return
    encoder = load(tmp_path / "net.pth")
    images = pixels(224, 1)
    with torch.no_grad():
        assert torch.allclose(logits(encoder, images), net(normalised(encoder, images)), atol=1e-4)


def test_what_is_none_of_these_is_said_in_a_line(tmp_path):
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"its keys are a\.weight"):
        load(tmp_path / "a.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match="not a checkpoint"):
        load(tmp_path / "text.pth")
    with pytest.raises(UserError, match="no file or folder"):
        load(tmp_path / "none")
    (tmp_path / "lfs.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="a pointer of Git LFS"):
        load(tmp_path / "lfs.bin")
    # A network of unpadded convolutions by the names of a VGG: 32 px, 30, 15, 13, 6.
    parts = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    tutorial = nn.ModuleDict({"features": nn.Sequential(*parts, nn.Conv2d(4, 8, 3), *parts[1:])})
    tutorial["classifier"] = nn.Linear(8 * 6 * 6, 10)
    torch.save(tutorial.state_dict(), tmp_path / "tutorial.pth")
    with pytest.raises(UserError, match="of no usual image"):
        load(tmp_path / "tutorial.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected a run of bezoar or a pretrained model"):
        load(tmp_path / "empty")


# Folders


def timm_folder(folder, **changes):
    net = jumbled(timm.create_model("test_vit", num_classes=3))
    config = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "interpolation": "bilinear"}
    net.pretrained_cfg = {**net.pretrained_cfg, **config}
    save_for_hf(net, folder, safe_serialization=True, **changes)
    return net


def test_a_folder_of_timm_brings_its_preprocessing_and_its_head(tmp_path):
    net = timm_folder(tmp_path)
    encoder = load(tmp_path)
    assert encoder.preprocess.mean == (0.4, 0.5, 0.6) and encoder.preprocess.std == (0.2, 0.3, 0.25)
    assert encoder.preprocess.interpolation == "bilinear"
    assert encoder.about["imported"]["assumed"] == []
    images = pixels(encoder.preprocess.size)
    assert torch.allclose(logits(encoder, images), net(normalised(encoder, images)), atol=1e-4)
    (tmp_path / "saved").mkdir()
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved")
    assert again.preprocess == encoder.preprocess
    assert torch.equal(logits(again, images), logits(encoder, images))


def test_a_folder_of_timm_states_the_size_and_the_classes(tmp_path):
    net = jumbled(timm.create_model("test_resnet", num_classes=3))
    net.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, 48, 48)}
    save_for_hf(net, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"label_names": ["a", "b", "b"]}))
    encoder = load(tmp_path)
    assert encoder.preprocess.size == 48 and encoder.about["classes"] == ["a", "b", "b (2)"]
    assert load(tmp_path, ",size=64").preprocess.size == 64


def test_a_folder_of_one_file_of_weights_is_that_file(tmp_path):
    net = jumbled(Cifar(Post))
    torch.save({"state_dict": net.state_dict()}, tmp_path / "best.pth")
    (tmp_path / "log.txt").write_text("epoch 3")
    assert torch.equal(
        logits(load(tmp_path), pixels(32)), logits(load(tmp_path / "best.pth"), pixels(32))
    )
    torch.save({"state_dict": net.state_dict()}, tmp_path / "last.pth")
    with pytest.raises(UserError, match="expected a run of bezoar or a pretrained model"):
        load(tmp_path)


def test_arguments_of_a_model_are_those_that_a_file_may_state(tmp_path):
    net = timm.create_model("test_vit", num_classes=0, img_size=80)
    save_for_hf(net, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    stated = config | {"model_args": {"img_size": 80}}  # as newer versions of timm write it
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert load(tmp_path).preprocess.size == 80
    for arguments in (
        {"checkpoint_path": "/etc/passwd"},
        {"depth": 10**9},
        {"embed_dim": [3] * 99},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": arguments}))
        with pytest.raises(UserError, match=r"no file may state|expected at most"):
            load(tmp_path)


def open_clip_folder(folder, config=CLIP):
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
    facts = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def test_a_folder_of_open_clip_brings_both_towers_and_its_preprocessing(tmp_path):
    model = open_clip_folder(tmp_path)
    encoder = load(tmp_path)
    assert encoder.preprocess.mean == (0.1, 0.2, 0.3) and encoder.preprocess.size == 16
    images = pixels(16)
    with torch.no_grad():
        x = normalised(encoder, images)
        assert torch.allclose(encoder.image(x), model.encode_image(x), atol=1e-5)
        tokens = open_clip.SimpleTokenizer()(["a photo of a dog"])
        assert torch.equal(encoder.tokenize(["a photo of a dog"]), tokens)
        assert torch.allclose(encoder.text(tokens), model.encode_text(tokens), atol=1e-5)
    (tmp_path / "saved").mkdir()
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved")
    assert again.preprocess == encoder.preprocess
    assert torch.equal(again.encode_texts(["two"]), encoder.encode_texts(["two"]))


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_that_a_folder_squashes_pictures_is_said_because_they_are_cut(mode, tmp_path):
    open_clip_folder(tmp_path)
    file = tmp_path / "open_clip_config.json"
    facts = json.loads(file.read_text())
    facts["preprocess_cfg"]["resize_mode"] = mode
    file.write_text(json.dumps(facts))
    left_out = load(tmp_path).about["imported"]["left_out"]
    cut = ["the resizing (squash) of pictures that are not square, which are cut"]
    assert left_out == cut * (mode == "squash")


def test_a_text_tower_with_another_tokenizer_is_left_out(tmp_path):
    text = CLIP["text_cfg"] | {"hf_tokenizer_name": "bert-base-uncased"}
    model = open_clip_folder(tmp_path, CLIP | {"text_cfg": text})
    encoder = load(tmp_path)
    assert encoder.text is None and encoder.about["imported"]["left_out"]
    x = normalised(encoder, pixels(16))
    with torch.no_grad():
        assert torch.allclose(encoder.image(x), model.encode_image(x), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"vision_cfg": {"layers": 10**6}},
        {"vision_cfg": {"width": 10**9}},
        {"vision_cfg": {"timm_model_name": "a b; c"}},
        {"vision_cfg": {"unknown": 1}},
        {"multimodal_cfg": {}},
        {"embed_dim": 99},
    ],
)
def test_a_config_of_open_clip_that_does_not_fit_is_refused_in_a_line(change, tmp_path):
    open_clip_folder(tmp_path)
    config = json.loads(json.dumps(CLIP))
    for key, value in change.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    facts = json.loads((tmp_path / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps(facts | {"model_cfg": config}))
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def hub_layout(folder):
    """The hub's own cache: files are links into `blobs`."""
    state = folder / "snapshots" / "0123abc"
    timm_folder(folder / "written")
    (folder / "blobs").mkdir()
    state.mkdir(parents=True)
    for i, name in enumerate(("config.json", "model.safetensors")):
        os.rename(folder / "written" / name, folder / "blobs" / f"blob{i}")
        (state / name).symlink_to(f"../../blobs/blob{i}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc")
    return state


def test_the_hubs_own_cache_is_read(tmp_path):
    state = hub_layout(tmp_path / "models--timm--x")
    images = pixels(load(state).preprocess.size)
    assert torch.equal(logits(load(state.parents[1]), images), logits(load(state), images))


def test_a_name_of_the_hub_is_fetched_once_and_read_as_a_folder(tmp_path, monkeypatch):
    state = hub_layout(tmp_path)
    requests = []

    def snapshot(name, revision=None, allow_patterns=()):
        requests.append((name, allow_patterns))
        return str(state)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    network = resolve_text("hf-hub:timm/test_vit.r160_in1k", "encoder", tmp_path)
    encoder = network(0, ())
    assert encoder.head is not None and encoder.about["imported"]["file"].startswith("hf-hub:timm/")
    assert all(name == "timm/test_vit.r160_in1k" for name, _ in requests)
    assert not any("bin" in pattern for _, patterns in requests for pattern in patterns)


def test_without_a_network_a_name_of_the_hub_is_a_users_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf-hub:nobody/nothing could not be fetched") as caught:
        registry.make("network", "hub:nobody/nothing")(0, ())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="expected ORG/NAME"):
        registry.make("network", "hub:../../etc")


def test_a_saved_encoder_cannot_name_a_model_of_the_hub(tmp_path):
    registry.make("network", "tower:width=4,dim=8")(32).save(tmp_path)
    facts = json.loads((tmp_path / "encoder.json").read_text())
    for network in (
        "hub:nobody/nothing",
        f"weights:path={tmp_path}",
        f"hugging_face:path={tmp_path}",
    ):
        (tmp_path / "encoder.json").write_text(json.dumps(facts | {"network": network}))
        with pytest.raises(UserError, match="names weights of its own"):
            Encoder.load(tmp_path)


def test_a_saved_preprocessing_is_read_back_and_bounded(tmp_path):
    registry.make("network", "tower:width=4,dim=8")(32).save(tmp_path)
    facts = json.loads((tmp_path / "encoder.json").read_text())

    def load_with(**changes):
        preprocess = facts["preprocess"] | changes
        (tmp_path / "encoder.json").write_text(json.dumps(facts | {"preprocess": preprocess}))
        return Encoder.load(tmp_path).preprocess

    assert load_with(mean=[0.1, 0.2, 0.3]).mean == (0.1, 0.2, 0.3)
    for changes in ({"std": [0, 1, 1]}, {"mean": [1]}, {"mean": "abc"}, {"interpolation": "x"}):
        with pytest.raises(UserError):
            load_with(**changes)


# Bare paths


def test_bare_paths_and_names_of_the_hub(tmp_path):
    file = tmp_path / "a, b.pth"
    file.write_bytes(b"")
    assert spec_of_weights(str(file)) == f'weights:path="{file}"'
    assert spec_of_weights("hf-hub:org/name") == "hub:name=org/name"
    assert spec_of_weights("resnet:depth=18") == "resnet:depth=18"
    assert spec_of_weights("clip_small") == "clip_small"
    network = resolve_text(str(file), "encoder", tmp_path)
    assert registry.method_name(type(network)) == "weights"
    with pytest.raises(UserError, match="no run 'none'"):
        resolve_text("none", "encoder", tmp_path)
