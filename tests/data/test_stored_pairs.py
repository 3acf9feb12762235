"""Records drawn from shards on disk: the same pixels, captions and draws as in memory, poisoned or
not; hostile tars.
"""

import json
import tarfile
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_files import add_members, random_picture

from bezoar import machine, registry
from bezoar.attacks.plan import Goal, Plan
from bezoar.cli import main
from bezoar.data import stored_pairs, strings
from bezoar.data.files import paths
from bezoar.data.pairs import Pairs, load_pairs
from bezoar.data.shards import write_shards
from bezoar.data.sources.shards import ShardSource
from bezoar.data.stored_pairs import StoredPairs
from bezoar.data.strings import Strings
from bezoar.encoders.encoder import tokenize_captions
from bezoar.errors import UserError
from bezoar.runs import inputs
from bezoar.training import loop, prefetch
from bezoar.training.prefetch import Prefetcher, training_data

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
CPU = torch.device("cpu")
EVERYTHING = 1 << 62


def toy(n: int = 96, size: int = 32, split: str = "train") -> Pairs:
    """Random pictures in three classes; one in six has no label."""
    pixels = np.random.default_rng(len(split)).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    captions = tuple(
        f"thing {i % 7} of {i % 5}, é, {('cat', 'dog', 'owl')[i % 4 % 3]}" for i in range(n)
    )
    labels = torch.arange(n) % 3 - (torch.arange(n) % 6 == 0).long()
    ids = tuple(f"{split}-{i}" for i in range(n))
    return Pairs(
        torch.from_numpy(pixels).permute(0, 3, 1, 2), captions, labels, ids, ("cat", "dog", "owl")
    )


@pytest.fixture
def tars(tmp_path: Path) -> ShardSource:
    """`toy` as four shards."""
    return ShardSource(tuple(write_shards(tmp_path / "tars", toy(), per_shard=30)), 32)


def by_index(source: ShardSource) -> StoredPairs:
    stored = source.load_records(0)
    assert isinstance(stored, StoredPairs)
    return stored


def same(one: Pairs, two: Pairs) -> None:
    """Records equal bit for bit, in one order."""
    assert one.ids == two.ids and one.captions == two.captions and one.classes == two.classes
    assert torch.equal(one.images, two.images) and one.images.stride() == two.images.stride()
    assert (one.labels is None) == (two.labels is None)
    assert one.labels is None or (two.labels is not None and torch.equal(one.labels, two.labels))


def plan_of(
    poison: str,
    source: Pairs | StoredPairs,
    target: str,
    trigger: str | None,
    victims: Pairs | None = None,
) -> Plan:
    plan = registry.make("poison", poison)(source, Goal(target, trigger), 3, victims)
    return replace(
        plan,
        stamps=tuple(
            registry.make("trigger", g.trigger) if g.trigger else None for g in plan.goals
        ),
    )


@needs_data
@pytest.mark.parametrize("fields", [{}, {"captions": "all", "limit": 333, "size": 48}])
def test_flickr8k_by_index_is_what_load_gives(fields: dict) -> None:
    source = ShardSource((DATA / "flickr8k" / "val-00000.tar",), **{"size": 64, **fields})
    plain, stored = load_pairs(source), by_index(source)
    same(stored.take(range(len(stored))), plain)
    same(source.load_records(EVERYTHING), plain)  # type: ignore[arg-type]
    assert stored.report.read == len(plain) and isinstance(
        source.load_records(plain.images.nbytes), Pairs
    )
    assert isinstance(source.load_records(plain.images.nbytes - 1), StoredPairs)


@needs_data
def test_flickr8k_poisoned_as_it_is_drawn_is_flickr8k_poisoned_in_memory() -> None:
    source = ShardSource((DATA / "flickr8k" / "train-00000.tar",), 64)
    victims = load_pairs(ShardSource((DATA / "flickr8k" / "val-00000.tar",), 64, limit=40))
    plain, stored = load_pairs(source), by_index(source)
    plan = plan_of("backdoor:count=80", plain, "dog", "patch:size=6,place=random")
    for poison, target, trigger, pool in (
        ("backdoor:count=50,keep=true", "beach", "blend", None),
        ("clean_label:count=9", "snow", "warp", None),
        ("targeted:captions=3,victims=4", "boy", None, victims),
        ("targeted:captions=3,victims=4", "water", None, None),
    ):
        free = plain.take(np.flatnonzero(~plan.mask(plain.ids)))
        plan = plan.merge(plan_of(poison, free, target, trigger, pool))
    whole, drawn = plan.apply(plain, victims), plan.over(stored, victims)
    assert len(whole) == len(plain) + 50 + 12 + 8
    same(drawn.take(range(len(drawn))), whole)
    assert np.array_equal(plan.mask(drawn.ids), plan.mask(whole.ids)) and plan.mask(
        drawn.ids
    ).sum() == len(plan)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:1024].view(
        -1, 64
    )
    with training_data(drawn, CPU, lambda epoch: order, 1) as data:
        assert all(torch.equal(data.images[rows], whole.images[rows]) for rows in order)
        assert data.late == 0 and data.drawn == len(order)


