"""Models of transformers, computed by open_clip and timm, against what transformers itself
computed.

`transformers.json` holds for each kind of model its config, the names and shapes of its weights,
and the vectors that the library gave for two images. Weights are drawn from the names. Where the
library is installed, it is asked again.
"""

import json
import zlib
from pathlib import Path

import pytest
import torch
from encoders.toys import pixels
from safetensors.torch import save_file

from bezoar import registry
from bezoar.encoders.encoder import Encoder
from bezoar.errors import UserError

RECORDED = Path(__file__).with_name("transformers.json")
MODELS = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.25, 0.2]
CAPTIONS = ("a photo of a cat", "two dogs")


def draw(shapes):
    """Weights by name; what a name is given depends on the name alone."""
    weights = {}
    for name, shape in shapes.items():
        chance = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(shape, generator=chance)
        is_vector = len(shape) < 2 and "bias" not in name
        weights[name] = 1 + 0.2 * noise if is_vector else 0.3 * noise
    return weights


def write_folder(folder, model, preprocessor=True, **changes):
    """A folder as save_pretrained writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(draw(model["shapes"]), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model["config"] | changes))
    if preprocessor:
        size = model["side"]
        facts = {"image_mean": MEAN, "image_std": STD, "resample": 2, "do_normalize": True}
        facts |= {"size": {"height": size, "width": size}}
        (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


def load(folder, network="weights"):
    torch.manual_seed(0)
    return registry.make("network", f'{network}:path="{folder}"')(0, ()).eval()


def raw_vectors(encoder, images):
    with torch.no_grad():
        return encoder.image(encoder.prepare_images(images))


@pytest.mark.parametrize("name", MODELS)
def test_vectors_are_those_of_transformers(name, tmp_path):
    """Vectors of images, logits and vectors of texts, to the last digits of float32."""
    model = MODELS[name]
    encoder = load(write_folder(tmp_path, model))
    assert encoder.preprocess.mean == tuple(MEAN) and encoder.preprocess.std == tuple(STD)
    assert encoder.preprocess.size == model["side"]
    assert encoder.preprocess.interpolation == "bilinear"
    assert encoder.about["imported"]["assumed"] == []
    z = raw_vectors(encoder, pixels(model["side"]))
    assert torch.allclose(z, torch.tensor(model["vectors"]), rtol=1e-3, atol=2e-4)
    if "logits" in model:
        assert encoder.about["classes"] == ["cat", "dog", "frog"]
        assert torch.allclose(encoder.head(z), torch.tensor(model["logits"]), rtol=1e-3, atol=1e-3)
    assert (encoder.text is not None) == ("texts" in model)
    if "texts" in model:
        w = encoder.text(encoder.tokenize(CAPTIONS))
        assert torch.allclose(w, torch.tensor(model["texts"]), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_they_are_saved_and_read_without_the_folder(name, tmp_path):
    encoder = load(write_folder(tmp_path / "model", MODELS[name]))
    (tmp_path / "saved").mkdir()
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved")
    images = pixels(MODELS[name]["side"])
    assert again.preprocess == encoder.preprocess
    assert torch.equal(raw_vectors(again, images), raw_vectors(encoder, images))
    assert (again.head is None) == (encoder.head is None)


def test_published_names_of_a_vit_are_read_too(tmp_path):
    """Files that transformers 4 wrote: attention.attention.query, intermediate.dense."""
    model = MODELS["vit"]
    older = {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
        "vit.layers.": "vit.encoder.layer.",
    }
    weights = draw(model["shapes"])
    for new, old in older.items():
        weights = {key.replace(new, old): tensor for key, tensor in weights.items()}
    folder = write_folder(tmp_path, model)
    save_file(weights, folder / "model.safetensors")
    z = raw_vectors(load(folder), pixels(model["side"]))
    assert torch.allclose(z, torch.tensor(model["vectors"]), rtol=1e-3, atol=2e-4)


def test_without_a_preprocessor_the_normalisation_is_guessed_and_said(tmp_path):
    encoder = load(write_folder(tmp_path, MODELS["siglip"], preprocessor=False))
    assert encoder.about["imported"]["assumed"] == ["mean_std=half"]
    assert encoder.preprocess.mean == (0.5, 0.5, 0.5)
    stated = registry.make("network", f'weights:path="{tmp_path}",mean_std=clip')(0, ())
    assert stated.about["imported"]["assumed"] == []
    assert stated.preprocess.mean[0] == pytest.approx(0.48145466)
    side = stated.preprocess.size
    sized = registry.make("network", f'weights:path="{tmp_path}",size={side}')(0, ())
    assert sized.preprocess.size == side
    with pytest.raises(UserError, match=str(side * 2)):  # its position embeddings are of one size
        registry.make("network", f'weights:path="{tmp_path}",size={side * 2}')(0, ())


def test_pixels_that_are_not_rescaled_are_normalised_as_they_are(tmp_path):
    """do_rescale false: the library subtracts means of 0..255."""
    folder = write_folder(tmp_path, MODELS["vit"])
    facts = {"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    preprocess = load(folder).preprocess
    assert preprocess.mean == (0.5,) * 3 and preprocess.std == (0.2,) * 3


def spoil_preprocessor(folder, **facts):
    path = write_folder(folder, MODELS["vit"]) / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return folder


@pytest.mark.parametrize(
    "facts",
    [
        {"image_mean": [10**400] * 3},
        {"rescale_factor": 1e-320},
        {"size": {"height": 10**9}},
        {"size": [[16]]},
    ],
)
def test_a_preprocessor_of_no_sense_is_refused_in_a_line(facts, tmp_path):
    with pytest.raises(UserError) as caught:
        load(spoil_preprocessor(tmp_path, **facts))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("resample", [[], {}, None, "3", 99])
def test_an_unknown_interpolation_is_the_usual_one(resample, tmp_path):
    assert (
        load(spoil_preprocessor(tmp_path, resample=resample)).preprocess.interpolation == "bicubic"
    )


def test_weights_alone_ask_for_their_folder(tmp_path):
    folder = write_folder(tmp_path, MODELS["vit"])
    with pytest.raises(UserError, match="name the folder"):
        load(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "t5"}, "a model 't5'"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be|no transformer has"),
        ({"hidden_size": 17}, "no transformer has|expected the weights"),
        ({"num_attention_heads": -1}, "whole number"),
        ({"patch_size": "8"}, "whole number"),
        ({"hidden_act": "relu"}, "activation relu"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"intermediate_size": 1 << 17}, "of another shape"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_a_line(changes, words, tmp_path):
    folder = write_folder(tmp_path, MODELS["vit"], **changes)
    with pytest.raises(UserError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_weights_in_several_files(tmp_path):
    folder = write_folder(tmp_path, MODELS["dinov2"])
    weights = draw(MODELS["dinov2"]["shapes"])
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({key: weights[key] for key in part}, folder / file)
    index = {"weight_map": {key: file for file, part in halves.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    z = raw_vectors(load(folder), pixels(MODELS["dinov2"]["side"]))
    assert torch.allclose(z, torch.tensor(MODELS["dinov2"]["vectors"]), rtol=1e-3, atol=2e-4)
    index["weight_map"]["embeddings.cls_token"] = "../outside.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="expected the names"):
        load(folder)


# Asking transformers itself


def make_models():
    """For each kind a model of transformers, its config's changes, and the side of its images."""
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    vision = sizes | {"intermediate_size": 24, "image_size": 16, "patch_size": 8}
    text = sizes | {"intermediate_size": 40, "vocab_size": 49408, "max_position_embeddings": 77}
    other_words = text | {"vocab_size": 50}
    dino = {k: v for k, v in vision.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
    labels = {
        "id2label": {0: "cat", 1: "dog", 2: "frog"},
        "label2id": {"cat": 0, "dog": 1, "frog": 2},
    }
    t = transformers
    clip = t.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    gelu = t.CLIPConfig(
        vision_config=vision | {"hidden_act": "gelu"},
        text_config=other_words | {"hidden_act": "gelu"},
        projection_dim=12,
    )
    siglip = t.SiglipConfig(vision_config=vision, text_config=other_words)
    return {
        "clip": (t.CLIPModel(clip), 16),
        "clip_other_words": (t.CLIPModel(gelu), 16),
        "clip_image": (
            t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**vision, projection_dim=12)),
            16,
        ),
        "siglip": (t.SiglipModel(siglip), 16),
        "siglip_image": (t.SiglipVisionModel(t.SiglipVisionConfig(**vision)), 16),
        "vit": (t.ViTForImageClassification(t.ViTConfig(**vision, **labels)), 16),
        "vit_trunk": (t.ViTModel(t.ViTConfig(**vision)), 16),
        "dinov2": (t.Dinov2Model(t.Dinov2Config(**dino)), 16),
        "dinov2_larger": (t.Dinov2Model(t.Dinov2Config(**dino)), 24),
        "dinov2_registers": (
            t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**dino, num_register_tokens=3)),
            24,
        ),
    }


