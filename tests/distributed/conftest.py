"""Several processes share the cores of one machine."""

import pytest


@pytest.fixture(scope="package", autouse=True)
def one_thread_each():
    """For the processes that tests start. Threads of many that spin for work made steps fifty times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