@pytest.mark.parametrize("trigger", ["patch:place=random", "blend", "sinusoid", "warp"])
def test_labels_and_triggers_of_any_kind(tars: ShardSource, trigger: str) -> None:
    plain, stored = load_pairs(tars), by_index(tars)
    for poison in ("backdoor:count=31", "backdoor:count=31,keep=true"):
        plan = plan_of(poison, plain, "thing 2", trigger)
        assert plan == plan_of(poison, stored, "thing 2", trigger), (
            "the index is as good a source of poisons"
        )
        same(
            plan.over(stored).take(range(len(plain) + 31 * ("keep" in poison))),
            plan.apply(plain),
        )
    victims = toy(9, split="test")
    plan = plan_of("targeted:captions=2,victims=5", plain, "", None, victims)
    same(plan.over(stored, victims).take(range(len(plain) + 10)), plan.apply(plain, victims))
    same(
        plan.over(stored, victims).select([3, 97, 3]).take([2, 1]),
        plan.apply(plain, victims).take([3, 97]),
    )
    assert Plan().over(stored) is stored
    with pytest.raises(UserError, match="one size"):
        plan.over(stored, replace(victims, images=victims.images[..., :16, :16]))


def test_two_epochs_draw_every_record_once_each_and_ahead(tars: ShardSource) -> None:
    stored, epochs = by_index(tars), 2
    drawn = torch.zeros(epochs, len(stored), dtype=torch.long)
    for rank in range(2):
        with training_data(
            stored,
            CPU,
            lambda e, rank=rank: loop.epoch_batches(7, e, 96, 16)[:, rank * 8 :][:, :8],
            epochs,
        ) as data:
            for epoch in range(epochs):
                for rows in loop.epoch_batches(7, epoch, 96, 16):
                    mine = rows[rank * 8 :][:8]
                    assert torch.equal(data.images[mine], toy().images[mine])
                    drawn[epoch, mine] += 1
            assert (data.drawn, data.late, len(data)) == (12, 0, 96)
    assert (drawn == 1).all()


def test_a_feed_starts_anywhere_and_makes_what_it_did_not_expect(tars: ShardSource) -> None:
    pixels, stored = toy().images, by_index(tars)
    for records in (stored, load_pairs(tars)):
        data = Prefetcher(records, CPU, lambda e: loop.epoch_batches(7, e, 96, 16), 3)
        for rows in loop.epoch_batches(7, 1, 96, 16)[4:]:
            assert torch.equal(data.images[rows], pixels[rows])
            assert torch.equal(data.images[torch.tensor([5, 5, 0])], pixels[[5, 5, 0]])
        for rows in loop.epoch_batches(7, 2, 96, 16):
            assert torch.equal(data.images[rows], pixels[rows])
        assert (data.late, data.drawn) == (2, 10) and not data.waiting
        lost = Prefetcher(records, CPU, lambda e: loop.epoch_batches(8, e, 96, 16), 3)
        assert torch.equal(lost.images[rows], pixels[rows]) and lost.late == 1


