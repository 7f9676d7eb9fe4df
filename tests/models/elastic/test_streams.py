from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.elastic.streams import Streams, row_index


def test_streams_of_rows_are_those_of_each_row_in_the_order_asked_for() -> None:
    streams = Streams(torch.randn(3, 5, 4), torch.randn(3, 2, 4), torch.randn(3, 4))
    part = streams.of_rows([2, 0], torch.tensor([2, 0]))
    for name in ("hidden_states", "encoder_hidden_states", "temb"):
        assert torch.equal(getattr(part, name), torch.stack([getattr(streams, name)[row] for row in (2, 0)]))
    assert part.text_lengths is None


def test_routers_read_both_streams_unmasked() -> None:
    streams = Streams(torch.randn(3, 5, 4), torch.randn(3, 2, 4), torch.randn(3, 4))
    inputs, masks = streams.scored
    assert inputs[0] is streams.encoder_hidden_states
    assert inputs[1] is streams.hidden_states
    assert masks == (None, None)


def test_row_index_holds_the_numbers_on_the_device() -> None:
    index = row_index([3, 1], torch.device("cpu"))
    assert index.dtype == torch.int64
    assert index.tolist() == [3, 1]


def test_adjacent_rows_have_a_slice_and_others_share_one_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[list[int]] = []

    def upload(rows: Sequence[int], device: torch.device) -> Tensor:
        uploaded.append([*rows])
        return row_index(rows, device)

    monkeypatch.setattr("models.elastic.streams.row_index", upload)
    streams = Streams(torch.randn(6, 5, 4), torch.randn(6, 3, 4), torch.randn(6, 4))
    groups = [[0, 2, 3], [1], [4, 5]]
    first, one, two = streams.indices(groups)
    assert (one, two) == (slice(1, 2), slice(4, 6))
    others = replace(streams, temb=torch.randn(6, 4)).indices([[0, 2, 3], [1, 4], [2, 5]])
    assert others[0] is first
    assert uploaded == [[0, 2, 3], [1, 4, 2, 5]]
    for group, index in zip([*groups, [1, 4], [2, 5]], [first, one, two, *others[1:]], strict=True):
        part = streams.of_rows(group, index)
        assert torch.equal(part.hidden_states, streams.hidden_states[group])
        assert torch.equal(part.temb, streams.temb[group])
