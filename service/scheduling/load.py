"""Quality for waiting time: what a client allows the server to take away under load."""

# Shares of the longest backlog: up to the first nothing is lowered, from the second on all that may be.
_BEGIN, _END = 0.25, 0.75


def lowered_quality(quality: float, min_quality: float, *, backlog_s: float, max_backlog_s: float) -> float:
    """The quality to serve instead of `quality`, between that and the floor that the client has named."""
    load = (backlog_s / max_backlog_s - _BEGIN) / (_END - _BEGIN)
    return quality - max(0.0, quality - min_quality) * min(max(load, 0.0), 1.0)
