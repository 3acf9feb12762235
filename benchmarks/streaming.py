"""Training fed from shards on disk against the bare decoding of the same images from memory; one
decoding thread.

    python benchmarks/streaming.py [--shards 'TARS'] [--sizes 64 224] [--images 1000] [--side 256]

decode: `decode_image` over encoded images that are in memory already: no feed can be faster. feed:
the batches of an epoch, drawn from the tars by a Prefetcher with one thread, a poisoning applied on
the way. index: the pass that makes the index: tar headers, captions and a decoding of every image.
Without --shards the tars are made: smooth noise as JPEG of --side pixels, quality 85. Prints JSON:
medians of interleaved passes.
"""

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
from support import make_parser

from bezoar import registry
from bezoar.attacks.plan import Goal
from bezoar.data import decoding, shards
from bezoar.data.files import images
from bezoar.data.pairs import Pairs
from bezoar.data.stored_pairs import StoredPairs
from bezoar.training import loop
from bezoar.training.prefetch import Prefetcher

TRIGGER = "patch:size=16"
PLACE = ["shard", "offset", "length"]


def write_pictures(folder: Path, count: int, side: int) -> str:
    """Pictures that compress as photographs do, as tars. Returns the folder."""
    coarse = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1).mul(255).byte()
    captions = tuple(f"this is picture{i % 10}" for i in range(count))
    pairs = Pairs(pixels, captions, None, tuple(map(str, range(count))))
    shards.write_shards(folder, pairs, 1000, "jpeg:85")
    return str(folder)


def poison(records: StoredPairs) -> StoredPairs:
    """One record in a hundred with a patch on it."""
    word = max(records.captions[0].split(), key=len)
    plan = registry.make("poison", "backdoor:rate=0.01")(records, Goal(word, TRIGGER), 0)
    return replace(plan, stamps=(registry.make("trigger", TRIGGER),)).over(records)


def draw_epoch(records: StoredPairs, batch: int) -> None:
    """Every batch of an epoch, with one thread."""
    order = loop.epoch_batches(0, 0, len(records), batch)
    feed = Prefetcher(records, torch.device("cpu"), lambda epoch: order, 1)
    with ThreadPoolExecutor(1) as pool:
        feed.pool = pool
        for rows in order:
            feed.images[rows]
    assert feed.late == 0


def time_both_clocks(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the wall clock, and of the processor, which other work on the machine hardly
    disturbs.
    """
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(tars: str, size: int, count: int, batch: int, repeats: int) -> dict[str, object]:
    """The figures of one size of images."""
    source = registry.make("data", f'shards:path="{tars}",size={size},limit={count}')()
    records = source.load_records(0)
    assert isinstance(records, StoredPairs)
    poisoned = poison(records)
    encoded = [records.reader.read(*place) for place in records.places[PLACE].tolist()]
    calls: dict[str, Callable[[], object]] = {
        "decode": lambda: [images.decode_image(content, size) for content in encoded],
        "feed": lambda: draw_epoch(poisoned, batch),
        "index": lambda: source.load_records(0),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(time_both_clocks(call))
    n = len(records)
    wall = {k: statistics.median(wall for wall, _ in v) for k, v in seconds.items()}
    processor = {k: statistics.median(cpu for _, cpu in v) for k, v in seconds.items()}
    return {
        "images_a_second": {name: round(n / value) for name, value in wall.items()},
        "cpu_us_an_image": {name: round(1e6 * value / n) for name, value in processor.items()},
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--shards", help="tars, as `shards:path=` takes them")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 224])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    decoding.thread_count = lambda: 1
    result: dict[str, object] = {"images": options.images, "repeats": options.repeats, "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        tars = options.shards or write_pictures(Path(folder), options.images, options.side)
        for size in options.sizes:
            figures = compare(tars, size, options.images, options.batch, options.repeats)
            result[f"{size} px"] = figures
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
