"""Exact neighbours and the scores on them against the published form, and against faiss's flat
index; one thread.

    python benchmarks/density.py [--repeats 3] [--n 10000]

published k-distance: distances by differences (cdist without products), each row sorted in full.
published SLOF and DAO: the same, and a gather of whole rows of the (N, N) sorted matrix for k
neighbours of every record, of which one column is used. Both follow
HanxunH/Detect-CLIP-Backdoor-Samples with all records in one batch, images alone.

Embeddings: `--d` wide unit rows in clusters (a cone, as CLIP's are); k = 16. Timings are seconds of
this process's own processor time, medians of `--repeats` interleaved rounds (the published forms
run once in the first `--slow` rounds); ratios are of one run. Against faiss: the records among
themselves, other records on as many references, and on `--pool` references that are held (as in a
scan). Exactness is against float64 differences over 500 of the records. The peak is of a fresh
process at N = 20,000, torch included. faiss is timed where it is installed (`pip install -e
".[bench]"`). Prints JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from support import make_parser, medians, time_call, time_in_turn
from torch import Tensor

from bezoar import registry
from bezoar.data.blocks import blocks
from bezoar.encoders.encoder import EmbeddedRecords
from bezoar.evaluation.neighbors import Index, nearest_neighbors

try:
    import faiss
except ModuleNotFoundError:
    faiss = None

K = 16
QUERIES = 4096  # on references that are held
Calls = dict[str, Callable[[], object]]


class ReadyVectors:
    """Stands for an encoder: the records are vectors already."""

    device = torch.device("cpu")
    text = None

    def embed(self, source: Tensor) -> EmbeddedRecords:
        return EmbeddedRecords(tuple(map(str, range(len(source)))), source, None)


def clustered_vectors(n: int, d: int, seed: int = 0) -> Tensor:
    """Unit rows (n, d) around 100 centres in a cone; another seed: other rows around the same
    centres.
    """
    generator = torch.Generator().manual_seed(0)
    centres = 1 + torch.randn(100, d, generator=generator)
    if seed:
        generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, d, generator=generator) * torch.linspace(2, 0.2, d)
    return F.normalize(centres[torch.randint(100, (n,), generator=generator)] + noise, dim=1)


def plain_distances(x: Tensor) -> Tensor:
    """(N, N - 1): of every record to all others."""
    n = len(x)
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return distances[~torch.eye(n, dtype=torch.bool)].view(n, -1)


def plain_k_distance(x: Tensor) -> Tensor:
    return plain_distances(x).sort(dim=1).values[:, K]


def plain_slof_and_dao(x: Tensor) -> tuple[Tensor, Tensor]:
    distances, order = plain_distances(x).sort(dim=1)
    full = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(dim=1).values
    lids = -K / (full[:, :K] / full[:, K : K + 1] + 1e-4).log().sum(1)
    reach = torch.stack([full.index_select(0, row) for row in order[:, :K]])[:, :, K]
    neighbour_lids = torch.stack([lids.index_select(0, row) for row in order[:, :K]])
    ratio = distances[:, K : K + 1] / reach
    return ratio.mean(1), (neighbour_lids * ratio.log()).mean(1)


def score(detectors: tuple[str, ...], x: Tensor) -> list[Tensor]:
    """Scores of detectors that share one search, as in a scan. `x + 0` is new to the cache of
    searches.
    """
    fresh = x + 0
    return [
        registry.make("detector", f"{name}:k={K},pool={len(x)}")(ReadyVectors(), fresh).values
        for name in detectors
    ]


def peak_bytes() -> int:
    """Of this process. Not ru_maxrss, which a process inherits from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def check_exactness(x: Tensor, rows: Tensor) -> dict[str, float]:
    """Share of rows whose k nearest are those by float64 differences, in order; largest difference
    of a distance.
    """
    nearest = nearest_neighbors(x, x, K, exclude_self=True)
    distances = torch.stack([(x[i].double() - x.double()).square().sum(1).sqrt() for i in rows])
    distances = distances.float()  # (500, N)
    distances[torch.arange(len(rows)), rows] = torch.inf
    values, indices = distances.sort(dim=1, stable=True)
    equal = (indices[:, :K] == nearest.index[rows]).all(1).float().mean()
    difference = (values[:, :K] - nearest.distance[rows]).abs().max()
    return {"rows": len(rows), "equal": float(equal), "largest": float(difference)}


