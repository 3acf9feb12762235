"""`bezoar` and `python -m bezoar`: memory settings that keep results identical, then the command line."""

import os
import sys

# glibc maps and unmaps every large activation anew, which costs up to 1.6 times the work itself on a CPU; it reads
# these only when a process starts, so the program starts itself once more with them.
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def run() -> int:
    """Start over with the settings if they are missing, else run the command line."""
    if sys.platform == "linux" and any(key not in os.environ for key in ALLOCATION):
        os.environ.update(ALLOCATION)
        os.execv(sys.executable, [sys.executable, "-m", "bezoar", *sys.argv[1:]])
    from bezoar import machine
    from bezoar.cli import main

    if machine.world_size() > 1:
        from bezoar.runs import torchrun

        return torchrun.run(main)
    return main()


if __name__ == "__main__":
    sys.exit(run())
