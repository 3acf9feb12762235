"""Cores, quotas of control groups, and what is set for OpenMP's threads before torch is
imported.
"""

import json
import os
import subprocess
import sys

import pytest

from bezoar import machine


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A folder of control groups, and the file that says which of them this process is in."""
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_control_groups_there_is_no_quota(groups):
    assert machine.cpu_quota() is None and machine.cores() == 8


@pytest.mark.parametrize(
    ("text", "quota", "cores"),
    [
        ("max 100000\n", None, 8),
        ("200000 100000\n", 2.0, 2),
        ("150000 100000\n", 1.5, 2),
        ("120000 100000\n", 1.2, 1),
        ("10000 100000\n", 0.1, 1),
        ("1600000 100000\n", 16.0, 8),
        ("nonsense\n", None, 8),
        ("1 0\n", None, 8),
    ],
)
def test_a_quota_of_version_2_bounds_the_cores(groups, text, quota, cores):
    write(groups / "cgroup", "0::/\n")
    write(groups / "groups" / "cpu.max", text)
    assert machine.cpu_quota() == quota and machine.cores() == cores


def test_the_groups_above_bound_too(groups):
    write(groups / "cgroup", "0::/user.slice/job\n")
    write(groups / "groups" / "user.slice" / "job" / "cpu.max", "max 100000\n")
    write(groups / "groups" / "user.slice" / "cpu.max", "300000 100000\n")
    assert machine.cores() == 3


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_a_quota_of_version_1_as_a_container_sees_it(groups, folder):
    """The group's path is that of the host; in the container its files stand at the top."""
    write(groups / "cgroup", "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/docker/ab\n")
    write(groups / "groups" / folder / "cpu.cfs_quota_us", "200000\n")
    write(groups / "groups" / folder / "cpu.cfs_period_us", "100000\n")
    assert machine.cpu_quota() == 2.0
    write(groups / "groups" / folder / "cpu.cfs_quota_us", "-1\n")
    assert machine.cpu_quota() is None


def settings_of(**environment):
    """What `import bezoar` sets in a process with a quota of two of eight cores."""
    code = (
        "import json, os, sys; sys.path.insert(0, sys.argv[1]); import importlib.util as u;"
        "spec = u.spec_from_file_location('machine', sys.argv[2]); m = u.module_from_spec(spec);"
        "spec.loader.exec_module(m); m.usable_cores = lambda: 8; m.cpu_quota = lambda: 2.0;"
        "m.set_threads(); print(json.dumps(dict(os.environ)))"
    )
    names = [*machine.WAITING, *machine.COUNTS]
    plain = {k: v for k, v in os.environ.items() if k not in names}
    run = subprocess.run(
        [sys.executable, "-c", code, str(machine.__file__), str(machine.__file__)],
        env=plain | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    after = json.loads(run.stdout)
    return {name: after[name] for name in names if name in after}


def test_threads_wait_asleep_and_keep_to_the_quota():
    assert settings_of() == machine.WAITING | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}


def test_settings_of_the_user_win():
    assert settings_of(OMP_WAIT_POLICY="ACTIVE") == {
        "OMP_WAIT_POLICY": "ACTIVE",
        "OMP_NUM_THREADS": "2",
        "MKL_NUM_THREADS": "2",
    }
    assert settings_of(OMP_NUM_THREADS="5") == machine.WAITING | {"OMP_NUM_THREADS": "5"}


def test_importing_bezoar_makes_the_settings_before_torch_is_imported():
    code = (
        "import bezoar, os, sys; assert 'torch' not in sys.modules; "
        "import torch; print(os.environ['GOMP_SPINCOUNT'], torch.get_num_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k not in machine.WAITING}
    environment |= dict.fromkeys(machine.COUNTS, "1")
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["0", "1"]


def test_free_cores_are_what_the_load_leaves_of_the_threads(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    for threads, load, free in (("", 0.0, 4.0), ("", 4.0, 2.0), ("1", 0.0, 1.0), ("1", 7.0, 0.5)):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert machine.free_cores() == free
