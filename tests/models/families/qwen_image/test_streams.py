from collections.abc import Sequence

import pytest
import torch

from models.families.qwen_image.streams import QwenImageStreams


def streams_of(lengths: Sequence[int]) -> QwenImageStreams:
    """One row for each prompt length. Its text tokens are numbered, and 9 where they are padding."""
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    text = torch.where(mask, torch.arange(float(longest)), 9.0)[..., None].expand(-1, -1, 4)
    is_padded = min(lengths) < longest
    rows = len(lengths)
    return QwenImageStreams(
        torch.randn(rows, 5, 4),
        text,
        torch.randn(rows, 4),
        torch.randn(5, 2),
        torch.randn(longest, 2),
        mask if is_padded else None,
        lengths if is_padded else None,
    )


def test_streams_of_rows_cut_the_padding_that_none_of_them_needs() -> None:
    streams = streams_of([2, 4, 3])
    part = streams.of_rows([2, 0], torch.tensor([2, 0]))
    assert part.text_lengths == [3, 2]
    assert part.encoder_hidden_states_mask is not None
    assert part.encoder_hidden_states_mask.tolist() == [[True, True, True], [True, True, False]]
    assert part.encoder_hidden_states[..., 0].tolist() == [[0, 1, 2], [0, 1, 9]]
    for name in ("hidden_states", "temb"):
        assert torch.equal(getattr(part, name), getattr(streams, name)[[2, 0]])
    assert torch.equal(part.image_rotary_emb, streams.image_rotary_emb)
    assert torch.equal(part.text_rotary_emb, streams.text_rotary_emb[:3])


@pytest.mark.parametrize(("rows", "length"), [([0, 2], 2), ([1], 4)])
def test_rows_of_one_length_lose_their_padding_and_their_mask(rows: list[int], length: int) -> None:
    part = streams_of([2, 4, 2]).of_rows(rows, torch.tensor(rows))
    assert part.encoder_hidden_states_mask is None
    assert part.text_lengths is None
    assert part.encoder_hidden_states.shape == (len(rows), length, 4)


def test_streams_without_a_mask_have_none_for_their_rows_either() -> None:
    part = streams_of([3, 3, 3]).of_rows([1], torch.tensor([1]))
    assert part.encoder_hidden_states_mask is None
    assert part.encoder_hidden_states.shape == (1, 3, 4)
    assert len(part.text_rotary_emb) == 3


def test_routers_read_only_real_text_tokens() -> None:
    streams = streams_of([2, 4])
    inputs, masks = streams.scored
    assert inputs[0] is streams.encoder_hidden_states
    assert inputs[1] is streams.hidden_states
    assert masks == (streams.encoder_hidden_states_mask, None)