def ask(model, side, folder):
    """What is recorded of a model."""
    model.eval().save_pretrained(folder)
    from safetensors.torch import load_file

    shapes = {
        key: list(tensor.shape) for key, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(draw(shapes), folder / "model.safetensors", {"format": "pt"})
    model = type(model).from_pretrained(folder).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    x = (pixels(side).float() / 255 - mean) / std
    config = json.loads((folder / "config.json").read_text())
    answer = {"config": config, "shapes": shapes, "side": side}
    with torch.no_grad():
        if hasattr(model, "get_text_features"):
            z = model.get_image_features(x)
            z = getattr(z, "pooler_output", z)
            if model.config.text_config.vocab_size == 49408:
                from open_clip import SimpleTokenizer

                w = model.get_text_features(SimpleTokenizer()(list(CAPTIONS)))
                answer["texts"] = getattr(w, "pooler_output", w).tolist()
        else:
            out = model(x, output_hidden_states=True)
            trunk = getattr(model, "vit", model)
            if hasattr(out, "logits"):
                answer["logits"] = out.logits.tolist()
                z = trunk(x).last_hidden_state[:, 0]
            elif hasattr(out, "image_embeds"):
                z = out.image_embeds
            elif config["model_type"] == "siglip_vision_model":
                z = out.pooler_output
            else:
                z = out.last_hidden_state[:, 0]
    return answer | {"vectors": z.tolist()}


def test_what_is_recorded_is_what_transformers_gives(tmp_path):
    """Skipped where transformers is not installed."""
    for name, (model, side) in make_models().items():
        answer = ask(model, side, tmp_path / name)
        assert answer["shapes"] == MODELS[name]["shapes"]
        z = torch.tensor(answer["vectors"])
        assert torch.allclose(z, torch.tensor(MODELS[name]["vectors"]), rtol=1e-3, atol=1e-4)
