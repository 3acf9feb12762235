"""A scan of N ready embeddings against a fixed reference pool, bounded in memory. Prints JSON.

    python benchmarks/scan.py [--records 50000] [--width 512] [--pool 65536] [--threads 2]

The question is what a scan of 1,000,000 records costs after embedding: `--records 1000000`. The vectors (unit rows drawn
at random, float16, in files of 100,000 as clip-retrieval writes them, with metadata) are made first and not timed. The scan
itself runs in a process of its own. `resident_mib` is the most memory that it held; `own_mib` the most of it that is not
pages of mapped files, which the system takes back whenever it wants them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch

FILE = 100_000  # rows of a file


def make(folder: Path, records: int, width: int) -> None:
    """clip-retrieval's folder of random unit vectors."""
    rng = np.random.default_rng(0)
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir()
    for number, start in enumerate(range(0, records, FILE)):
        n = min(FILE, records - start)
        for name in ("img_emb", "text_emb"):
            z = rng.standard_normal((n, width), dtype=np.float32)
            np.save(
                folder / name / f"{name}_{number}.npy",
                (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float16),
            )
        keys = [f"{i:09d}" for i in range(start, start + n)]
        facts = {
            "key": keys,
            "caption": [f"a caption of the usual length, number {k}" for k in keys],
        }
        parquet.write_table(pa.table(facts), folder / "metadata" / f"metadata_{number}.parquet")


def scan(folder: Path, detectors: list[str], threads: int) -> dict[str, float]:
    """Scan it, in this process: seconds in all and of each part, and memory."""
    from bezoar import Scan, Settings
    from bezoar.detection.corpus import corpus
    from bezoar.runs.execute import execute
    from bezoar.verbs import scan as verb

    torch.set_num_threads(threads)
    own, done, seconds = [0], threading.Event(), {}

    def watch() -> None:
        while not done.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            own[0] = max(
                own[0], *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            )

    def timed(module: object, name: str, part: str) -> None:
        original = getattr(module, name)

        def call(*given: object, **more: object) -> object:
            start = time.perf_counter()
            try:
                return original(*given, **more)
            finally:
                seconds[part] = round(time.perf_counter() - start, 2)

        setattr(module, name, call)

    timed(corpus, "embed_corpus", "vectors_s")
    timed(verb, "run_detectors", "detectors_s")
    watcher = threading.Thread(target=watch)
    watcher.start()
    start, processor = time.perf_counter(), time.process_time()
    settings = Settings(folder / "runs", quiet=True, device="cpu")
    run = execute(Scan(f"embeddings:path={folder / 'data'}", detector=tuple(detectors)), settings)
    total = time.perf_counter() - start
    done.set()
    watcher.join()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = run.manifest["notes"]["records"]
    return {
        "records": records,
        "total_s": round(total, 2),
        "processor_s": round(time.process_time() - processor, 2),
        **seconds,
        "records_per_s": round(records / total),
        "resident_mib": round(peak / 1024),
        "own_mib": round(own[0] / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--pool", type=int, default=65_536)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="where the data and the run go; a temporary one if not given",
    )
    parser.add_argument("--inside", type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    detectors = [f"k_distance:k=16,pool={given.pool}"]
    if given.inside:
        print(json.dumps(scan(given.inside, detectors, given.threads)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as text:
        folder = Path(text)
        (folder / "data").mkdir()
        make(folder / "data", given.records, given.width)
        command = [
            sys.executable,
            __file__,
            "--inside",
            str(folder),
            "--pool",
            str(given.pool),
            "--threads",
            str(given.threads),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
        found = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    told = {
        "width": given.width,
        "pool": min(given.pool, given.records),
        "threads": given.threads,
        "detectors": detectors,
    }
    print(json.dumps({**told, **json.loads(found.splitlines()[-1])}, indent=1))


if __name__ == "__main__":
    main()
