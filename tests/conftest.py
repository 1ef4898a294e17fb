"""Shared by tests of several rooms: the stub server of `tests/lm`, and an environment that says nothing."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest


def _module(path):
    found = sys.modules.get(path.stem)
    if found is None:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        found = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="session")
def stubs():
    """The module of the stub server: `StubServer`, `VllmStub`, `Reply`, `completion`."""
    return _module(Path(__file__).parent / "lm" / "stub_server.py")


@pytest.fixture(scope="session")
def postgres():
    """A running PostgreSQL server."""
    pytest.importorskip("psycopg", reason="pip install 'copa-harness[shared]'")
    servers = _module(Path(__file__).parent / "shared" / "postgres_server.py")
    if (reason := servers.why_not()) is not None:
        pytest.skip(reason)
    with servers.PostgresServer() as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def plain_environment():
    """No option comes from the surroundings (CI sets CI, perhaps COPA_REPORT_DIR); lines break where they always do."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name == "CI" or name.startswith("COPA_")]:
            environment.delenv(name)
        environment.setenv("COLUMNS", "120")
        yield
