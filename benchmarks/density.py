"""Exact neighbours and the scores on them against the published form, and against faiss's flat index; one thread.

    python benchmarks/density.py [--repeats 3] [--n 10000]

published k-distance: distances by differences (cdist without products), each row sorted in full. published SLOF and
DAO: the same, and a gather of whole rows of the (N, N) sorted matrix for k neighbours of every record, of which one
column is used. Both follow HanxunH/Detect-CLIP-Backdoor-Samples with all records in one batch, images alone.
Embeddings: `--d` wide unit rows in clusters (a cone, as CLIP's are); k = 16. Timings are seconds of this process's
own processor time, medians of `--repeats` interleaved rounds (the published forms run once in the first `--slow`
rounds), so that other work on the machine disturbs them little; ratios are of one run. Against faiss: the records among
themselves, other records on as many references, and on `--pool` references that are held (as in a scan).
Exactness is against float64 differences over 500 of the records. The peak is of a fresh process at N = 20,000, torch included.
faiss is timed where it is installed (`pip install -e ".[bench]"`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bezoar import registry
from bezoar.data.blocks import blocks
from bezoar.encoders.encoder import EmbeddedRecords
from bezoar.evaluation.neighbors import Index, nearest_neighbors

K = 16


class Given:
    """Stands for an encoder: the records are vectors already."""

    device, text = torch.device("cpu"), None

    def embed(self, source: Tensor) -> EmbeddedRecords:
        return EmbeddedRecords(tuple(map(str, range(len(source)))), source, None)


def vectors(n: int, d: int, seed: int = 0) -> Tensor:
    """Unit rows (n, d) around 100 centres in a cone; another seed: other rows around the same centres."""
    g = torch.Generator().manual_seed(0)
    centres = 1 + torch.randn(100, d, generator=g)
    g = g if seed == 0 else torch.Generator().manual_seed(seed)
    noise = torch.randn(n, d, generator=g) * torch.linspace(2, 0.2, d)
    return F.normalize(centres[torch.randint(100, (n,), generator=g)] + noise, dim=1)


def plain_distances(x: Tensor) -> Tensor:
    n = len(x)
    d = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return d[~torch.eye(n, dtype=torch.bool)].view(n, -1)


def plain_k_distance(x: Tensor) -> Tensor:
    return plain_distances(x).sort(dim=1).values[:, K]


def plain_slof_and_dao(x: Tensor) -> tuple[Tensor, Tensor]:
    a, order = plain_distances(x).sort(dim=1)
    whole = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1).values
    lids = -K / (whole[:, :K] / whole[:, K : K + 1] + 1e-4).log().sum(1)
    reach = torch.stack([whole.index_select(0, row) for row in order[:, :K]])[:, :, K]
    lid = torch.stack([lids.index_select(0, row) for row in order[:, :K]])
    ratio = a[:, K : K + 1] / reach
    return ratio.mean(1), (lid * ratio.log()).mean(1)


def ours(names: tuple[str, ...], x: Tensor) -> list[Tensor]:
    """All of them share one search, as in a scan; `x + 0` is new to the cache."""
    fresh = x + 0
    return [
        registry.make("detector", f"{name}:k={K},pool={len(x)}")(Given(), fresh).values
        for name in names
    ]


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_bytes() -> int:
    """Of this process. Not ru_maxrss, which a process inherits from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def exact(x: Tensor, rows: Tensor) -> dict[str, float]:
    """Share of rows whose k nearest are those by float64 differences, in order; largest difference of a distance."""
    found = nearest_neighbors(x, x, K, exclude_self=True)
    distance = torch.cat(
        [(x[i].double() - x.double()).square().sum(1).sqrt().float()[None] for i in rows]
    )
    distance[torch.arange(len(rows)), rows] = torch.inf
    value, index = distance.sort(dim=1, stable=True)
    same = (index[:, :K] == found.index[rows]).all(1).float().mean()
    return {
        "rows": len(rows),
        "equal": float(same),
        "largest": float((value[:, :K] - found.distance[rows]).abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=10_000, help="records, k-distance and faiss")
    parser.add_argument(
        "--fewer",
        type=int,
        default=4_000,
        help="records, SLOF and DAO; the published form holds k N^2 floats",
    )
    parser.add_argument(
        "--pool",
        type=int,
        default=65_536,
        help="references that are held, 4,096 queries; faiss alone",
    )
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--slow", type=int, default=1, help="rounds that the published forms take part in"
    )
    parser.add_argument("--peak", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        x = vectors(given.peak, given.d)
        taken = seconds(lambda: ours(("k_distance", "slof", "dao", "lid"), x))
        print(json.dumps({"seconds": taken, "peak_bytes": peak_bytes()}))
        return
    x, few = vectors(given.n, given.d), vectors(given.fewer, given.d)
    calls: dict[str, Callable[[], object]] = {
        "k_distance": lambda: ours(("k_distance",), x),
        "slof_and_dao": lambda: ours(("slof", "dao"), few),
        "nearest": lambda: nearest_neighbors(x, x, K, exclude_self=True),
    }
    slow = {
        "k_distance": lambda: plain_k_distance(x),
        "slof_and_dao": lambda: plain_slof_and_dao(few),
    }
    try:
        import faiss

        faiss.omp_set_num_threads(1)

        def flat(queries: Tensor, k: int) -> None:
            index = faiss.IndexFlatL2(given.d)
            index.add(x.numpy())
            index.search(queries.numpy(), k)

        others, asked, pool = (
            vectors(n, given.d, s) for s, n in enumerate((given.n, 4096, given.pool), 1)
        )
        held, held_flat = Index(pool, K), faiss.IndexFlatL2(given.d)
        held_flat.add(pool.numpy())
        calls |= {
            "faiss": lambda: flat(x, K + 1),
            "distinct": lambda: nearest_neighbors(others, x, K),
            "faiss distinct": lambda: flat(others, K),
            "held": lambda: [held.search(asked[b]) for b in blocks(len(asked), held.step)],
            "faiss held": lambda: held_flat.search(asked.numpy(), K),
        }
    except ModuleNotFoundError:
        print("faiss is not installed; it is left out", file=sys.stderr)
    nearest_neighbors(few, few, K)
    times: dict[str, list[float]] = {
        name: [] for name in [*calls, *(f"published {s}" for s in slow)]
    }
    for turn in range(given.repeats):
        for name, call in calls.items():
            times[name].append(seconds(call))
        for name, call in slow.items() if turn < given.slow else ():
            times[f"published {name}"].append(seconds(call))
    median = {name: statistics.median(t) for name, t in times.items()}
    result: dict[str, object] = {
        "d": given.d,
        "k": K,
        "threads": 1,
        "repeats": given.repeats,
        "slow": given.slow,
    }
    for name, n, goal in (("k_distance", given.n, 30), ("slof_and_dao", given.fewer, 50)):
        ratio = median[f"published {name}"] / median[name]
        result[name] = {
            "n": n,
            "ours_s": round(median[name], 3),
            "published_s": round(median[f"published {name}"], 2),
            "ratio": round(ratio, 1),
            "goal": goal,
        }
    sides = {
        "faiss": ("nearest", given.n),
        "faiss distinct": ("distinct", given.n),
        "faiss held": ("held", given.pool),
    }
    for name, (own, n) in sides.items() if "faiss" in median else ():
        ratios = [theirs / mine for theirs, mine in zip(times[name], times[own], strict=True)]
        result[name] = {
            "references": n,
            "ours_s": round(median[own], 3),
            "faiss_s": round(median[name], 3),
            "ratio": round(statistics.median(ratios), 2),
            "goal": 1,
        }
    result["exact"] = exact(x, torch.arange(0, given.n, max(1, given.n // 500))[:500])
    fresh = [sys.executable, __file__, "--peak", "20000", "--d", str(given.d)]
    peak = json.loads(subprocess.run(fresh, check=True, capture_output=True, text=True).stdout)
    result["four_detectors_at_20000"] = {
        "ours_s": round(peak["seconds"], 2),
        "peak_GB": round(peak["peak_bytes"] / 1e9, 2),
        "goal_GB": 1,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
