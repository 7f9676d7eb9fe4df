import torch

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
