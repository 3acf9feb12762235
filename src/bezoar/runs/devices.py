"""The device that a verb works on, and what of the machine stands in a manifest."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bezoar.errors import UserError
from bezoar.machine import torchrun_variable


def select_device(name: str) -> torch.device:
    """Find a device by name: `auto`, `cpu`, `cuda` or `cuda:1`. Of several ranks, each takes a GPU of its own.

    A GPU with a number becomes the current one; otherwise pinned memory would take up room on the first GPU too.

    Raises:
        UserError: if there is no such device, or it is of a kind that bezoar does not support.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if dist.is_initialized() and name.startswith("cuda"):
        name = _gpu_of_rank(name)
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError(name)
        torch.empty(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UserError(f"no device {name!r} here; there are: {', '.join(names)}") from error
    return device


def _gpu_of_rank(name: str) -> str:
    gpus = torch.cuda.device_count()
    ranks = torchrun_variable("LOCAL_WORLD_SIZE", 1)
    if name != "cuda" or gpus < ranks:
        raise UserError(
            f"{ranks} ranks take a GPU each, and there are {gpus}; "
            "give --device cuda (without a number) or cpu, and torchrun no more ranks than GPUs"
        )
    return f"cuda:{torchrun_variable('LOCAL_RANK', 0)}"


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return what a figure depends on beside the question: versions, commit, device. For the manifest."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "deterministic": device.type == "cpu",
        **find_commit(Path(__file__)),
    }


def find_commit(file: Path) -> dict[str, Any]:
    """The commit that a file belongs to, and whether its folder has changed since; empty where git does not track it.

    An installed package may lie below another project's repository, whose commit says nothing about the package.
    """

    def git(*words: str) -> str:
        process = subprocess.run(["git", *words], cwd=file.parent, capture_output=True, text=True)
        return process.stdout.strip()

    try:
        if not git("ls-files", "--", file.name):
            return {}
        dirty = bool(git("status", "--porcelain", "--", "."))
        return {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    except OSError:
        return {}
