import torch

from models.families.flux.streams import FluxStreams


def test_streams_of_rows_keep_the_position_factors() -> None:
    rotary = (torch.randn(7, 4), torch.randn(7, 4))
    streams = FluxStreams(torch.randn(3, 5, 4), torch.randn(3, 2, 4), torch.randn(3, 4), rotary)
    part = streams.of_rows([1], torch.tensor([1]))
    assert isinstance(part, FluxStreams)
    assert part.image_rotary_emb is rotary
    assert torch.equal(part.temb, streams.temb[1:2])
