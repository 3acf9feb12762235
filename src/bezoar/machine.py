"""The machine: memory, cores, threads, ranks under torchrun. Imports no torch."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# OpenMP's threads sleep between two pieces of work, in GNU's, LLVM's and Intel's implementation. By
# default they spin; if other processes want the cores, a step then takes many times as long.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def free_memory() -> int:
    """Bytes that this process can still use, by the system and its control group; 0 if unknown."""
    limits = []
    if (meminfo := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        limits.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    group = CONTROL_GROUPS
    if (group / "memory.max").exists():
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            limits.append(int(limit) - int(stat["anon"]))
    return max(0, min(limits, default=0))


def cores() -> int:
    """The number of cores that this process may use, within the limits of its control groups."""
    usable = usable_cores()
    quota = cpu_quota()
    return usable if quota is None else max(1, min(usable, int(quota + 0.5)))


def free_cores() -> float:
    """The approximate number of cores that this process gets, given the machine's present load."""
    requested = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(cores(), int(requested)) if requested.isdigit() and int(requested) else cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return threads * min(1.0, usable_cores() / (load + threads))


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """The cores that the control groups of this process grant, such as 1.5; None without a limit.

    Both versions of control groups are read. The limits of parent groups count too.
    """
    quotas: list[float] = []
    with contextlib.suppress(OSError, ValueError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for folder in _group_folders(controllers.split(","), path):
                quotas += _read_quota(folder)
    return min(quotas, default=None)


def _group_folders(controllers: Sequence[str], path: str) -> Iterator[Path]:
    """The folders of a control group and its parents. In a container its path may begin outside."""
    if controllers == [""]:  # version 2
        bases = [CONTROL_GROUPS, CONTROL_GROUPS / "unified"]
    elif "cpu" in controllers:
        bases = [CONTROL_GROUPS / "cpu", CONTROL_GROUPS / ",".join(controllers)]
    else:
        return
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for base in bases:
        for depth in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:depth])


def _read_quota(folder: Path) -> list[float]:
    """The quota that a control group's folder states, in cores; empty if it states none."""
    with contextlib.suppress(OSError, ValueError, IndexError, ZeroDivisionError):
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()[:2]
            return [] if quota == "max" else [int(quota) / int(period)]
        quota_us = int((folder / "cpu.cfs_quota_us").read_text())
        period_us = int((folder / "cpu.cfs_period_us").read_text())
        return [quota_us / period_us] if quota_us > 0 else []
    return []


def set_threads() -> None:
    """Set how many threads OpenMP and MKL start, and that they sleep while they wait.

    The user's own settings win. OpenMP reads the variables when it is loaded, so call this before
    torch and numpy are imported. Threads beyond a quota would only use it up sooner, and all of
    them then wait for the next period.
    """
    if "torch" in sys.modules:
        return
    if WAITING.keys().isdisjoint(os.environ):
        os.environ.update(WAITING)
    if cores() < usable_cores() and not any(name in os.environ for name in COUNTS):
        os.environ.update(dict.fromkeys(COUNTS, str(cores())))


def rank() -> int:
    """The number of this process under torchrun; 0 without it."""
    return torchrun_variable("RANK", 0)


def world_size() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return torchrun_variable("WORLD_SIZE", 1)


def torchrun_variable(name: str, default: int) -> int:
    """A number that torchrun passes to its processes in an environment variable.

    Other launchers set RANK and WORLD_SIZE too, without processes that wait for this one; these are
    ignored.
    """
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default
