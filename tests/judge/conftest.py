"""Property tests here import scipy on their first example: a deadline per example would measure that, not the code."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
