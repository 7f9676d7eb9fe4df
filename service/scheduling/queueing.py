"""The order of the queue: light jobs before heavy ones, jobs of API keys that have little waiting before others'."""

_PATIENCE = 20.0
"""How many times its own predicted seconds a job waits before all that arrive later come after it."""
_PATIENCE_OF_KEY = 2.5
"""The same for the work of its API key, over the time that this takes at an even share of the server. With 1, a key
that has little waits long; with 10, keys of weights 1 and 2 get 1:2.4 to 1:5 (docs/experiments.md)."""
_SHARE_OF_DEADLINE = 0.5
"""After this part of the time that a deadline allows, nobody who arrives later comes first."""


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

    The wait that a job should bear is in proportion to its size. So light jobs overtake heavy ones, but only those that
    came a bounded time before.

    `own_s` are the predicted seconds of the jobs that its API key has, waiting and running. With fair shares among
    `num_keys` keys, these would be done after so many times that time, over the key's weight, and the job is due in
    proportion to that (after weighted fair queueing, Demers, Keshav and Shenker 1989,
    https://doi.org/10.1145/75246.75248). So keys that ask for more than there is get shares in proportion to their
    weights, and a key with one job does not wait for a key with hundreds.
    """
    due = created_at + _PATIENCE * seconds + _PATIENCE_OF_KEY * num_keys * own_s / weight
    return due if deadline_at is None else min(due, created_at + _SHARE_OF_DEADLINE * (deadline_at - created_at))
