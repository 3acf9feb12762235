"""Environment: what a figure depends on beside the question. Versions, the commit, the device."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment(chosen: Any) -> dict[str, Any]:
    """For the manifest. chosen: torch.device."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "deterministic": chosen.type == "cpu",
        **commit(Path(__file__)),
    }


def commit(file: Path) -> dict[str, Any]:
    """The commit that a file is of, and whether its folder has changed since; nothing where no repository tracks it.

    An installed package may lie below somebody else's repository, whose commit says nothing.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=file.parent, capture_output=True, text=True).stdout.strip()

    try:
        if not git("ls-files", "--", file.name):
            return {}
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except OSError:
        return {}
