"""What every test needs."""

import os

import pytest

from bezoar.machine import COUNTS

# pytest-xdist starts a process a core: threads of theirs would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(dict.fromkeys(COUNTS, "1"))


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left_at_home(tmp_path_factory):
    """The list of methods that a user has named lies in the test's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield
