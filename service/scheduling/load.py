"""Lower quality under load, within the limits that clients set."""

# Shares of the longest backlog. Lowering begins at the first and is complete at the second.
_BEGIN, _END = 0.25, 0.75


def lowered_quality(quality: float, min_quality: float, *, backlog_s: float, max_backlog_s: float) -> float:
    """The quality to serve under this load: between `quality` and the floor `min_quality`."""
    load = (backlog_s / max_backlog_s - _BEGIN) / (_END - _BEGIN)
    return quality - max(0.0, quality - min_quality) * min(max(load, 0.0), 1.0)
