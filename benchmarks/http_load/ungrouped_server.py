"""Our server without its scheduling: `python -m benchmarks.http_load.ungrouped_server serve …`, as `elastic-dit serve`.

In place of groups of similar sparsity and of fair shares of the device, all requests that can share a step share it,
and those that can't take turns, first come first. This is no setting of the product.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import count

from service import cli
from service.scheduling import precedence
from service.scheduling.batching import Candidate

Group = Callable[..., list[list[int]]]


def in_turns() -> Group:
    """A replacement of `form_groups`, with a memory of the turns."""
    turns, last_turn = count(1), dict[Hashable, int]()

    def group(candidates: Sequence[Candidate], **_: object) -> list[list[int]]:
        members: dict[Hashable, list[int]] = {}
        for index, candidate in enumerate(candidates):  # in the order in which they started
            members.setdefault(candidate.batch_key, []).append(index)
        for key in [key for key in last_turn if key not in members]:
            del last_turn[key]
        keys = sorted(members, key=lambda key: last_turn.get(key, 0))
        if keys:
            last_turn[keys[0]] = next(turns)
        return [members[key] for key in keys]

    return group


def main() -> None:
    precedence.form_groups = in_turns()  # type: ignore[attr-defined]  # precedence imports it
    cli.app()


if __name__ == "__main__":
    main()
