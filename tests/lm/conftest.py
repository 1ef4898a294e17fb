"""Shared by the tests of the door: the stub server, and no price list from the network."""

import importlib.util
import sys
from pathlib import Path

import pytest


def _load(name):
    found = sys.modules.get(name)
    if found is None:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        found = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="session")
def stubs():
    """The module of the stub server: `StubServer`, `Reply`, `completion`."""
    return _load("stub_server")


@pytest.fixture
def stub(stubs):
    """A running stub server that answers everything."""
    with stubs.StubServer() as running:
        yield running


@pytest.fixture
def no_gateways(monkeypatch):
    """No environment variable of the user leads a provider elsewhere, and prices come from the shipped list."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    for provider in ("OPENAI", "HOSTED_VLLM", "OLLAMA", "OLLAMA_CHAT"):
        for name in ("API_BASE", "BASE_URL", "HOST", "API_KEY"):
            monkeypatch.delenv(f"{provider}_{name}", raising=False)
