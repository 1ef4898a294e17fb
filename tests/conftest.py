"""Shared by tests of several rooms: the stub server of `tests/lm`."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def stubs():
    """The module of the stub server: `StubServer`, `VllmStub`, `Reply`, `completion`."""
    found = sys.modules.get("stub_server")
    if found is None:
        spec = importlib.util.spec_from_file_location("stub_server", Path(__file__).parent / "lm" / "stub_server.py")
        found = sys.modules["stub_server"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return found
