"""Run bezoar on every mutant, each in a process of its own, and say what went wrong.

python tests/hostile/run.py FOLDER [--part 0 --parts 2] [--only TEXT]: makes artefacts and mutants
below FOLDER. Prints a JSON line for each mutant that broke a promise, then a line of totals; exits
with 1 if any did.
"""

import argparse
import gc
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hostile.artefacts import write_all
from hostile.cases import Mutant
from hostile.mutants import mutants

from bezoar.cli import main

SECONDS = 20
MEMORY = 2 << 30  # bytes beyond what the idle process holds
LOOKS = 3  # at its memory in a row, 20 ms apart, before a process counts as too large
LINES = 3  # that a refusal may take
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def resident(process: int) -> int:
    """Bytes that a process and its children hold."""
    total = 0
    try:
        total = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (OSError, IndexError):
        return total
    return total + sum(resident(int(child)) for child in children)


def in_child(mutant: Mutant, folder: Path) -> int:
    """The command, as the child process runs it. Returns the exit status."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 30, 4 << 30))
    enter(folder)
    words = [word.replace("@", str(folder)) for word in mutant.words]
    if "--runs" not in words and words[0] != "show":
        words += ["--runs", str(folder / "runs")]
    if words[0] == "scan":
        words += ["--workers", "1"]
    return exit_status(words)


def enter(folder: Path) -> None:
    """Make a folder this process's home and working directory; its output goes beside the
    folder.
    """
    os.environ |= {"HOME": str(folder / "home"), "XDG_STATE_HOME": str(folder / "home")}
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)


def exit_status(words: list[str]) -> int:
    """Run a command line in this process; 1 for one that raises."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def run(mutant: Mutant, folder: Path, idle: int) -> list[str]:
    """Run one; the promises that it broke."""
    folder.mkdir()
    mutant.make(folder)
    start, child = time.monotonic(), os.fork()
    if child == 0:
        os.setsid()
        status = 1
        try:
            status = in_child(mutant, folder)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    broken: list[str] = []
    too_large = 0  # looks in a row; a process that is being forked counts twice for a moment
    while True:
        ended, raw = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        too_large = too_large + 1 if resident(child) - idle > MEMORY else 0
        if time.monotonic() - start > SECONDS:
            broken.append(f"over {SECONDS} s")
        elif too_large >= LOOKS:
            broken.append(f"over {MEMORY >> 20} MiB")
        if broken:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return broken
        time.sleep(0.02)
    status = os.waitstatus_to_exitcode(raw)
    out, err = (
        folder.with_suffix(f".{n}").read_bytes().decode(errors="replace") for n in ("out", "err")
    )
    if status not in mutant.statuses:
        broken.append(
            f"status {status}: {err.strip().splitlines()[-1][:300] if err.strip() else 'no word'}"
        )
    if status == 2 and len((out + err).splitlines()) > LINES:
        broken.append(f"{len((out + err).splitlines())} lines: {(out + err)[-300:]!r}")
    if found := RAW.search(out + err):
        broken.append(
            f"raw {found[0]!r} on the terminal: "
            f"{(out + err)[max(0, found.start() - 80) : found.end() + 20]!r}"
        )
    if list(folder.rglob("EXECUTED")):
        broken.append("code was executed")
    if problem := mutant.check(folder):
        broken.append(problem)
    return broken


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below a folder."""
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--only", default="")
    return parser.parse_args()


def run_all(options: argparse.Namespace) -> int:
    """-> the exit status."""
    base = options.folder.absolute() / f"base{options.part}"
    cases = options.folder.absolute() / f"cases{options.part}"
    for folder in (base, cases):
        shutil.rmtree(folder, ignore_errors=True)
    cases.mkdir(parents=True)
    with open(os.devnull, "w") as silence:
        screen, sys.stdout = sys.stdout, silence
        runs = write_all(base)
        sys.stdout = screen
    gc.freeze()  # of what children share
    before, idle = snapshot(base), resident(os.getpid())
    chosen = [m for m in mutants(base, runs) if re.search(options.only, m.name)]
    bad = 0
    mine = [m for i, m in enumerate(chosen) if i % options.parts == options.part]
    for number, mutant in enumerate(mine):
        folder = cases / f"{number:04d}"
        start = time.monotonic()
        broken = run(mutant, folder, idle)
        if broken:
            bad += 1
            facts = {
                "mutant": mutant.name,
                "broken": broken,
                "words": [w[:200] for w in mutant.words],
            }
            print(json.dumps(facts | {"seconds": round(time.monotonic() - start, 1)}), flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    changed = [p for p, s in snapshot(base).items() if before.get(p) != s]
    if changed:
        bad += 1
        print(
            json.dumps({"mutant": "all", "broken": [f"written outside: {p}" for p in changed[:5]]})
        )
    print(f"{len(mine)} mutants, {bad} broke a promise")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(run_all(arguments()))
