from collections.abc import Sequence

import pytest
import torch

from models.families.hunyuan3d.streams import PlainStreams


def streams_of(num_rows: int, context_rows: Sequence[int] | None) -> PlainStreams:
    """The context of each row is filled with the row's number."""
    having = range(num_rows) if context_rows is None else context_rows
    return PlainStreams(
        torch.randn(num_rows, 5, 4),
        torch.randn(num_rows, 1, 4),
        torch.randn(num_rows, 4),
        torch.tensor([float(row) for row in having])[:, None, None].expand(-1, 3, 2),
        context_rows,
        None if context_rows is None else torch.tensor(context_rows),
        {0: torch.randn(num_rows, 6, 4)},
    )


@pytest.mark.parametrize(
    ("context_rows", "rows", "contexts", "places"),
    [
        (None, [3, 1], [3, 1], None),
        ([0, 3], [3, 0], [3, 0], None),
        ([0, 3], [1, 3], [3], [1]),
        ([0, 3], [3, 2, 0, 1], [3, 0], [0, 2]),
    ],
    ids=["all rows have one", "all chosen rows have one", "one has one", "some have one"],
)
def test_streams_of_rows_have_the_context_of_these_rows(
    context_rows: list[int] | None, rows: list[int], contexts: list[int], places: list[int] | None
) -> None:
    streams = streams_of(4, context_rows)
    part = streams.of_rows(rows, torch.tensor(rows))
    assert torch.equal(part.hidden_states, streams.hidden_states[rows])
    assert part.context is not None
    assert part.context[:, 0, 0].tolist() == contexts
    assert part.context_rows == places
    assert (None if part.context_index is None else part.context_index.tolist()) == places


def test_rows_without_context_have_none() -> None:
    part = streams_of(4, [0, 3]).of_rows([2, 1], torch.tensor([2, 1]))
    assert part.context is None
    assert part.context_index is None
    assert part.of_rows([1], torch.tensor([1])).context is None


def test_routers_read_the_shape_alone() -> None:
    streams = streams_of(2, None)
    assert streams.scored == ((streams.hidden_states,), (None,))
