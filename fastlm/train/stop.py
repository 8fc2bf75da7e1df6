"""Being told to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Notes SIGTERM and SIGINT, so that a loop can end where nothing is lost.

    A second SIGINT ends at once, as if nobody listened.
    """

    def __init__(self) -> None:
        self.signal: str | None = None  # the name of the one that came

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are noted; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [(number, signal.signal(number, self._note)) for number in numbers]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