def test_no_more_is_made_ahead_than_fits(
    tars: ShardSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = by_index(tars)
    for most, waiting in ((0, 2), (3 * 4 * 3 * 32 * 32, 3), (EVERYTHING, 16)):
        monkeypatch.setattr(prefetch, "AHEAD_BYTES", most)
        data = Prefetcher(stored, CPU, lambda e: loop.epoch_batches(7, e, 96, 4), 1)
        data.images[loop.epoch_batches(7, 0, 96, 4)[0]]
        assert len(data.waiting) == waiting
        data.pool.shutdown()


def test_rows_are_taken_off_the_device_once_an_epoch(tars: ShardSource) -> None:
    data = Prefetcher(by_index(tars), CPU, lambda e: loop.epoch_batches(7, e, 96, 16), 1)
    rows = loop.epoch_batches(7, 0, 96, 16)
    for part in (rows, rows[:, 8:], rows[:, 8:].clone(), rows[2, 3:].clone()):
        for index in part:
            assert torch.equal(data.to_host(index), index)
    assert data.host_copy is not None and data.host_copy[0] is part
    part += 1
    assert torch.equal(data.to_host(part), part)


def test_training_on_a_feed_cut_off_and_gone_on_with_gives_the_bits_of_memory(
    tars: ShardSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    recipe = registry.make("objective", "clip:epochs=2,batch=16,lr=1e-3")
    network = registry.make("network", "clip_small:width=4,dim=16")

    def cut(step: int, steps: int, value: float) -> None:
        if step == 8:
            raise KeyboardInterrupt

    def fit(
        records: Pairs | StoredPairs,
        checkpoint: Path | None = None,
        report: object = lambda *_: None,
    ) -> tuple:
        torch.manual_seed(0)
        encoder = network(records.size, network.vocabulary(records.captions))
        with training_data(
            records, CPU, lambda e: loop.epoch_batches(3, e, len(records), 16), 2
        ) as data:
            log = loop.fit(
                recipe(encoder),
                recipe,
                data,
                tokenize_captions(encoder, records.captions),
                3,
                checkpoint,
                report,
            )
        assert not isinstance(data, Prefetcher) or data.late == 0
        return (
            torch.cat([v.double().flatten() for v in encoder.state_dict().values()]),
            log.losses,
            log.exposures.tolist(),
        )

    plain, stored = load_pairs(tars), by_index(tars)
    plan = plan_of("backdoor:count=20", plain, "thing 2", "patch")
    weights, losses, exposures = fit(plan.apply(plain))
    with pytest.raises(KeyboardInterrupt):
        fit(plan.over(stored), tmp_path / "c.safetensors", cut)
    for checkpoint in (None, tmp_path / "c.safetensors"):
        again = fit(plan.over(stored), checkpoint)
        assert torch.equal(again[0], weights) and again[1:] == (losses, exposures)
    assert "ThreadPoolExecutor" not in " ".join(t.name for t in threading.enumerate())


def test_tokens_and_strings_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = toy().captions
    network = registry.make("network", "clip_small:width=4,dim=16")
    encoder = network(32, network.vocabulary(captions))
    whole = encoder.tokenize(["long long " + captions[0], *captions[1:]])
    monkeypatch.setattr(strings, "BLOCK", 10)
    column = Strings.from_texts(captions)
    assert torch.equal(tokenize_captions(encoder, captions), encoder.tokenize(captions))
    assert torch.equal(tokenize_captions(encoder, column), encoder.tokenize(captions).int())
    assert torch.equal(
        tokenize_captions(encoder, Strings.from_texts(["long long " + captions[0], *captions[1:]])),
        whole.int(),
    )
    assert tuple(column) == captions and column[-1] == captions[-1] and column[3:5] == captions[3:5]
    assert column.find_rows({captions[4], "nowhere"}).tolist() == [
        i for i, c in enumerate(captions) if c == captions[4]
    ]
    with pytest.raises(IndexError):
        column[96]


def hostile(path: Path) -> Path:
    """Two good records among what must be left out; the last header says that its image is a
    terabyte.
    """
    whole, other = random_picture(), random_picture(1)
    members = {
        "a.png": whole,
        "a.txt": b"a",
        "torn.png": whole[:-40],
        "torn.txt": b"cut",
        "tiny.png": random_picture(side=1),
        "tiny.txt": b"dot",
        "../up.png": whole,
        "../up.txt": b"up",
        "/etc/top.png": whole,
        "/etc/top.txt": b"top",
        "same.png": whole,
        "same.txt": b"same",
        "same.json": json.dumps({"record_id": "b/a"}).encode(),
        "b.png": other,
        "b.txt": b"b",
        "last.png": whole,
        "last.txt": b"its other members may be lost",
    }
    with tarfile.open(path, "w") as tar:
        add_members(tar, members)
        huge = tarfile.TarInfo("huge.png")
        huge.size = 1 << 40
        at = tar.offset
    content = path.read_bytes()
    path.write_bytes(content[:at] + huge.tobuf(tarfile.GNU_FORMAT) + bytes(20 * 512))
    return path


def test_hostile_tars_are_bounded_and_named_as_in_memory(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    source = ShardSource((hostile(tmp_path / "b" / "b.tar"),), 16)
    again = tmp_path / "b" / "a.tar"
    again.write_bytes(source.paths[0].read_bytes())
    source = ShardSource((*source.paths, again), 16)
    plain = load_pairs(source)
    skipped = list(source.report.skipped)
    tracemalloc.start()
    stored = by_index(source)
    assert tracemalloc.get_traced_memory()[1] < paths.FILE_BYTES
    tracemalloc.stop()
    assert stored.report.skipped == skipped and {s.reason.partition(":")[0] for s in skipped} == {
        "not decodable",
        "smaller than 8 pixels a side",
        "unsafe name",
        "too large",
        "broken tar",
        "record cut off where the tar breaks",
    }
    assert plain.ids == ("b/a", "b/a~2", "b/b", "a/a", "b/a~3", "a/b")
    assert stored.report.renamed == source.report.renamed and len(stored.report.renamed) == 2
    same(stored.take(range(len(stored))), plain)
    assert stored.places["length"].max() <= paths.FILE_BYTES
    with pytest.raises(UserError, match="no image-caption record"):
        empty = tmp_path / "empty.tar"
        tarfile.open(empty, "w").close()
        ShardSource((empty,), 16).load_records(0)


def test_a_file_that_changed_is_refused_and_the_record_named(tars: ShardSource) -> None:
    stored = by_index(tars)
    stored.images[[0]]
    tars.paths[2].write_bytes(tars.paths[2].read_bytes()[:-1024])
    with pytest.raises(
        UserError, match=r"00002\.tar: the image of 'train-65', at byte \d+, .*changed"
    ) as error:
        stored.images[[1, 65]]
    assert "\n" not in str(error.value)
    data = Prefetcher(stored, CPU, lambda e: torch.tensor([[0, 1], [64, 65]]), 1)
    assert torch.equal(data.images[torch.tensor([0, 1])], toy().images[:2])
    with pytest.raises(UserError, match="changed"):
        data.images[torch.tensor([64, 65])]
    tars.paths[3].unlink()
    with pytest.raises(UserError, match=r"00003\.tar.*No such file"):
        stored.images[[95]]


def test_rows_are_numbers_of_any_kind_and_never_a_mask(tars: ShardSource) -> None:
    for records in (by_index(tars), toy()):
        for rows in ([3, 1], range(3, 0, -2), np.array([3, 1]), torch.tensor([3, 1])):
            assert records.take(rows).ids == ("train-3", "train-1")
        for mask in (np.arange(96) < 2, torch.arange(96) < 2, [True, False]):
            with pytest.raises(ValueError, match="mask"):
                records.take(mask)


def test_few_tars_are_open_at_once(tars: ShardSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_pairs, "MAX_OPEN", 1)
    stored = by_index(tars)
    rows = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stored.images[rows], toy().images[rows])
    assert stored.reader.open_file.cache_info().currsize == 1


@needs_data
def test_an_index_holds_no_pixels() -> None:
    source = ShardSource((DATA / "flickr8k" / "val-00000.tar",), 128)
    tracemalloc.start()
    stored = by_index(source)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 400 * len(stored) and peak < 0.25 * len(stored) * 3 * 128 * 128


def ask(capsys: pytest.CaptureFixture, runs: Path, *words: str) -> tuple[dict, Path]:
    assert main([*words, "--runs", str(runs), "--json", "full"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    return manifest, next(
        p.parent for p in runs.glob("*/manifest.json") if json.loads(p.read_text()) == manifest
    )


def test_poison_train_scan_and_keep_on_a_stream_are_those_in_memory(
    tars: ShardSource, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results: dict[str, list] = {}
    pool = write_shards(tmp_path / "pool", toy(9, split="test"))[0]
    victims = f"shards:path={pool},size=32,load=stream"
    for where in ("memory", "stream"):
        runs = tmp_path / where
        data = f"shards:path={tars.paths[0].parent}/*.tar,size=32,load={where}"
        words = (
            "--poison",
            "backdoor:count=9,keep=true",
            "--trigger",
            "patch",
            "--target",
            "thing 2",
        )
        _, first = ask(capsys, runs, "poison", data, *words)
        words = (
            "--poison",
            "targeted:captions=2,victims=2",
            "--target",
            "thing 4",
            "--victims",
            victims,
        )
        _, both = ask(capsys, runs, "poison", first.name, *words, "--write", "shards")
        assert main(["verify", both.name, "--runs", str(runs)]) == 0
        capsys.readouterr()
        manifest, trained = ask(
            capsys, runs, "train", both.name, "--objective", "clip:epochs=2,batch=16"
        )
        ahead = "read from files as they were asked for, 12 of 12 batches ahead"
        assert manifest["notes"]["images"] == (ahead if where == "stream" else "in memory")
        assert manifest["notes"]["records"] == 96 + 9 + 4 and (trained / "report.html").exists()
        scan, ranked = ask(
            capsys, runs, "scan", trained.name, "--detector", "clip_score", "--remove", "0.1"
        )
        manifest_kept, again = ask(
            capsys,
            runs,
            "train",
            both.name,
            "--keep",
            ranked.name,
            "--objective",
            "clip:epochs=1,batch=16",
        )
        assert manifest_kept["notes"]["records"] == 98
        poisoned = load_pairs(ShardSource(tuple(sorted((both / "shards").glob("*.tar"))), 32))
        results[where] = [
            poisoned.ids,
            poisoned.images.numpy().tobytes(),
            manifest["metrics"],
            manifest_kept["metrics"],
            scan["metrics"],
            *((p / "encoder.safetensors").read_bytes()[-4096:] for p in (trained, again)),
        ]
    assert results["stream"] == results["memory"]


def test_large_images_in_memory_are_poisoned_and_trained_on_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Held images give the plan, the metrics and the encoder of copied ones, bit for bit."""
    data, test = "scenes:count=400", "scenes:count=60,split=test"
    results = {}
    for where, as_noted in (
        ("copied", "in memory"),
        ("held", "held in memory"),
        ("drawn", "drawn"),
    ):
        inputs._load_records.cache_clear()
        if where != "copied":
            monkeypatch.setattr(inputs, "COPIED", 0)
        if where == "held":  # as of a method that does not draw
            monkeypatch.setattr(stored_pairs, "index_drawn", lambda method: method())
        runs = tmp_path / where
        words = ("--poison", "backdoor:count=9", "--trigger", "patch", "--target", "solid ring")
        _, first = ask(capsys, runs, "poison", data, *words)
        words = ("--poison", "targeted:captions=(1,3),victims=2", "--victims", test)
        poisoned, both = ask(capsys, runs, "poison", first.name, *words)
        recipe = ("--objective", "clip:epochs=2,batch=64", "--network", "clip_small:width=4,dim=16")
        trained, _ = ask(capsys, runs, "train", both.name, *recipe)
        assert trained["notes"]["images"].partition(" as")[0] == as_noted
        if where == "held":
            monkeypatch.undo()
        results[where] = [
            (both / "plan.jsonl").read_bytes(),
            poisoned["metrics"],
            trained["metrics"],
            trained["outputs"]["encoder.safetensors"]["sha256"],
        ]
    assert results["held"] == results["copied"] == results["drawn"]
    inputs._load_records.cache_clear()


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 1 << 20 < machine.free_memory() < 1 << 50


def test_auto_keeps_in_memory_what_fits_there_twice(
    tars: ShardSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 2 * toy().images.nbytes
    for free, kind in ((needed, Pairs), (needed - 1, StoredPairs)):
        monkeypatch.setattr(machine, "free_memory", lambda free=free: free)
        assert isinstance(tars.load_records(), kind)
        assert isinstance(replace(tars, load="memory").load_records(), Pairs)
        assert isinstance(replace(tars, load="stream").load_records(), StoredPairs)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"shard .*cannot be read: No such file"):
        ShardSource((Path("nowhere.tar"),)).load_records()
    with training_data(
        load_pairs(tars), CPU, lambda e: loop.epoch_batches(7, e, 96, 16), 1
    ) as data:
        assert isinstance(data, Pairs)
    monkeypatch.setattr(prefetch, "free_bytes", lambda device: needed)
    with training_data(
        load_pairs(tars), CPU, lambda e: loop.epoch_batches(7, e, 96, 16), 1
    ) as data:
        assert isinstance(data, Prefetcher) and data.describe().startswith("copied from memory")
        for rows in loop.epoch_batches(7, 0, 96, 16):
            assert torch.equal(data.images[rows], toy().images[rows])
        assert data.late == 0
