"""How many requests a client keeps in flight at one server: additive increase, multiplicative decrease (AIMD)."""

from __future__ import annotations


class Window:
    """Grows by one for every window of successes and halves when the server refuses, between 1 and `largest`.

    Starts at `largest`: a server that has room should not be kept waiting, and one that has none says so at once.

    Args:
        largest: requests in flight at once, at most; 1 or more.
    """

    def __init__(self, largest: int) -> None:
        if largest < 1:
            raise ValueError(f"max_in_flight is {largest}; at least 1 request must be allowed in flight")
        self.size = self._largest = largest
        self.smallest_seen = largest
        self._successes = 0
        self._cut_at = float("-inf")

    def succeeded(self) -> None:
        """Counts a request that was served."""
        self._successes += 1
        if self._successes >= self.size:
            self.size, self._successes = min(self._largest, self.size + 1), 0

    def refused(self, sent: float, now: float) -> None:
        """Halves the window, once for all the requests that one full queue refused.

        Args:
            sent: when the refused request was sent, on the clock of `now`.
            now: the time, in seconds.
        """
        if sent <= self._cut_at:
            return
        self.size, self._successes, self._cut_at = max(1, self.size // 2), 0, now
        self.smallest_seen = min(self.smallest_seen, self.size)
