"""What the command's settings of OpenMP's threads are worth, alone and beside other work.

    python benchmarks/threads.py [--repeats 15] [--steps 5] [--busy 0 1 2]

A step is one of clip_small's training (batch 128 of 32 px), timed by the clock on the wall. Three
processes: `one` has one thread; `spinning` has as many threads as torch takes, which wait as
OpenMP's defaults say (what bezoar did before it set anything); `default` is what the command sets.
`--busy N`: beside N other processes that never wait. The sides take turns of `--steps` steps, so
that other work on the machine meets all of them alike; printed are medians of the turns, and
ratios.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from clip_small import Training, fast_shift
from support import Side, make_parser, serve_steps

from bezoar import machine

UNSET = dict.fromkeys([*machine.WAITING, *machine.COUNTS])
SIDES = {
    "one": UNSET | dict.fromkeys(machine.COUNTS, "1"),
    "spinning": UNSET | {"KMP_BLOCKTIME": "200"},  # LLVM's own default; any setting keeps ours away
    "default": UNSET,
}
BUSY = "while True: pass"


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that never wait."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_sides(sides: dict[str, Side], repeats: int, steps: int) -> dict[str, float]:
    """Steps a second of each side: the median over turns; the first does not count."""
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            seconds, _ = side.step(steps)
            if turn:
                rates[name].append(steps / seconds)
    return {name: median(values) for name, values in rates.items()}


def serve(batch: int) -> None:
    """Take as many training steps as each request says."""
    training = Training("fp32", batch, 32, 32)

    def take_steps(count: Any) -> None:
        for _ in range(count):
            training.take_step(fast_shift)

    serve_steps(take_steps, time.perf_counter)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, machine.cores()])
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    if options.serve:
        serve(options.batch)
        return
    words = ["--batch", str(options.batch)]
    sides = {name: Side(__file__, words, True, settings) for name, settings in SIDES.items()}
    print(f"{machine.cores()} cores; steps a second")
    print(f"{'busy':>5}" + "".join(f"{name:>10}" for name in SIDES), end="")
    print(f"{'default/one':>13}{'default/spinning':>18}")
    for count in options.busy:
        with busy_processes(count):
            rates = measure_sides(sides, options.repeats, options.steps)
        print(f"{count:5}" + "".join(f"{rates[name]:10.2f}" for name in SIDES), end="")
        one, spinning = rates["default"] / rates["one"], rates["default"] / rates["spinning"]
        print(f"{one:13.2f}{spinning:18.2f}", flush=True)
    for side in sides.values():
        side.close()


if __name__ == "__main__":
    main()
