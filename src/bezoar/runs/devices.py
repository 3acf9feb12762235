"""Finds the device that a verb works on, and describes the machine for a manifest."""

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
    """Find a device by name: `auto`, `cpu`, `cuda` or `cuda:1`. Each rank takes its own GPU.

    A GPU with a number becomes the current one; otherwise pinned memory would also take up room on
    the first GPU.

    Raises:
        UserError: if there is no such device, or bezoar does not support its kind.
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
    """Return what a result depends on apart from the question: versions, commit and device."""
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
    """The commit of a file's repository, and whether its folder has changes; "" outside git.

    An installed package may lie within another project's repository, whose commit is irrelevant.
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
