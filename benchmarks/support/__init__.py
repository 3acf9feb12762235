"""What the benchmarks share: calls that are timed in turn, and processes that take steps when they
are asked.

Calls take turns, so that other work on the machine disturbs all of them alike; seconds are those
that the processor worked, which it disturbs little.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bezoar.__main__ import ALLOCATION

Step = Callable[[Any], Any]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the benchmark's docstring."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def restart_with_allocator_settings() -> None:
    """Start this script anew with the settings that the `bezoar` command sets, unless it has
    them.
    """
    if sys.platform == "linux" and any(key not in os.environ for key in ALLOCATION):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATION})


def time_call(call: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of one call."""
    start = clock()
    call()
    return clock() - start


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times. The first `warm_up` turns do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + repeats):
        for name, call in calls.items():
            taken = time_call(call, clock)
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in seconds.items()}


class Side:
    """A process of one side of a comparison, which takes a step whenever it is asked.

    It runs the benchmark's own script with `--serve` and some arguments, which calls `serve_steps`.
    `settings` are variables of its environment; those that are None are not set there.
    """

    def __init__(
        self,
        script: str,
        arguments: Sequence[str],
        allocator_settings: bool,
        settings: Mapping[str, str | None] | None = None,
    ) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in ALLOCATION}
        if allocator_settings:
            environment |= ALLOCATION
        for key, value in (settings or {}).items():
            environment.pop(key, None)
            if value is not None:
                environment[key] = value
        self.process = subprocess.Popen(
            [sys.executable, script, "--serve", *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self, request: Any = None) -> tuple[float, Any]:
        """Seconds of a step, and what it returned."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        seconds, answer = json.loads(self.process.stdout.readline())
        return seconds, answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve_steps(step: Step, clock: Callable[[], float] = time.process_time) -> None:
    """Take a step for every line of stdin, which is its argument in JSON; answer with its seconds
    and its result.
    """
    for line in sys.stdin:
        request = json.loads(line)
        start = clock()
        answer = step(request)
        print(json.dumps([clock() - start, answer]), flush=True)