def search_calls(x: Tensor, pool_size: int) -> Calls:
    """Searches by bezoar and by faiss: among themselves, of other queries, and on references that
    are held.
    """
    faiss.omp_set_num_threads(1)
    n, d = x.shape
    others = clustered_vectors(n, d, 1)
    queries = clustered_vectors(QUERIES, d, 2)
    pool = clustered_vectors(pool_size, d, 3)
    index, flat = Index(pool, K), faiss.IndexFlatL2(d)
    flat.add(pool.numpy())

    def search_flat(vectors: Tensor, k: int) -> None:
        fresh = faiss.IndexFlatL2(d)
        fresh.add(x.numpy())
        fresh.search(vectors.numpy(), k)

    return {
        "faiss": lambda: search_flat(x, K + 1),
        "distinct": lambda: nearest_neighbors(others, x, K),
        "faiss distinct": lambda: search_flat(others, K),
        "held": lambda: [index.search(queries[b]) for b in blocks(QUERIES, index.step)],
        "faiss held": lambda: flat.search(queries.numpy(), K),
    }


def compare_published(options: argparse.Namespace, x: Tensor, few: Tensor) -> dict[str, object]:
    """The figures of the detectors against the published forms."""
    ours = {
        "k_distance": lambda: score(("k_distance",), x),
        "slof_and_dao": lambda: score(("slof", "dao"), few),
    }
    published = {
        "k_distance": lambda: plain_k_distance(x),
        "slof_and_dao": lambda: plain_slof_and_dao(few),
    }
    slow = medians(time_in_turn(published, options.slow, warm_up=0))
    fast = medians(time_in_turn(ours, options.repeats, warm_up=0))
    sizes, goals = {"k_distance": options.n, "slof_and_dao": options.fewer}, (30, 50)
    return {
        name: {
            "n": sizes[name],
            "bezoar_s": round(fast[name], 3),
            "published_s": round(slow[name], 2),
            "ratio": round(slow[name] / fast[name], 1),
            "goal": goal,
        }
        for name, goal in zip(ours, goals, strict=True)
    }


def compare_faiss(options: argparse.Namespace, x: Tensor) -> dict[str, object]:
    """The figures of the searches against faiss."""
    if faiss is None:
        print("faiss is not installed; it is left out", file=sys.stderr)
        return {}
    calls: Calls = {"nearest": lambda: nearest_neighbors(x, x, K, exclude_self=True)}
    seconds = time_in_turn(calls | search_calls(x, options.pool), options.repeats, warm_up=0)
    median = medians(seconds)
    pairs = {
        "faiss": ("nearest", options.n),
        "faiss distinct": ("distinct", options.n),
        "faiss held": ("held", options.pool),
    }
    figures = {}
    for name, (ours, references) in pairs.items():
        turns = zip(seconds[name], seconds[ours], strict=True)
        figures[name] = {
            "references": references,
            "bezoar_s": round(median[ours], 3),
            "faiss_s": round(median[name], 3),
            "ratio": round(statistics.median(theirs / mine for theirs, mine in turns), 2),
            "goal": 1,
        }
    return figures


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--n", type=int, default=10_000, help="records, k-distance and faiss")
    parser.add_argument(
        "--fewer", type=int, default=4_000, help="records, SLOF and DAO: they hold k N^2 floats"
    )
    parser.add_argument("--pool", type=int, default=65_536, help="references that are held")
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow", type=int, default=1, help="rounds of the published forms")
    parser.add_argument("--at-scale", type=int, default=20_000, help="records of the peak")
    parser.add_argument("--peak", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        x = clustered_vectors(options.peak, options.d)
        taken = time_call(lambda: score(("k_distance", "slof", "dao", "lid"), x))
        print(json.dumps({"seconds": taken, "peak_bytes": peak_bytes()}))
        return
    x = clustered_vectors(options.n, options.d)
    few = clustered_vectors(options.fewer, options.d)
    result: dict[str, object] = {"d": options.d, "k": K, "threads": 1, "repeats": options.repeats}
    nearest_neighbors(few, few, K)  # to warm up
    result |= compare_published(options, x, few)
    result |= compare_faiss(options, x)
    result["exact"] = check_exactness(x, torch.arange(0, options.n, max(1, options.n // 500))[:500])
    arguments = ["--peak", str(options.at_scale), "--d", str(options.d)]
    fresh = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    )
    peak = json.loads(fresh.stdout)
    result[f"four_detectors_at_{options.at_scale}"] = {
        "bezoar_s": round(peak["seconds"], 2),
        "peak_GB": round(peak["peak_bytes"] / 1e9, 2),
        "goal_GB": 1,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
