"""machine"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bezoar.errors import UserError


def free_memory() -> int:
    """Bytes that this process can still take, as the system and its control group say. 0 when neither says."""
    said = []
    if (system := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":") for line in system.read_text().splitlines())
        said.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        said.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (
        limit := (group / "memory.max").read_text().strip()
    ) != "max":
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        said.append(int(limit) - int(held["anon"]))
    return max(0, min(said, default=0))


def rank() -> int:
    """This process's number under torchrun; 0 without it."""
    return torchrun_variable("RANK", 0)


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return torchrun_variable("WORLD_SIZE", 1)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def select_device(name: str) -> Any:
    """`auto`, `cpu`, `cuda`, `cuda:1` -> torch.device; of several ranks each takes a GPU of its own.

    A GPU with a number becomes the current one, or pinned memory and the like would take up room on the first GPU too.
    Raises UserError for one that is not there, and for kinds of devices that bezoar has not been made for.
    """
    import torch
    import torch.distributed as dist

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if dist.is_initialized() and name.startswith("cuda"):
        gpus, needed = torch.cuda.device_count(), torchrun_variable("LOCAL_WORLD_SIZE", 1)
        if name != "cuda" or gpus < needed:
            raise UserError(
                f"{needed} ranks take a GPU each, and there are {gpus}; "
                "give --device cuda (without a number) or cpu, and torchrun no more ranks than GPUs"
            )
        name = f"cuda:{torchrun_variable('LOCAL_RANK', 0)}"
    try:
        wanted = torch.device(name)
        if wanted.type not in ("cpu", "cuda"):
            raise NotImplementedError(name)
        torch.empty(1, device=wanted)
        if wanted.type == "cuda" and wanted.index is not None:
            torch.cuda.set_device(wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"no device {name!r} here; there are: {', '.join(there)}") from error
    return wanted


def torchrun_variable(name: str, otherwise: int) -> int:
    """Other launchers set RANK and WORLD_SIZE too, without processes that would wait for us."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else otherwise


def describe_environment(chosen: Any) -> dict[str, Any]:
    """For the manifest. chosen: torch.device."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(chosen)
        if chosen.type == "cuda"
        else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "deterministic": chosen.type == "cpu",
        **find_commit(Path(__file__)),
    }


def find_commit(file: Path) -> dict[str, Any]:
    """The commit that a file is of, and whether its folder has changed since; nothing where no repository tracks it.

    An installed package may lie below somebody else's repository, whose commit says nothing.
    """

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=file.parent, capture_output=True, text=True
        ).stdout.strip()

    try:
        if not git("ls-files", "--", file.name):
            return {}
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", ".")),
        }
    except OSError:
        return {}
