"""A public pickle becomes the same tensors in safetensors, with its terms of use."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.conversion import convert
from models.errors import InvalidRequest, WeightsError
from models.zoo import load_engine
from service.cli import main

Parts = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(params=["tiny_plain_hunyuan3d", "tiny_stream_hunyuan3d"])
def published(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    return directory


@pytest.fixture
def parts(published: Path) -> Parts:
    """What a public `.ckpt` holds, in 16 bits."""
    parts: Parts = {"model": {}, "vae": {}, "conditioner": {}}
    for name, tensor in load_file(published / "model.safetensors").items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor.half()
    return parts


@pytest.fixture
def source(published: Path, parts: Parts, tmp_path: Path) -> Path:
    folder = tmp_path / "hunyuan3d-dit-v2-1"
    folder.mkdir()
    shutil.copyfile(published / "config.yaml", folder / "config.yaml")
    torch.save(parts, folder / "model.fp16.ckpt")
    return folder


def run(source: Path, base: Path | None = None) -> Path:
    root = source.parents[1] if source.is_file() else source.parent
    convert("hunyuan3d", source, base, root / "new", router_weights=root / "routers", max_shard_bytes=1)
    return root / "new"


@pytest.mark.parametrize("what", ["file", "folder", "repository"])
def test_tensors_are_those_of_the_pickle_in_their_type(source: Path, parts: Parts, tmp_path: Path, what: str) -> None:
    given = {"file": source / "model.fp16.ckpt", "folder": source, "repository": tmp_path}[what]
    convert("hunyuan3d", given, None, tmp_path / "new", router_weights=tmp_path / "routers", max_shard_bytes=1)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.yaml", "model.fp16.safetensors"}
    made = load_file(tmp_path / "new" / "model.fp16.safetensors")
    expected = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype
        assert torch.equal(made[name], tensor), name


def test_terms_reach_the_card(source: Path, tmp_path: Path) -> None:
    directory = run(source)
    manifest = json.loads((tmp_path / "routers" / "new" / "manifest.json").read_text())
    assert manifest["license"].startswith("Tencent Hunyuan 3D Community License")
    card = load_engine([directory], device="cpu", router_weights=tmp_path / "routers").cards["new"]
    assert card.license == manifest["license"]
    for term in ("European Union", "United Kingdom", "South Korea", "one million", "other AI models", "derivatives"):
        assert term in card.license
    # A distilled schedule; the public pipelines' guidance and grid.
    assert (card.default_num_inference_steps, card.default_guidance_scale) == (5, 5.0)


def test_tensors_that_are_parts_of_one_are_written_whole(source: Path, parts: Parts) -> None:
    """The projections of a public checkpoint were trained as one."""
    name = next(name for name in parts["model"] if name.endswith("weight") and parts["model"][name].ndim == 2)
    both = torch.cat((parts["model"][name], parts["model"][name] + 1)).T.contiguous().T
    parts["model"][name] = both[: len(both) // 2]
    torch.save(parts, source / "model.fp16.ckpt")
    assert torch.equal(load_file(run(source) / "model.fp16.safetensors")[f"model.{name}"], parts["model"][name])


def edit(key: str, name: str, value: Any) -> Callable[[Any], Any]:
    return lambda parts: parts[key].update({name: value})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda parts: parts["vae"].pop("post_kl.bias"), r"missing: vae\.post_kl\.bias$"),
        (edit("model", "extra", torch.zeros(1)), r"surplus: model\.extra in model\.fp16\.ckpt$"),
        (edit("vae", "post_kl.bias", torch.zeros(3)), r"misshapen: vae\.post_kl\.bias in .*, \[3\] for \[16\]$"),
        (edit("vae", "post_kl.bias", torch.zeros(16, dtype=torch.int64)), r"is of type torch\.int64; known: "),
        (edit("vae", "post_kl.bias", "words"), r"is of type str; known: "),
        (lambda parts: parts.pop("vae"), "must have the parts model, vae, conditioner; it has: model, conditioner"),
    ],
)
def test_checkpoint_that_is_not_whole_is_named_and_nothing_written(
    source: Path, parts: Parts, tmp_path: Path, spoil: Callable[[Any], Any], message: str
) -> None:
    spoil(parts)
    torch.save(parts, source / "model.fp16.ckpt")
    with pytest.raises(WeightsError, match=message):
        run(source)
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "routers").iterdir()) == []


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("run while unpickling",)


@pytest.mark.parametrize("content", [{"model": Harmful()}, b"no zip", b""])
def test_file_that_is_no_pickle_of_tensors_alone_is_refused_unrun(
    source: Path, capsys: pytest.CaptureFixture[str], content: Any
) -> None:
    if isinstance(content, bytes):
        (source / "model.fp16.ckpt").write_bytes(content)
    else:
        torch.save(content, source / "model.fp16.ckpt")
    with pytest.raises(WeightsError, match="can't be read as a pickle of tensors alone"):
        run(source)
    assert capsys.readouterr().out == ""


def test_configuration_must_lie_beside_the_pickle(source: Path) -> None:
    (source / "config.yaml").unlink()
    with pytest.raises(WeightsError, match=r"has no config\.yaml beside it"):
        run(source / "model.fp16.ckpt")


def test_base_is_refused(source: Path, published: Path) -> None:
    with pytest.raises(InvalidRequest, match="takes no --base"):
        run(source, published)


def test_command_line_needs_no_base(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ELASTIC_ROUTER_WEIGHTS", str(tmp_path / "routers"))
    arguments = ["--format", "hunyuan3d", "--src", str(source), "--out", str(tmp_path / "new")]
    assert main(["convert", *arguments]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'new'} and {tmp_path / 'routers' / 'new'} written\n", "")
