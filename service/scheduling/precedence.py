"""How requests of high priority come before all others, and those with a deadline before those without.

Neither stops the others. The clock is passed in.
"""

import math
from collections.abc import Sequence
from threading import Lock

from service.scheduling.batching import Candidate, form_groups

_SHARE_OF_OTHERS = 0.05
"""The device time that others get while those that come before them run, over the time that these get."""
_HURRY_S = 30.0
"""How long the next request of high priority is expected after the last one."""
_MOST_GROWTH = 1.5
"""How much longer than its leader alone a step may take then. A step can't be interrupted, so the next request waits
for it, and on a CPU a step of eight takes eight times as long."""


class Precedence:
    """Requests of high priority lead all steps, but for those that others are owed.

    These are owed a share of the time that the former have had, and lead a step when it pays for one (deficit round
    robin, Shreedhar and Varghese 1996, https://doi.org/10.1109/90.502236). So a lone request of high priority seldom
    waits for them, and a stream of such requests does not stop them. In the same way, those without a deadline are owed
    a share of the time that those with one have had. Any thread may call `are_owed` and `spend`.
    """

    def __init__(self) -> None:
        self._owed_s = 0.0
        self._owed_by_deadlines_s = 0.0
        self._lock = Lock()
        self._hurry_ends = -math.inf

    def groups(self, candidates: Sequence[Candidate], now: float) -> list[list[int]]:
        """Group the candidates that share steps, see `form_groups`. `now` is in seconds."""
        others = [candidate for candidate in candidates if not candidate.is_high]
        if len(others) < len(candidates):
            self._hurry_ends = now + _HURRY_S
        if len(others) in (0, len(candidates)):
            self._owed_s = 0.0  # nobody waited for anybody
            high_first = True
        else:
            high_first = not self.are_owed(min(others, key=_turn).step_seconds)
        patient = [other for other in others if math.isinf(other.slack_s)]
        if len(patient) in (0, len(others)):
            self._owed_by_deadlines_s = 0.0
            deadlines_first = True
        else:
            deadlines_first = min(patient, key=_turn).step_seconds > self._owed_by_deadlines_s
        most_growth = _MOST_GROWTH if now < self._hurry_ends else math.inf
        return form_groups(candidates, high_first=high_first, deadlines_first=deadlines_first, most_growth=most_growth)

    def are_owed(self, seconds: float) -> bool:
        """Whether the others are owed so much of the device."""
        return seconds <= self._owed_s

    def spend(self, is_high: bool, seconds: float, *, has_deadline: bool = False) -> None:
        """Note that one of high priority, or one of the others, had the device."""
        with self._lock:
            self._owed_s = max(0.0, self._owed_s + (seconds * _SHARE_OF_OTHERS if is_high else -seconds))
            if not is_high:
                change_s = seconds * _SHARE_OF_OTHERS if has_deadline else -seconds
                self._owed_by_deadlines_s = max(0.0, self._owed_by_deadlines_s + change_s)


def _turn(candidate: Candidate) -> float:
    return candidate.turn
