"""What every test needs."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def nothing_is_left_at_home(tmp_path_factory):
    """The list of methods that a user has named lies in the test's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield
