"""README's commands on real captioned shards: poison, verify, train, evaluate, scan. Small slices;
figures are not judged.
"""

import json
from pathlib import Path

import pytest

from bezoar.cli import main

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")


def ask(capsys, runs, *words):
    assert main([*words, "--runs", str(runs), "--json", "full"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    return manifest, next(
        p.parent.name for p in runs.glob("*/manifest.json") if json.loads(p.read_text()) == manifest
    )


@needs_data
def test_flickr8k_by_retrieval(tmp_path, capsys):
    train = f"shards:path={DATA}/flickr8k/train-{{00000..00001}}.tar,size=32,captions=first"
    test = f"shards:path={DATA}/flickr8k/val-00000.tar,size=32,captions=all"
    words = ["--poison", "backdoor:count=40", "--trigger", "patch:size=6", "--target", "dog"]
    manifest, poison = ask(capsys, tmp_path, "poison", train, *words)
    assert manifest["notes"]["records"] == 2000
    _, many = ask(
        capsys,
        tmp_path,
        "poison",
        poison,
        "--poison",
        "targeted:captions=4,victims=3",
        "--target",
        "beach",
    )
    assert main(["verify", many, "--runs", str(tmp_path)]) == 0
    capsys.readouterr()
    _, trained = ask(capsys, tmp_path, "train", many, "--objective", "clip:epochs=2")
    evaluation, _ = ask(
        capsys, tmp_path, "evaluate", trained, test, "--probe", "retrieval", "z_score"
    )
    assert {
        "image_to_text_recall@1",
        "text_to_image_recall@10",
        "attack_success",
        "targeted_success@4",
        "z_std",
    } <= set(evaluation["metrics"])
    assert evaluation["metrics"]["text_to_image_recall@1"]["n"] == 5000
    scan, _ = ask(capsys, tmp_path, "scan", trained, "--detector", "duplicates", "clip_score")
    # three victims, four copies each: the pixels of one image under diverging captions
    assert scan["metrics"]["duplicates.recall_at_0.1"]["value"] >= 12 / 52


@needs_data
def test_aerial_captions_by_zero_shot_over_their_classes(tmp_path, capsys):
    train = f"shards:path={DATA}/ucm_captions/train-{{00000..00001}}.tar,size=32,captions=first"
    test = f"shards:path={DATA}/ucm_captions/val-00000.tar,size=32"
    words = ["--poison", "backdoor:count=40", "--trigger", "patch:size=6", "--target", "river"]
    _, poison = ask(capsys, tmp_path, "poison", train, *words)
    _, trained = ask(capsys, tmp_path, "train", poison, "--objective", "clip:epochs=3,batch=64")
    evaluation, _ = ask(capsys, tmp_path, "evaluate", trained, test)
    assert evaluation["metrics"]["clean_accuracy"]["n"] == 210
    assert evaluation["metrics"]["clean_accuracy"]["low"] > 1 / 21, "it learns something"
