"""`bezoar` and `python -m bezoar`: sets memory options that keep results identical, then runs."""

import os
import sys

# glibc maps and unmaps every large activation anew, which costs up to 1.6 times the work itself on
# a CPU. It reads these variables only when a process starts, so the program starts itself once more
# with them.
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def run() -> int:
    """Restart the process if the variables are missing, else run. Returns the exit status."""
    if sys.platform == "linux" and any(key not in os.environ for key in ALLOCATION):
        os.environ.update(ALLOCATION)
        os.execv(sys.executable, [sys.executable, "-m", "bezoar", *sys.argv[1:]])
    # Imported here: a process that restarts does not need them.
    from bezoar.cli import main

    if "TORCHELASTIC_RUN_ID" in os.environ:
        from bezoar.runs import torchrun

        return torchrun.run(main)
    return main()


if __name__ == "__main__":
    sys.exit(run())
