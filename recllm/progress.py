"""Progress lines: how much is done, how fast, and how long it will still take; at most one every few seconds."""

import time
from collections.abc import Callable

EVERY = 10.0
"""Seconds between two lines."""


class Progress:
    """Counts what is done and says so now and then."""

    def __init__(self, total: int, unit: str, say: Callable[[str], None], every: float = EVERY) -> None:
        """Begin to count to `total`.

        Args:
            total: how much there is to do.
            unit: its name in the plural, as users or steps.
            say: gets the lines.
            every: seconds between two lines.
        """
        self.total, self.unit, self.say, self.every, self.done = total, unit, say, every, 0
        self.start = self.last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.start

    def add(self, number: int, note: str = "") -> None:
        """Count `number` more; a line with `note` at its end where one is due."""
        self.done += number
        if time.monotonic() - self.last >= self.every:
            self.tell(note)

    def tell(self, note: str = "") -> None:
        """Say how far it is, now."""
        self.last = time.monotonic()
        rate = self.done / max(self.seconds, 1e-9)
        left = max(self.total - self.done, 0) / max(rate, 1e-9)
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        self.say(f"{self.done:,} of {self.total:,} {self.unit}, {shown} {self.unit}/s, {left:,.0f} s left{note}")
