"""Elastic-DiT's checkpoint, tiny: a backbone that is not its base's, and routers with their useless third."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.conversion import convert
from models.curve import EXACT, CurvePoint, Preset
from models.elastic.plan import Policy
from models.elastic.router import RouterStack
from models.engine import Engine
from models.errors import WeightsError
from models.families.qwen_image.conversion import router_tensors
from models.families.qwen_image.pipeline import QwenImageFamily
from models.report import Decision
from models.request import ImageRequest, PresetBudget
from models.rules.router import OFFICIAL, PAPER
from models.state import DenoiseState
from models.weights import (
    CheckpointTraits,
    MlpActivation,
    RouterWeights,
    load_router_weights,
    read_manifest,
    router_stack,
)
from models.zoo import load_engine

SHARD_BYTES = 100_000
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def official(tiny_qwen_image: Path) -> dict[str, Tensor]:
    """In bfloat16, as published."""
    tensors = load_file(tiny_qwen_image / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(5)
    tensors = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    num_blocks = len({name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")})
    stack = RouterStack(num_blocks, len(tensors["img_in.weight"]), hidden=16)
    for name, tensor in stack.state_dict().items():
        if ".img_mod." in name:
            tensor = torch.cat((0.5 * torch.randn_like(tensor), torch.full_like(tensor[: len(tensor) // 2], 1e4)))
        elif ".out.0." in name:
            tensor = 0.5 * torch.randn_like(tensor)
        else:
            tensor = 0.4 * torch.randn_like(tensor)
            tensor = tensor - tensor.mean(-1, keepdim=True) if tensor.ndim == 2 else 0.1 * tensor
        tensors[name] = tensor
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def source(official: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published") / "model.safetensors"
    save_file(official, path)
    return path


@pytest.fixture(scope="module")
def converted(source: Path, tiny_qwen_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model directory `e-dit` and its router folder `routers/e-dit`."""
    root = tmp_path_factory.mktemp("converted")
    run(source, tiny_qwen_image, root)
    return root


