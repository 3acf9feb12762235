"""Runs the command line under torchrun: rank 0 runs it, the others help with its trainings."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bezoar import machine
from bezoar.errors import UserError
from bezoar.progress import Progress
from bezoar.runs.execute import Job, resolve_inputs
from bezoar.runs.run import Run
from bezoar.runs.verb import Settings, Verb, load_verb
from bezoar.terminal import warn
from bezoar.training import ranks

# Exit statuses of a run that is done, with or without findings and records left out.
DONE = (None, 0, 3, 4)
GRACE = 10.0  # seconds that rank 0 gets to report an error, which it probably met too
NOT_FIELDS = ("verb", "seed", "version", "files")  # keys of `ask` that are not fields of the verb


def run(main: Callable[[], int]) -> int:
    """Run the command line on rank 0, and assist on the others. Returns this rank's exit status.

    Where a rank ends badly, torchrun ends the others, so that none of them waits for it.
    """
    if machine.world_size() == 1:
        return main()
    ranks.join()
    if machine.rank() > 0:
        return assist()
    status: Any = 1
    try:
        status = main()
    except SystemExit as end:  # --help, or options that do not exist
        status = end.code
    if status in DONE:
        ranks.broadcast(None)
    return int(status or 0)


def assist() -> int:
    """Take part in the work that rank 0 orders, until it ends. Returns the exit status."""
    try:
        while (order := ranks.receive()) is not None:
            job, verb = make_job(order)
            verb.work(job)
    except UserError as error:
        time.sleep(GRACE)
        warn(f"bezoar: rank {machine.rank()}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def make_job(order: dict[str, Any]) -> tuple[Job, Verb]:
    """Make the job and the verb of rank 0's order on this rank.

    Raises UserError if the files that this rank sees are not those of rank 0.
    """
    settings = Settings(Path(order["runs"]), order["seed"], order["device"], quiet=True)
    ask = order["ask"]
    fields = {k: field_value(v, order["paths"]) for k, v in ask.items() if k not in NOT_FIELDS}
    verb = load_verb(order["verb"])(**fields)
    inputs, ask_here = resolve_inputs(verb, settings)
    if ask_here != ask:
        raise UserError(f"the files here are not those that rank 0 sees: {ask_here}")
    job = Job(Path(order["folder"]), settings, inputs, Progress(True, order["verb"]))
    return job, verb


def field_value(part: Any, paths: dict[str, str]) -> Any:
    """Turn an entry of a manifest's `ask` into a field's value. paths: of runs, by name."""
    if isinstance(part, list):
        return tuple(field_value(item, paths) for item in part)
    if isinstance(part, dict):
        return Run(Path(paths[part["run"]])) if "run" in part else part["spec"]
    return part
