"""Shared by the tests of the gateway: a running stub server, and no price list from the network."""

import pytest


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
