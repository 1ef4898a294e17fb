"""Shared by all tests: pytester, and property tests judged by what they find, not by how busy the machine is."""

from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester"]

settings.register_profile("copa", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("copa")
