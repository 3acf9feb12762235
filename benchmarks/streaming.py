"""Training fed from shards on disk against the bare decoding of the same images from memory; one decoding thread. Prints JSON.

    python benchmarks/streaming.py [--shards 'TARS'] [--sizes 64 224] [--images 1000] [--side 256]

decode: `reading.decode` over encoded images that are in memory already: what no feed can be faster than. feed: the batches
of training.order, drawn from the tars by a Feed with one thread, a poisoning applied on the way. index: the pass that makes
the index, tar headers, captions and a decoding of every image. Medians of interleaved passes.
Without --shards the tars are made: smooth noise as JPEG of --side pixels, quality 85.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data import decoding, shards
from bezoar.data.files import images
from bezoar.data.files.paths import expand_paths
from bezoar.data.pairs import Pairs
from bezoar.data.sources.shards import ShardSource
from bezoar.data.stored_pairs import StoredPairs
from bezoar.training import loop
from bezoar.training.prefetch import Prefetcher


def made(folder: Path, count: int, side: int) -> str:
    """Pictures that compress as photographs do, as tars."""
    coarse = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).mul(255).byte()
    captions = tuple(f"this is picture{i % 10}" for i in range(count))
    shards.write_shards(
        folder, Pairs(pixels, captions, None, tuple(map(str, range(count)))), 1000, "jpeg:85"
    )
    return str(folder)


def drawn(records: StoredPairs, batch: int) -> None:
    """An epoch, with one thread."""
    feed = Prefetcher(
        records,
        torch.device("cpu"),
        lambda epoch: loop.epoch_batches(0, epoch, len(records), batch),
        1,
    )
    with ThreadPoolExecutor(1) as pool:
        feed.pool = pool
        for rows in loop.epoch_batches(0, 0, len(records), batch):
            feed.images[rows]
    assert feed.late == 0


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of the processor: the second hardly feels what else the machine does."""
    start, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", help="tars, as `shards:path=` takes them")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 224])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    decoding.thread_count = lambda: 1
    result: dict[str, object] = {"images": given.images, "repeats": given.repeats, "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        tars = expand_paths(given.shards or made(Path(folder), given.images, given.side))
        for size in given.sizes:
            source = ShardSource(tars, size, limit=given.images)
            records = source.load_records(0)
            assert isinstance(records, StoredPairs)
            word = max(records.captions[0].split(), key=len)
            plan = registry.make("poison", "backdoor:rate=0.01")(
                records, Goal(word, "patch:size=16"), 0
            )
            poisoned = replace(plan, stamps=(registry.make("trigger", "patch:size=16"),)).over(
                records
            )
            encoded = [
                records.reader.read(*place)
                for place in records.places[["shard", "offset", "length"]].tolist()
            ]
            calls: dict[str, Callable[[], object]] = {
                "decode": lambda e=encoded, s=size: [
                    images.decode_image(content, s) for content in e
                ],
                "feed": lambda p=poisoned: drawn(p, given.batch),
                "index": lambda s=source: s.load_records(0),
            }
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
            for _ in range(given.repeats):
                for name, call in calls.items():
                    times[name].append(seconds(call))
            n = len(records)
            result[f"{size} px"] = {
                "images_a_second": {
                    k: round(n / statistics.median(x for x, _ in t)) for k, t in times.items()
                },
                "cpu_us_an_image": {
                    k: round(1e6 * statistics.median(x for _, x in t) / n) for k, t in times.items()
                },
            }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
