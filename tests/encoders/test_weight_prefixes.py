"""Encoders below the names that training wrapped around them, by every network that takes a
file.
"""

import argparse
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from encoders.toys import jumbled, pixels
from torch import Tensor, nn

from bezoar import registry
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.open_clip_models import without_weight_warnings
from bezoar.errors import UserError

Weights = dict[str, Tensor]


def network(spec: str) -> Encoder:
    made: Encoder = registry.make("network", spec)(0, ())
    return made.eval()


@pytest.fixture(scope="module")
def trunk() -> nn.Module:
    """A narrow ResNet-18."""
    with torch.no_grad():
        return jumbled(
            registry.make("network", "resnet:depth=18,stem=imagenet,width=8")(224, ()).image
        )


def named(trunk: nn.Module, prefix: str, scale: float = 1.0) -> Weights:
    return {prefix + key: value * scale for key, value in trunk.state_dict().items()}


def vectors(encoder: Encoder) -> Tensor:
    with torch.inference_mode():
        return encoder.image(encoder.prepare_images(pixels(64)))


def wrapped(trunk: nn.Module) -> dict[str, object]:
    """Files as training writes them, by name; each holds one encoder."""
    predictor = {"module.predictor.0.weight": torch.zeros(4, 4)}
    return {
        "plain.pth": named(trunk, ""),
        "compiled.pth": named(trunk, "_orig_mod."),
        "ddp_compiled.pth": {"state_dict": named(trunk, "module._orig_mod.")},
        "simsiam.pth.tar": {"epoch": 3, "state_dict": named(trunk, "module.encoder.") | predictor},
        "dino.ckpt": {"epoch": 3, "student": named(trunk, "module.backbone."), "args": {"lr": 1}},
        "nested": {"model": {"state_dict": named(trunk, "net.")}, "optimizer": {"state": {}}},
    }


@pytest.mark.parametrize("name", list(wrapped(nn.Identity())))
def test_an_encoder_is_read_below_what_training_wrapped_around_it(
    name: str, trunk: nn.Module, tmp_path: Path
) -> None:
    expected = vectors(network_of(trunk, tmp_path))
    torch.save(wrapped(trunk)[name], tmp_path / name)
    encoder = network(f"imported:path={tmp_path}/{name}")
    assert torch.equal(vectors(encoder), expected)
    left_out = encoder.about["imported"]["left_out"]
    assert left_out == (["predictor"] if name.startswith("simsiam") else [])
    # An old file, before the zip format of torch 1.6, is told by its content as well.
    old = tmp_path / "old.tar"
    torch.save(wrapped(trunk)[name], old, _use_new_zipfile_serialization=False)
    assert torch.equal(vectors(network(f"imported:path={old}")), expected)


def network_of(trunk: nn.Module, folder: Path) -> Encoder:
    torch.save(named(trunk, ""), folder / "expected.pth")
    return network(f"imported:path={folder}/expected.pth")


def teacher_and_student(trunk: nn.Module) -> dict[str, Weights]:
    return {
        "student": named(trunk, "module.backbone."),
        "teacher": named(trunk, "backbone.", 0.5),
    }