@pytest.fixture(scope="module")
def engine(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Serves the converted model, with small images by default."""
    routers = Path(shutil.copytree(converted / "routers", tmp_path_factory.mktemp("small") / "routers"))
    path = routers / "e-dit" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["defaults"] |= {"height": 64, "width": 64}
    path.write_text(json.dumps(manifest))
    return load_engine([converted / "e-dit"], device="cpu", router_weights=routers)


def run(source: Path, base: Path, root: Path, max_shard_bytes: int = SHARD_BYTES) -> Path:
    return convert(
        "elastic-dit",
        source,
        base,
        root / "e-dit",
        router_weights=root / "routers",
        max_shard_bytes=max_shard_bytes,
    )


def generate(engine: Engine, policy: Policy, num_steps: int) -> DenoiseState:
    request = ImageRequest(
        model="e-dit",
        prompt="a small red circle",
        height=64,
        width=64,
        num_inference_steps=num_steps,
        guidance_scale=4.0,
        seed=0,
        budget=PresetBudget(Preset.EXACT),
        point=EXACT,
        is_guided=True,
        wants_trace=True,
    )
    state = engine.start(request, CurvePoint(policy, 1.0, 1.0, 1.0, 1.0))
    while not state.is_done:
        engine.step([state])
    return state


@pytest.mark.parametrize(("policy", "num_steps"), [(OFFICIAL, 17), (PAPER, 5)])
def test_converted_model_generates_what_the_checkpoint_does(
    engine: Engine, official: dict[str, Tensor], tiny_qwen_image: Path, policy: Policy, num_steps: int
) -> None:
    # Given the checkpoint's tensors in diffusers' pipeline, with what the official program does otherwise
    pipeline = QwenImagePipeline.from_pretrained(tiny_qwen_image, dtype=torch.float32, local_files_only=True)
    whole = {name: tensor.float() for name, tensor in official.items()}
    backbone = {name: tensor for name, tensor in whole.items() if not name.startswith("gate_mlps.")}
    pipeline.transformer.load_state_dict(backbone, assign=True)  # into memory of the same alignment: the same bits
    family = QwenImageFamily(
        "e-dit",
        pipeline,
        RouterWeights(router_stack(router_tensors(whole))),
        CheckpointTraits(MlpActivation.GELU_SIGMOID, rescales_guidance=False),
    )
    expected = generate(Engine({"e-dit": family}, engine.cards), policy, num_steps)
    # When the converted directory is served
    state = generate(engine, policy, num_steps)
    # Then both are the same, and their routers had something to decide
    assert torch.equal(state.latents, expected.latents)
    summary = state.summary()
    assert summary.decisions == expected.summary().decisions
    decisions = {entry.decision for entry in summary.decisions or ()}
    assert decisions >= {Decision.RUN, Decision.SKIP}
    assert len({entry.mlp_width for entry in summary.decisions or ()}) > 1


def test_diffusers_loads_the_converted_directory(converted: Path, official: dict[str, Tensor]) -> None:
    pipeline = QwenImagePipeline.from_pretrained(converted / "e-dit", dtype=torch.bfloat16, local_files_only=True)
    backbone = {name: tensor for name, tensor in official.items() if not name.startswith("gate_mlps.")}
    state = pipeline.transformer.state_dict()
    assert state.keys() == backbone.keys()
    for name, tensor in backbone.items():
        assert torch.equal(state[name], tensor)


def test_routers_keep_their_type_and_lose_the_useless_third(converted: Path, official: dict[str, Tensor]) -> None:
    routers = load_file(converted / "routers" / "e-dit" / "router.safetensors")
    for name, tensor in official.items():
        if name.startswith("gate_mlps."):
            kept = tensor[: len(routers[name])]
            assert len(kept) == (len(tensor) * 2 // 3 if ".img_mod." in name else len(tensor))
            assert routers[name].dtype == torch.bfloat16
            assert torch.equal(routers[name], kept)


def test_manifest_says_how_the_official_program_runs_it(converted: Path) -> None:
    manifest = read_manifest(converted / "routers" / "e-dit")
    assert (manifest.num_inference_steps, manifest.guidance_scale) == (30, 4.0)
    assert (manifest.height, manifest.width) == (1328, 1328)
    assert manifest.traits == CheckpointTraits(MlpActivation.GELU_SIGMOID, rescales_guidance=False)
    assert manifest.published_policies == (OFFICIAL, PAPER)


def test_large_models_are_cut_into_shards(converted: Path) -> None:
    folder = converted / "e-dit" / "transformer"
    index = json.loads((converted / "e-dit" / INDEX).read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert (
        sorted(index["metadata"]["sha256"]) == [file.name for file in files] == sorted({*index["weight_map"].values()})
    )
    total = 0
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= SHARD_BYTES or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
        total += size
    assert total == index["metadata"]["total_size"]


def test_small_models_have_one_file(source: Path, tiny_qwen_image: Path, tmp_path: Path) -> None:
    routers = run(source, tiny_qwen_image, tmp_path, max_shard_bytes=10**9)
    files = sorted(file.name for file in (tmp_path / "e-dit" / "transformer").iterdir())
    assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert load_router_weights(routers, tmp_path / "e-dit") is not None


def split(source: Path, folder: Path) -> dict[str, str]:
    """The source in three files. Returns which has what."""
    tensors = load_file(source)
    names = sorted(tensors)
    parts = {f"part-{i}.safetensors": names[i::3] for i in range(3)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    return {name: file for file, part in parts.items() for name in part}


@pytest.mark.parametrize("form", ["folder", "indexed folder", "index"])
def test_source_may_come_in_shards(
    source: Path, converted: Path, tiny_qwen_image: Path, tmp_path: Path, form: str
) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    weight_map = split(source, folder)
    index = folder / "model.safetensors.index.json"
    if form != "folder":
        index.write_text(json.dumps({"weight_map": weight_map}))
        save_file({"surplus": torch.zeros(1)}, folder / "not-in-the-index.safetensors")
    run(index if form == "index" else folder, tiny_qwen_image, tmp_path)
    for file in sorted((converted / "e-dit" / "transformer").iterdir()):
        assert (tmp_path / "e-dit" / "transformer" / file.name).read_bytes() == file.read_bytes()


def test_files_of_the_base_are_linked(converted: Path, tiny_qwen_image: Path) -> None:
    linked = [file for file in tiny_qwen_image.rglob("*") if file.is_file() and file.suffix != ".safetensors"]
    linked += [tiny_qwen_image / "text_encoder" / "model.safetensors"]
    assert len(linked) > 6
    for file in linked:
        assert file.samefile(converted / "e-dit" / file.relative_to(tiny_qwen_image))


def test_files_that_cannot_be_linked_are_copied(
    source: Path, tiny_qwen_image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    run(source, tiny_qwen_image, tmp_path)
    copied, original = (folder / "vae" / "config.json" for folder in (tmp_path / "e-dit", tiny_qwen_image))
    assert copied.read_bytes() == original.read_bytes()
    assert not copied.samefile(original)


def test_base_of_links_is_followed(source: Path, tiny_qwen_image: Path, tmp_path: Path) -> None:
    """As huggingface_hub keeps its downloads."""
    base = tmp_path / "base"
    for file in tiny_qwen_image.rglob("*"):
        if file.is_file():
            link = base / file.relative_to(tiny_qwen_image)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    run(source, base, tmp_path)
    shutil.rmtree(base)
    assert (tmp_path / "e-dit" / "model_index.json").is_file()
    assert not (tmp_path / "e-dit" / "model_index.json").is_symlink()


def test_routers_are_refused_for_another_backbone(
    official: dict[str, Tensor], converted: Path, tiny_qwen_image: Path, tmp_path: Path
) -> None:
    """Of the same names, shapes and shards."""
    other = tmp_path / "model.safetensors"
    save_file(official | {"img_in.weight": official["img_in.weight"] + 1}, other)
    run(other, tiny_qwen_image, tmp_path)
    with pytest.raises(WeightsError, match=r"index\.json is not the file"):
        load_router_weights(converted / "routers" / "e-dit", tmp_path / "e-dit")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("proj_out.bias"), r": missing: proj_out\.bias$"),
        (lambda t: [t.pop(name) for name in [*t][:7]], r": missing: (\S+, ){3}\S+ and 3 more$"),
        (lambda t: t.pop("gate_mlps.1.out.2.bias"), r": missing: gate_mlps\.1\.out\.2\.bias$"),
        (lambda t: t.pop("gate_mlps.0.out.0.weight"), "missing: gate_mlps"),
        (lambda t: t.update(extra=torch.zeros(1)), r": surplus: extra in model\.safetensors$"),
        (
            lambda t: t.update({"proj_out.bias": torch.zeros(3)}),
            r": misshapen: proj_out\.bias in model\.safetensors, \[3\] for \[32\]$",
        ),
        (
            lambda t: t.update(router_tensors({"gate_mlps.0.img_mod.1.bias": t["gate_mlps.0.img_mod.1.bias"]})),
            r"misshapen: gate_mlps\.0\.img_mod\.1\.bias in model\.safetensors, \[64\] for \[96\]",
        ),
        (lambda t: t.update({"proj_out.bias": torch.zeros(32, dtype=torch.int32)}), "proj_out.bias .* type I32"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(
    official: dict[str, Tensor],
    tiny_qwen_image: Path,
    tmp_path: Path,
    edit: Callable[[dict[str, Tensor]], Any],
    message: str,
) -> None:
    tensors = dict(official)
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message):
        run(tmp_path / "model.safetensors", tiny_qwen_image, tmp_path)
    assert files_in(tmp_path) == ["model.safetensors"]


def test_tensor_in_two_files_is_refused(source: Path, tiny_qwen_image: Path, tmp_path: Path) -> None:
    split(source, tmp_path)
    shutil.copy(tmp_path / "part-0.safetensors", tmp_path / "part-9.safetensors")
    with pytest.raises(WeightsError, match=r"part-0\.safetensors and in .*part-9\.safetensors"):
        run(tmp_path, tiny_qwen_image, tmp_path / "new")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", "no tensors", r"model\.safetensors can't be read"),
        ("model.safetensors.index.json", "{}", "no proper entry 'weight_map'"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', r"b\.safetensors can't be read"),
    ],
)
def test_unreadable_source_is_named(
    tiny_qwen_image: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(WeightsError, match=message):
        run(tmp_path / name, tiny_qwen_image, tmp_path)
    assert files_in(tmp_path) == [name]


def spoil_class(base: Path) -> None:
    (base / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_class, "is a FluxPipeline"),
        (lambda base: (base / "model_index.json").unlink(), r"model_index\.json can't be read"),
        (lambda base: (base / "transformer" / "config.json").unlink(), r"config\.json can't be read"),
        (lambda base: shutil.rmtree(base / "tokenizer"), "has no tokenizer"),
    ],
)
def test_base_that_is_no_qwen_image_directory_is_refused(
    source: Path, tiny_qwen_image: Path, tmp_path: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    base = Path(shutil.copytree(tiny_qwen_image, tmp_path / "base"))
    spoil(base)
    with pytest.raises(WeightsError, match=message):
        run(source, base, tmp_path / "new")
    assert files_in(tmp_path / "new") == []


def files_in(folder: Path) -> list[str]:
    """Also hidden ones."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
