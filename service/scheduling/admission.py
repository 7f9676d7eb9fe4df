"""Whether a job may join the backlog."""

import math

from service.errors import Overloaded


def admit(cost_s: float, *, backlog_s: float, max_backlog_s: float) -> None:
    """Raise Overloaded if `cost_s` more would make the backlog longer than `max_backlog_s`.

    An idle server takes any job, however long, since waiting would not make it shorter.
    """
    excess_s = backlog_s + cost_s - max_backlog_s
    if backlog_s <= 0 or excess_s <= 0:
        return
    retry_after_s = max(1, math.ceil(min(excess_s, backlog_s)))
    raise Overloaded(
        f"the server has {backlog_s:.1f} s of work and this request would add {cost_s:.1f} s, more than the "
        f"{max_backlog_s:g} s it accepts; try again in {retry_after_s} s",
        retry_after_s,
    )