def test_several_encoders_are_named_and_the_user_chooses(trunk: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pth"
    torch.save(teacher_and_student(trunk), path)
    names = "holds 2 encoders: student.module.backbone, teacher.backbone; say prefix= one of them"
    with pytest.raises(UserError, match=names):
        network(f"imported:path={path}")
    torch.save(named(trunk, "", 0.5), tmp_path / "half.pth")
    expected = vectors(network(f"imported:path={tmp_path}/half.pth"))
    for prefix in ("teacher", "teacher.backbone", "teacher.backbone."):
        assert torch.equal(vectors(network(f"imported:path={path},prefix={prefix}")), expected)
    with pytest.raises(UserError, match="no weights under prefix=mother; its keys are student"):
        network(f"imported:path={path},prefix=mother")


def test_a_prefix_names_what_lies_beside_the_wrapper(trunk: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "ema.pth"
    torch.save({"state_dict": named(trunk, ""), "state_dict_ema": named(trunk, "", 0.5)}, path)
    plain, averaged = (
        network(f"imported:path={path}{more}") for more in ("", ",prefix=state_dict_ema")
    )
    assert torch.equal(
        plain.image.state_dict()["conv1.weight"] / 2, averaged.image.state_dict()["conv1.weight"]
    )


def test_what_may_belong_to_an_encoder_is_not_left_out_unasked(
    trunk: nn.Module, tmp_path: Path
) -> None:
    weights = named(trunk, "1.") | {"0.mean": torch.zeros(3), "0.std": torch.ones(3)}
    torch.save(weights, tmp_path / "normalised.pth")
    text = "beside the encoder 1 stand 0.mean, 0.std; say prefix=1"
    with pytest.raises(UserError, match=text):
        network(f"imported:path={tmp_path}/normalised.pth")
    assert network(f"imported:path={tmp_path}/normalised.pth,prefix=1")


def test_a_classifier_is_read_below_its_wrappers(trunk: nn.Module, tmp_path: Path) -> None:
    head = {"fc.weight": torch.randn(5, 64), "fc.bias": torch.randn(5)}
    weights = {**named(trunk, ""), **head}
    torch.save(weights, tmp_path / "plain.pth")
    expected = vectors(network(f"classifier:path={tmp_path}/plain.pth"))
    files: dict[str, object] = {
        "compiled.pth": {f"_orig_mod.{k}": v for k, v in weights.items()},
        "lightning.ckpt": {
            "state_dict": {f"model.{k}": v for k, v in weights.items()}
            | {"criterion.weight": torch.ones(5)}
        },
        "two.pth": {
            "student": weights,
            "teacher": {key: value * 0.5 for key, value in weights.items()},
        },
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    for name in ("compiled.pth", "lightning.ckpt", "two.pth,prefix=student"):
        assert torch.equal(vectors(network(f"classifier:path={tmp_path}/{name}")), expected)
    with pytest.raises(UserError, match="holds 2 encoders: student, teacher"):
        network(f"classifier:path={tmp_path}/two.pth")


@pytest.mark.parametrize("name", ["timm.pth.tar", "timm.ckpt", "weights"])
def test_a_file_of_timm_is_what_is_there_whatever_its_name(name: str, tmp_path: Path) -> None:
    with torch.no_grad():
        model = jumbled(timm.create_model("resnet10t", num_classes=10))
    torch.save({"state_dict": model.state_dict()}, tmp_path / name)
    spec = f"timm:resnet10t/{tmp_path}/{name}"
    assert registry.make("network", spec).files() == [tmp_path / name]
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        assert torch.allclose(network(spec).image(x), expected, atol=1e-5)
    two = {
        side: {f"backbone.{key}": value for key, value in model.state_dict().items()}
        for side in ("student", "teacher")
    }
    torch.save(two, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"holds 2 encoders: student\.backbone, teacher\.backbone"):
        network(f"timm:resnet10t/{tmp_path}/two.pth")
    with torch.inference_mode():
        chosen = network(f"timm:resnet10t/{tmp_path}/two.pth,prefix=teacher").image(x)
    assert torch.allclose(chosen, expected, atol=1e-5)
    with pytest.raises(UserError, match="no weights file"):
        network(f"timm:resnet10t/{tmp_path}/nowhere.ckpt")


def test_a_compiled_clip_is_read_by_open_clip(tmp_path: Path) -> None:
    with without_weight_warnings():
        model = open_clip.create_model("ViT-S-32-alt")
    weights = model.state_dict()
    torch.save(
        {"state_dict": {f"module._orig_mod.{k}": v for k, v in weights.items()}},
        tmp_path / "clip.ckpt",
    )
    encoder = network(f"open_clip:ViT-S-32-alt/{tmp_path}/clip.ckpt")
    held = encoder.image.get_submodule("model").state_dict()
    assert all(torch.equal(held[key], weights[key]) for key in weights)


def test_tars_and_pickles_are_refused_without_being_loaded(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "weights.pth.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("weights.pth"))
    with pytest.raises(UserError, match="it is a tar archive, not a checkpoint"):
        network(f"imported:path={tmp_path}/weights.pth.tar")
    (tmp_path / "evil").write_bytes(b"\x80\x04cos\nsystem\n(S'exit'\ntR.")
    for spec in ("imported:path=", "timm:resnet10t/", "classifier:path="):
        with pytest.raises(UserError, match=r"os\.system.*Nothing was executed"):
            network(f"{spec}{tmp_path}/evil")


class Forbidden:
    """Says that it was built."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("built",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_what_training_left_beside_its_weights_is_not_loaded(
    zipped: bool, trunk: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options (SupContrast, DINO), numbers and arrays of numpy (BackdoorBench), Lightning's
    dicts.
    """
    parsing = types.ModuleType("pytorch_lightning.utilities.parsing")
    attributes = type("AttributeDict", (dict,), {"__module__": parsing.__name__})
    monkeypatch.setattr(parsing, "AttributeDict", attributes, raising=False)
    for name in ("pytorch_lightning", "pytorch_lightning.utilities", parsing.__name__):
        monkeypatch.setitem(sys.modules, name, parsing)
    beside = {
        "opt": argparse.Namespace(lr=0.1, names=["a"], device=torch.device("cpu")),
        "acc": np.float64(93.2),
        "poison_indicator": np.arange(3),
        "path": tmp_path,
        "hyper_parameters": attributes(lr=0.1, rows={1, 2}),
        "epoch": 3,
    }
    path = tmp_path / "last.pth"
    state = {"model": named(trunk, "module.encoder.")} | beside
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    plain = tmp_path / "plain.pth"
    torch.save(named(trunk, ""), plain)
    loaded, expected = (vectors(network(f"imported:path={p},size=64")) for p in (path, plain))
    assert torch.equal(loaded, expected)
    state["opt"] = argparse.Namespace(call=Forbidden())
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"asks for \w+\.print\. Nothing was executed"):
        network(f"imported:path={path}")


def test_a_dict_that_holds_itself_ends(tmp_path: Path) -> None:
    loop: dict[str, object] = {"weights": torch.zeros(1)}
    loop |= dict.fromkeys(map(str, range(100)), loop)
    torch.save(loop, tmp_path / "loop.pth")
    with pytest.raises(UserError, match=r"loop\.pth: "):
        network(f"imported:path={tmp_path}/loop.pth")
