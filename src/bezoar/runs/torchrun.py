"""The command line under torchrun: rank 0 answers it, the other ranks assist in its trainings and write nothing."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bezoar import machine
from bezoar.errors import UserError
from bezoar.progress import Progress
from bezoar.runs.execute import Job, resolve_inputs
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings
from bezoar.training import ranks

GRACE = 10.0  # seconds that rank 0 is given to say what is wrong, which it most likely has met too


def run(main: Callable[[], int]) -> int:
    """The exit status of this rank. Where a rank ends badly torchrun ends the others, so that none waits for it."""
    ranks.join()
    if machine.rank() > 0:
        return assist()
    status: Any = 1
    try:
        status = main()
    except SystemExit as end:  # --help, or options that are none
        status = end.code
    if not status:
        ranks.broadcast(None)
    return status


def assist() -> int:
    """Do this rank's part of the work that rank 0 calls for, until rank 0 lets it go."""
    try:
        while (order := ranks.receive()) is not None:
            job, verb = job_of(order)
            verb.work(job)
    except UserError as error:
        time.sleep(GRACE)
        print(f"bezoar: rank {machine.rank()}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def job_of(order: dict) -> tuple[Job, Any]:
    """Rank 0's order -> the same job and verb here. Raises UserError when files here are other than rank 0's."""
    settings = Settings(Path(order["runs"]), order["seed"], order["device"], quiet=True)
    name, ask, paths = order["verb"], order["ask"], order["paths"]
    cls = getattr(importlib.import_module(f"bezoar.verbs.{name}"), name.title())
    verb = cls(
        **{
            k: given(v, paths)
            for k, v in ask.items()
            if k not in ("verb", "seed", "version", "files")
        }
    )
    inputs, here = resolve_inputs(verb, settings)
    if here != ask:
        raise UserError(f"the files here are not those that rank 0 sees: {here}")
    return Job(Path(order["folder"]), settings, inputs, Progress(True, name)), verb


def given(asked: Any, paths: dict[str, str]) -> Any:
    """A part of a manifest's `ask` -> what a verb's field takes."""
    if isinstance(asked, list):
        return tuple(given(a, paths) for a in asked)
    if isinstance(asked, dict):
        return Run(Path(paths[asked["run"]])) if "run" in asked else asked["spec"]
    return asked
