"""Spans of OpenTelemetry, for whoever has set up its SDK; without it nothing is imported and nothing happens.

    with span("copa.evaluate", task="iris") as note:
        note(score=0.9)

Spans hold names, counts and scores; never prompts, answers or the text of an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Note = Callable[..., None]
"""Adds attributes to a span."""


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[Note]:
    """A span around the block, if anybody in this process uses OpenTelemetry.

    Args:
        name: What is done.
        **attributes: Text or numbers; `_` stands for `.` where doubled, None is left out.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        yield _ignore
        return
    tracer = trace.get_tracer("copa_harness")
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as current:

        def note(**more: Any) -> None:
            for key, value in more.items():
                if value is not None:
                    current.set_attribute(key.replace("__", "."), value)

        note(**attributes)
        try:
            yield note
        except BaseException as error:
            note(error__type=type(error).__name__)
            current.set_status(trace.Status(trace.StatusCode.ERROR, type(error).__name__))
            raise


def _ignore(**attributes: Any) -> None:
    pass
