import logging
import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.elastic.compiled import BlockCompiler, check_compiler
from models.elastic.runner import ElasticBlock
from models.elastic.streams import Streams
from models.elastic.width import narrowed
from models.errors import CompilerError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # torch's own
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return hidden_states + temb[:, None] * self.last(self.first(hidden_states).relu())


class Waiting(Mlp):
    """Reads a value from the device to decide, which no single graph can."""

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return super().forward(hidden_states, temb) if temb.sum() > 0 else hidden_states


def call(block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
    """Returns parts of one tensor, as many blocks do, so that they are not contiguous."""
    joined = torch.cat((streams.encoder_hidden_states, streams.hidden_states), dim=1)
    after = block(joined, streams.temb)
    num_text_tokens = streams.encoder_hidden_states.shape[1]
    return after[:, :num_text_tokens], after[:, num_text_tokens:]


def blocks_of(kind: type[Mlp]) -> list[ElasticBlock]:
    torch.manual_seed(0)
    blocks = []
    for index in range(2):
        block = kind().requires_grad_(False)
        narrow = narrowed(block, {"first": 16}, {"last": 16})
        blocks.append(ElasticBlock(f"block.{index:02d}", {0.5: narrow, 1.0: block}, call, None))
    return blocks


def streams_of(num_rows: int, num_tokens: int, num_text_tokens: int) -> Streams:
    generator = torch.Generator().manual_seed(num_rows)
    sizes = [(num_rows, num_tokens, 8), (num_rows, num_text_tokens, 8), (num_rows, 8)]
    return Streams(*(torch.randn(size, generator=generator) for size in sizes))


@pytest.fixture(autouse=True)
def inductor_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))


@needs_compiler
@pytest.mark.long
@pytest.mark.slow
def test_two_graphs_for_each_width_serve_all_blocks_and_sizes() -> None:
    # Given streams in which sizes are equal that need not be
    blocks = blocks_of(Mlp)
    compiler = BlockCompiler(blocks, call)
    compiler.warm_up(streams_of(8, 8, 8), (0.5, 1.0))
    assert compiler.take_new() == ("block",) * 4
    # Then other sizes, also of streams that blocks have left, compile nothing
    with torch.inference_mode():
        for num_rows, num_tokens, num_text_tokens in [(1, 8, 8), (2, 20, 3), (3, 9, 30), (4, 70, 4), (8, 8, 5)]:
            streams = streams_of(num_rows, num_tokens, num_text_tokens)
            for width in (0.5, 1.0):
                found = expected = streams
                for compiled, plain in zip(compiler.blocks, blocks, strict=True):
                    text, image = compiled.call(compiled.variants[width], found)
                    found = replace(found, hidden_states=image, encoder_hidden_states=text)
                    # What a hook before the next block may do: split one tensor again.
                    text, image = call(plain.variants[width], expected)
                    expected = replace(expected, hidden_states=image, encoder_hidden_states=text)
                    torch.testing.assert_close(found.hidden_states, image)
                    torch.testing.assert_close(found.encoder_hidden_states, text)
                    compiled.call(compiled.variants[width], expected)
    assert compiler.take_new() == ()


@pytest.mark.long
def test_block_that_is_no_single_graph_runs_uncompiled_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    blocks = blocks_of(Waiting)
    compiler, streams = BlockCompiler(blocks, call), streams_of(2, 6, 4)
    with caplog.at_level(logging.WARNING, "models.elastic.compiled"):
        compiler.warm_up(streams, (1.0,))
    (record,) = caplog.records
    assert "Waiting run uncompiled" in record.getMessage()
    for compiled, plain in zip(compiler.blocks, blocks, strict=True):
        for found, expected in zip(
            compiled.call(compiled.variants[1.0], streams), call(plain.variants[1.0], streams), strict=True
        ):
            assert torch.equal(found, expected)
    assert compiler.take_new() == ()


@pytest.mark.long
def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("/nowhere/g++",))
    with pytest.raises(CompilerError, match=r"can't be compiled here.*C\+\+ compiler.*ELASTIC_COMPILE"):
        check_compiler("cpu")
