import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

from models.families.qwen_image import adapter

TEXT, HEIGHT, WIDTH = 5, 2, 3


@pytest.fixture(scope="module", params=[False, True], ids=["one time", "pictures at the time 0"])
def transformer(request: pytest.FixtureRequest) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=request.param,
    )
    return transformer.requires_grad_(False)


@pytest.mark.parametrize("lengths", [[5], [5, 5, 5], [2, 5, 3]], ids=["one row", "no mask", "mask"])
@pytest.mark.parametrize("pictures", [[], [(2, 2), (3, 1)]], ids=["noise alone", "pictures"])
def test_all_pieces_together_equal_the_forward_bit_for_bit(
    transformer: QwenImageTransformer2DModel, lengths: list[int], pictures: list[tuple[int, int]]
) -> None:
    batch = len(lengths)
    rng = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, HEIGHT * WIDTH + sum(h * w for h, w in pictures), 8, generator=rng)
    prompt_embeds, timestep = torch.randn(batch, TEXT, 24, generator=rng), torch.rand(batch, generator=rng)
    mask = torch.arange(TEXT) < torch.tensor(lengths)[:, None] if min(lengths) < TEXT else None
    expected = transformer(
        hidden_states=latents,
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=mask,
        timestep=timestep,
        img_shapes=[[(1, HEIGHT, WIDTH), *((1, *size) for size in pictures)]] * batch,
        return_dict=False,
    )[0]
    streams = adapter.prologue(
        transformer,
        latents,
        timestep,
        adapter.embed_prompt(transformer, prompt_embeds),
        mask,
        None if mask is None else lengths,
        adapter.rotary_embedding(transformer, TEXT, HEIGHT, WIDTH, pictures),
        HEIGHT * WIDTH,
    )
    for block in adapter.blocks(transformer).values():
        text, image = adapter.call_block(block, streams)
        streams = replace(streams, hidden_states=image, encoder_hidden_states=text)
    assert torch.equal(adapter.epilogue(transformer, streams), expected)


def test_blocks_are_named_in_the_order_they_run(transformer: QwenImageTransformer2DModel) -> None:
    blocks = adapter.blocks(transformer)
    assert list(blocks) == ["block.00", "block.01", "block.02"]
    assert list(blocks.values()) == [*transformer.transformer_blocks]


def test_blocks_take_the_keywords_that_they_are_called_by() -> None:
    """A diffusers release that adds or renames an argument has to be looked at."""
    assert list(inspect.signature(QwenImageTransformerBlock.forward).parameters) == [
        "self",
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "temb",
        "image_rotary_emb",
        "joint_attention_kwargs",
        "modulate_index",
    ]


def test_image_mlp_is_the_one_that_may_be_narrowed(transformer: QwenImageTransformer2DModel) -> None:
    block = transformer.transformer_blocks[1]
    first, last, row, column = adapter.mlps(block)[""]
    assert first is block.get_submodule("img_mlp.net.0.proj")
    assert last is block.get_submodule("img_mlp.net.2")
    assert (row, column) == (0, 0)
    assert (first.out_features, last.in_features) == (128, 128)


@pytest.mark.parametrize(("height", "width"), [(2, 3), (4, 4), (5, 2)])
def test_rotary_embedding_is_that_of_the_transformer(
    transformer: QwenImageTransformer2DModel, height: int, width: int
) -> None:
    image, text = adapter.rotary_embedding(transformer, 7, height, width)
    expected = transformer.pos_embed([[(1, height, width)]] * 2, max_txt_seq_len=7, device=torch.device("cpu"))
    assert torch.equal(image, expected[0])
    assert torch.equal(text, expected[1])
    assert (len(image), len(text)) == (height * width, 7)
