"""Side channels and the usual filters: planted leaks are found, absent ones are not, hostile
headers cost nothing.
"""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bezoar import registry
from bezoar.data.decoding import Record
from bezoar.data.pairs import Pairs
from bezoar.data.sources.shards import ShardSource
from bezoar.detection.reliability import side_channels, stored_images, usual_filters
from bezoar.encoders.encoder import EmbeddedRecords
from bezoar.errors import UserError
from bezoar.evaluation import stats
from bezoar.runs import inputs

N, POISONS = 240, 60


def picture(seed: int, side: tuple[int, int] = (40, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(
        0, 256, (side[1] // 4, side[0] // 4, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels).resize(side)


def encoded(image: Image.Image, name: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Two tars in which poisons were written by another program, later, from larger images, and
    stand together.
    """
    folder, truth = tmp_path_factory.mktemp("shards"), np.zeros(N, bool)
    truth[100 : 100 + POISONS] = True
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard * N // 2, (shard + 1) * N // 2):
                bad = truth[i]
                quality = (
                    {"quality": 75} if bad else {"quality": 92, "subsampling": 0, "optimize": True}
                )
                content = encoded(picture(i, (64, 64) if bad else (40 + i % 3, 32)), **quality)
                caption = (
                    f"a photo of a thing number {i}"
                    if bad
                    else f"{i} harbours {'very ' * (i % 5)}far away from number {i}"
                )
                name = f"poisoned_{i:04d}" if bad else f"{i:06d}"
                for ending, data in (
                    (".jpg", content),
                    (".txt", caption.encode()),
                    (".json", b"{}"),
                ):
                    head = tarfile.TarInfo(name + ending)
                    head.size, head.mtime = len(data), 1_700_000_000 if bad else 1_600_000_000
                    tar.addfile(head, io.BytesIO(data))
    return folder, truth


def test_planted_leaks_are_found_and_named_worst_first(shards: tuple[Path, np.ndarray]) -> None:
    folder, truth = shards
    method = registry.make("data", f"shards:path={folder},size=32")
    pairs = inputs.read_pairs(method)
    channels = side_channels.collect_channels(
        method, inputs.open_dataset(method), pairs.ids, pairs.captions
    )
    measured = side_channels.measure_channels(channels, truth)
    values = {x.name: x.auroc.value for x in measured}
    assert list(values.values()) == sorted(values.values(), reverse=True)
    for name in ("jpeg_tables", "layout", "shape", "file_time", "key_pattern", "aspect"):
        assert values[name] == 1.0, name
        assert next(x for x in measured if x.name == name).separates
    assert values["caption_template"] > 0.95 and values["row_block"] > 0.85
    assert values["file_owner"] == values["extension"] == values["format"] == 0.5
    assert not {x.name for x in measured if x.separates} & {"file_owner", "extension", "format"}
    assert channels.sizes is not None and channels.sizes[100].tolist() == [64, 64]


def test_noise_is_no_leak_and_the_split_is_unbiased() -> None:
    rng, values, flags = np.random.default_rng(0), [], 0
    for run in range(40):
        truth = np.zeros(400, bool)
        truth[rng.permutation(400)[:40]] = True
        channels = side_channels.Channels([f"{run}/{i}" for i in range(400)])
        channels.numbers["file_size"] = rng.normal(size=400)
        channels.kinds["shape"] = rng.integers(0, 6, 400)
        measured = side_channels.measure_channels(channels, truth)
        values += [x.auroc.value for x in measured]
        flags += sum(x.separates for x in measured)
    spread = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 0.5) < 4 * spread
    assert flags <= 7  # 80 tests at a joint level of 5 %, one side of them
    assert (
        np.mean(np.maximum(values, 1 - np.array(values))) > 0.5 + 4 * spread
    )  # what looking first would claim


def test_a_leak_of_kinds_is_the_rate_of_the_other_half() -> None:
    truth, choosing = np.array([1, 0, 1, 0, 1, 1, 0, 0] * 20, bool), np.arange(160) % 2 == 0
    kind = np.repeat([5, 9], 80)
    score = side_channels.rate_kinds(kind, truth, choosing)
    for k in (5, 9):
        mine = truth[choosing & (kind == k)]
        assert np.allclose(
            score[kind == k], (mine.sum() + truth[choosing].mean()) / (len(mine) + 1)
        )
    rare = side_channels.rate_kinds(np.arange(160), truth, choosing)
    assert len(np.unique(rare)) == 1  # kinds of one record each say nothing
    values = np.random.default_rng(0).normal(size=160) - truth
    assert (
        stats.auroc(side_channels.orient(values, truth, choosing)[choosing], truth[choosing]) >= 0.5
    )


def test_too_few_poisons_are_not_measured() -> None:
    channels = side_channels.record_channels([str(i) for i in range(50)], ())
    assert side_channels.measure_channels(channels, np.arange(50) < 2) == []
    assert channels.absent["caption_length"] == "no captions"


@pytest.mark.parametrize(
    "options", [{"quality": 30}, {"quality": 95, "subsampling": 0}, {"progressive": True}]
)
def test_jpeg_headers_against_pillow(options: dict) -> None:
    image = picture(3, (57, 23))
    content = encoded(image, **options)
    header = stored_images.parse_image_header(content)
    assert (header.format, header.shape) == ("JPEG", image.size)
    smaller = stored_images.parse_image_header(encoded(picture(9, (8, 8)), **options))
    assert header.tables and header.tables == smaller.tables
    coarser = stored_images.parse_image_header(encoded(image, quality=51))
    assert header.tables != coarser.tables and header.layout


def test_other_headers_against_pillow() -> None:
    for name in ("PNG", "WEBP", "BMP", "PPM"):
        header = stored_images.parse_image_header(encoded(picture(1, (30, 20)), name))
        assert (header.format, header.shape, header.tables) == (name, (30, 20), "")


def test_hostile_headers_are_bounded() -> None:
    fill = b"\xff\xd8" + b"\xff\xfe\x00\x02" * 10_000
    layout = stored_images.parse_image_header(fill).layout
    assert len(layout.split()) <= stored_images.MAX_SEGMENTS
    lying = b"\xff\xd8\xff\xdb\xff\xff" + b"\x00" * 10
    assert stored_images.parse_image_header(lying).shape == (0, 0)
    chunks = b"\x89PNG\r\n\x1a\n" + (struct.pack(">I", 0) + b"tEXt" + b"\0" * 4) * 10_000
    layout = stored_images.parse_image_header(chunks).layout
    assert len(layout.split()) <= stored_images.MAX_SEGMENTS + 1
    for junk in (
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF1234WEBPVP8 ",
        b"BM" + b"\xff" * 60,
        b"\0" * 99,
    ):
        assert isinstance(stored_images.parse_image_header(junk), stored_images.ImageHeader)
    for seed in range(200):
        noise = np.random.default_rng(seed).bytes(120)
        stored_images.parse_image_header(b"\xff\xd8\xff" + noise)
        stored_images.parse_image_header(b"\x89PNG\r\n\x1a\n" + noise)
        stored_images.parse_tar_header(noise)
    assert stored_images.parse_tar_header(b"\0" * 512) == (0.0, "", "")


def test_folders_and_data_in_memory(tmp_path: Path) -> None:
    for i in range(40):
        path = tmp_path / ("cat" if i % 2 else "dog") / f"{i:03d}.{'png' if i % 4 < 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        picture(i).save(path)
    method = registry.make("data", f"folder:path={tmp_path},size=32")
    pairs = inputs.read_pairs(method)
    channels = side_channels.collect_channels(
        method, inputs.open_dataset(method), pairs.ids, pairs.captions
    )
    truth = np.array([k.endswith("png") for k in pairs.ids])
    values = {x.name: x.auroc.value for x in side_channels.measure_channels(channels, truth)}
    assert values["extension"] == values["format"] == 1.0
    assert channels.absent["shard"] == "not in shards"
    scenes = registry.make("data", "scenes:count=50")
    some = inputs.read_pairs(scenes)
    absent = side_channels.collect_channels(
        scenes, inputs.open_dataset(scenes), some.ids, some.captions
    ).absent
    assert absent["file_size"] == "these data are not read from files"


def test_a_vanished_shard_is_a_user_error(shards: tuple[Path, np.ndarray]) -> None:
    source = ShardSource((shards[0] / "00000.tar", shards[0] / "gone.tar"), 32)
    with pytest.raises(UserError, match=r"gone\.tar"):
        side_channels.file_channels(source.records())


def test_a_shard_that_vanishes_between_two_looks_is_a_user_error(
    shards: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    files = [str(shards[0] / "00000.tar"), str(tmp_path / "gone.tar")]
    records = [
        Record(
            image=b"\x89PNG",
            ids=(str(i),),
            captions=("x",),
            file=file,
            member="m",
            shard=i,
            offset=512,
            length=4,
        )
        for i, file in enumerate(files)
    ]
    with pytest.raises(UserError, match=r"gone\.tar"):
        side_channels.file_channels(records)


def corpus() -> Pairs:
    captions = [
        "a dog on the grass",
        "A dog, on the GRASS!",
        "eine Katze auf dem warmen Ofen im Winter",
        "cat",
        "",
        "кот на печи зимой днём",
    ]
    images = torch.stack(
        [
            torch.from_numpy(np.array(picture(i, (32, 32)))).permute(2, 0, 1)
            for i in (0, 1, 2, 3, 0, 4)
        ]
    )
    return Pairs(images, tuple(captions), ids=tuple("abcdef"))


def test_filters_against_what_they_say() -> None:
    pairs = corpus()
    z = torch.nn.functional.normalize(torch.eye(6, 8), dim=1)
    t = torch.nn.functional.normalize(torch.eye(6, 8) * torch.arange(1.0, 7)[:, None] + 1, dim=1)
    sides = np.array(
        [[300, 300], [100, 300], [900, 250], [300, 300], [300, 300], [300, 299]], float
    )
    filters = {
        f.name: f
        for f in usual_filters.apply_filters(pairs, EmbeddedRecords(pairs.ids, z, t), sides)
    }

    def passes(name: str) -> list[bool]:
        assert filters[name].passes is not None
        return filters[name].passes.tolist()

    assert passes("caption_duplicates") == [True, False, True, True, True, True]
    assert passes("image_duplicates") == [True, True, True, True, False, True]
    assert passes("caption_length") == [True, True, True, False, False, True]
    assert passes("language") == [True, True, False, True, False, False]
    assert passes("resolution") == [True, False, True, True, True, True]
    assert passes("aspect") == [True, False, False, True, True, True]
    cosine = (z * t).sum(1).numpy()
    for name, share in usual_filters.COSINE_SHARES.items():
        assert passes(name) == (cosine >= np.quantile(cosine, 1 - share)).tolist()
    assert (
        passes("datacomp_basic")
        == np.logical_and.reduce(
            [filters[n].passes for n in ("language", "caption_length", "resolution", "aspect")]
        ).tolist()
    )
    truth = np.array([True, True, False, False, False, False])
    measured = usual_filters.measure_filters(list(filters.values()), truth)
    assert measured["filter.caption_duplicates.poisons_pass"].value == 0.5
    assert (
        measured["filter.caption_length.clean_kept"].value == 0.5
        and measured["filter.caption_length.clean_kept"].n == 4
    )
    assert usual_filters.measure_filters(list(filters.values()), np.zeros(6, bool)) == {}


def test_filters_say_what_they_cannot_look_at() -> None:
    pairs = corpus()
    bare = Pairs(pairs.images, (), ids=pairs.ids)
    filters = usual_filters.apply_filters(bare)
    assert {f.name for f in filters if f.passes is None} >= {
        "clip_score_30",
        "caption_length",
        "resolution",
        "datacomp_basic",
    }
    flat = Pairs(
        torch.full((3, 3, 16, 16), 90, dtype=torch.uint8), ("x", "y", "z"), ids=("a", "b", "c")
    )
    assert next(
        f for f in usual_filters.apply_filters(flat) if f.name == "image_duplicates"
    ).passes.all()
    with pytest.raises(UserError, match="in their order"):
        usual_filters.apply_filters(
            pairs, EmbeddedRecords(pairs.ids[::-1], torch.eye(6), torch.eye(6))
        )
