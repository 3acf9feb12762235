"""`bezoar` and `python -m bezoar`: set memory options that leave results identical, then run the command line."""

import os
import sys

# glibc maps and unmaps every large activation anew, which costs up to 1.6 times the work itself on a CPU. It reads these
# variables only when a process starts, so the program starts itself once more with them.
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def run() -> int:
    """Start the process anew where the variables are missing; otherwise run the command line. Returns the exit status."""
    if sys.platform == "linux" and any(key not in os.environ for key in ALLOCATION):
        os.environ.update(ALLOCATION)
        os.execv(sys.executable, [sys.executable, "-m", "bezoar", *sys.argv[1:]])
    # Imported here because a process that starts anew does not need them, and only torchrun's processes need torch at once.
    from bezoar.cli import main

    if "TORCHELASTIC_RUN_ID" in os.environ:
        from bezoar.runs import torchrun

        return torchrun.run(main)
    return main()


if __name__ == "__main__":
    sys.exit(run())
