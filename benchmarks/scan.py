"""A scan of N ready embeddings against a fixed sample of references, bounded in memory. Prints
JSON.

    python benchmarks/scan.py [--records 50000] [--width 512] [--pool 65536] [--threads 2]

The question is what a scan of 1,000,000 records costs after embedding: `--records 1000000`. The
vectors (unit rows drawn at random, float16, in files of 100,000 as clip-retrieval writes them, with
metadata) are made first and not timed. The scan itself runs in a process of its own. `resident_mib`
is the most memory that it held; `own_mib` the most of it that is not pages of mapped files, which
the system takes back whenever it wants them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from support import make_parser

from bezoar import Scan, Settings
from bezoar.runs.execute import execute

FILE_ROWS = 100_000


def write_embeddings(folder: Path, records: int, width: int) -> None:
    """clip-retrieval's folder of random unit vectors."""
    rng = np.random.default_rng(0)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir()
    for number, start in enumerate(range(0, records, FILE_ROWS)):
        n = min(FILE_ROWS, records - start)
        for name in ("img_emb", "text_emb"):
            z = rng.standard_normal((n, width), dtype=np.float32)
            z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float16)
            np.save(folder / name / f"{name}_{number}.npy", z)
        keys = [f"{i:09d}" for i in range(start, start + n)]
        captions = [f"a caption of the usual length, number {key}" for key in keys]
        table = pa.table({"key": keys, "caption": captions})
        parquet.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")


@contextmanager
def watch_memory() -> Iterator[list[int]]:
    """The largest anonymous memory of this process, in KiB, as the only element of a list."""
    largest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    largest[0] = max(largest[0], int(line.split()[1]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield largest
    finally:
        done.set()
        watcher.join()


def scan(folder: Path, detector: str, threads: int) -> dict[str, object]:
    """Scan the vectors in this process: seconds of each part, and memory."""
    torch.set_num_threads(threads)
    settings = Settings(folder / "runs", quiet=True, device="cpu")
    with watch_memory() as largest:
        start, processor = time.perf_counter(), time.process_time()
        run = execute(Scan(f"embeddings:path={folder / 'data'}", detector=(detector,)), settings)
        total = time.perf_counter() - start
        worked = time.process_time() - processor
    notes = run.manifest["notes"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "records": notes["records"],
        "total_s": round(total, 2),
        "processor_s": round(worked, 2),
        "detectors_s": notes["seconds"],
        "records_per_s": round(notes["records"] / total),
        "resident_mib": round(peak / 1024),
        "own_mib": round(largest[0] / 1024),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pool", type=int, default=65_536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where data and run go; without it, removed")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    detector = f"k_distance:k=16,pool={options.pool}"
    if options.inside:
        print(json.dumps(scan(options.inside, detector, options.threads)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "data").mkdir()
        write_embeddings(folder / "data", options.records, options.width)
        fields = {"inside": folder, "pool": options.pool, "threads": options.threads}
        arguments = [text for key, value in fields.items() for text in (f"--{key}", str(value))]
        output = subprocess.run(
            [sys.executable, __file__, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    setting = {"width": options.width, "threads": options.threads, "detector": detector}
    print(json.dumps({**setting, **json.loads(output.splitlines()[-1])}, indent=1))


if __name__ == "__main__":
    main()
