"""The order of the queue: light jobs come early, and so do jobs of API keys that have little other work."""

_PATIENCE = 20.0
"""After this many times its own predicted seconds, no job that arrives can overtake a job."""
_PATIENCE_OF_KEY = 2.5
"""As `_PATIENCE`, for the work of the job's API key at an even share of the server. With 1, a key that has little waits
long; with 3, keys of equal weights differ by 7 % (docs/experiments.md)."""
_SHARE_OF_DEADLINE = 0.5
"""After this part of the time that its deadline allows, no job that arrives can overtake a job."""


def due_at(
    created_at: float,
    seconds: float,
    *,
    deadline_at: float | None = None,
    own_s: float = 0.0,
    weight: float = 1.0,
    num_keys: int = 1,
) -> float:
    """When a job of so many predicted `seconds` is due. Jobs of one priority are claimed in this order.

    Waits are in proportion to sizes. So light jobs overtake heavy ones, but only those that
    came a bounded time before.

    `own_s` are the predicted seconds of the jobs that its API key has, waiting and running. With fair shares among
    `num_keys` keys, these would be done after so many times that time, over the key's weight, and the job is due in
    proportion to that (after weighted fair queueing, Demers, Keshav and Shenker 1989,
    https://doi.org/10.1145/75246.75248). So keys that ask for more than there is get shares in proportion to their
    weights, and a key with one job does not wait for a key with hundreds.
    """
    due = created_at + _PATIENCE * seconds + _PATIENCE_OF_KEY * num_keys * own_s / weight
    return due if deadline_at is None else min(due, created_at + _SHARE_OF_DEADLINE * (deadline_at - created_at))
