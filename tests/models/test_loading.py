import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from models.errors import WeightsError
from models.load_options import LoadOptions, Offload
from models.loading import stream_module, stream_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session", params=["flux", "qwen_image"])
def kind(kind: Any) -> Any:
    """The families of diffusers pipelines."""
    return kind


@pytest.fixture
def published(kind: Any, directory: Path) -> tuple[type[DiffusionPipeline], Path]:
    """A pipeline class and a directory of it."""
    return kind.pipeline, directory


@pytest.fixture
def folder(tiny_flux: Path, tmp_path: Path) -> Path:
    """A transformer's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_flux / "transformer", tmp_path / "transformer"))


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, buffers and plain attributes."""
    return {
        f"{prefix}.{name}": value
        for prefix, part in module.named_modules()
        for name, value in {**part._parameters, **part._buffers, **vars(part)}.items()
        if isinstance(value, torch.Tensor)
    }


def assert_same(module: nn.Module, expected: nn.Module) -> None:
    ours, theirs = tensors_of(module), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert module.training is expected.training is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_pipeline_has_bit_for_bit_what_diffusers_loads(
    published: tuple[type[DiffusionPipeline], Path], dtype: torch.dtype
) -> None:
    cls, directory = published
    ours = stream_pipeline(cls, directory, "cpu", dtype, options=LoadOptions())
    theirs = cls.from_pretrained(directory, dtype=dtype, local_files_only=True)
    assert type(ours) is cls
    assert ours.components.keys() == theirs.components.keys()
    for name, component in theirs.components.items():
        assert type(ours.components[name]) is type(component)
        if isinstance(component, nn.Module):
            assert_same(ours.components[name], component)


def test_streamed_pipeline_draws_the_same_image(published: tuple[type[DiffusionPipeline], Path]) -> None:
    cls, directory = published
    images = []
    for pipeline in (
        stream_pipeline(cls, directory, "cpu", torch.float32, options=LoadOptions()),
        cls.from_pretrained(directory, dtype=torch.float32, local_files_only=True),
    ):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        result = pipeline("a red circle", height=32, width=32, num_inference_steps=1, generator=generator)
        images.append(result.images[0].tobytes())
    assert images[0] == images[1]


def test_shards_give_what_one_file_gives(tiny_flux: Path, tmp_path: Path) -> None:
    whole = FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer", dtype=torch.bfloat16)
    FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(stream_module(FluxTransformer2DModel, tmp_path, "cpu", torch.bfloat16), whole)


def test_modules_that_a_class_keeps_in_float32_stay_so(folder: Path) -> None:
    class Careful(FluxTransformer2DModel):  # type: ignore[misc]  # diffusers is read without types
        _keep_in_fp32_modules: ClassVar = ["norm_out"]

    careful = stream_module(Careful, folder, "cpu", torch.bfloat16)
    assert careful.get_parameter("norm_out.linear.weight").dtype == torch.float32
    assert_same(careful, Careful.from_pretrained(folder, dtype=torch.bfloat16))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("proj_out.bias"), r"missing: proj_out\.bias$"),
        (lambda t: [t.pop(name) for name in [*t][:9]], r"missing: .* and 5 more$"),
        (lambda t: t.update(extra=torch.zeros(1)), rf"surplus: extra in {WEIGHTS}$"),
        (lambda t: t.update({"proj_out.bias": torch.zeros(3)}), rf"misshapen: .*{WEIGHTS}, \[3\] for \[32\]$"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(WeightsError, match=message):
        stream_module(FluxTransformer2DModel, folder, "cpu", torch.float32)


def spoil_shards(folder: Path) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": "other.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_shards, "has no other.safetensors$"),
        (lambda folder: (folder / f"{WEIGHTS}.index.json").write_text("{}"), "has no proper entry 'weight_map'"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "model.bin"), f"has no {WEIGHTS}; model.bin is not read"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"no tensors"), "can't be loaded"),
        (lambda folder: (folder / "config.json").unlink(), "can't be loaded: .*config.json"),
    ],
)
def test_damaged_folder_is_named(folder: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(folder)
    with pytest.raises(WeightsError, match=message) as caught:
        stream_module(FluxTransformer2DModel, folder, "cpu", torch.float32)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("text_encoder_2/model.safetensors", "can't be loaded"),
        ("transformer/config.json", "can't be loaded"),
        ("model_index.json", "can't be read"),
    ],
)
def test_pipeline_without_a_part_is_refused(tiny_flux: Path, tmp_path: Path, part: str, message: str) -> None:
    directory = Path(shutil.copytree(tiny_flux, tmp_path / "flux"))
    (directory / part).unlink()
    with pytest.raises(WeightsError, match=message):
        stream_pipeline(FluxPipeline, directory, "cpu", torch.float32, options=LoadOptions())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("5", "is not a JSON object"),
        ("[" * 50_000, "can't be read"),
        ('{"transformer": 5}', "names None as its scheduler; served is FlowMatchEulerDiscreteScheduler"),
        ('{"scheduler": 5}', "names 5 as its scheduler"),
    ],
)
def test_malformed_index_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(WeightsError, match=message):
        stream_pipeline(FluxPipeline, tmp_path, "cpu", torch.float32, options=LoadOptions())


@pytest.mark.parametrize("entry", [5, "x", ["diffusers", 5], ["diffusers", "Nothing"], {}])
def test_index_with_a_malformed_part_is_refused(entry: Any, tiny_flux: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_flux, tmp_path / "flux"))
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps(index | {"scheduler": entry}))
    with pytest.raises(WeightsError, match="as its scheduler; served is FlowMatchEulerDiscreteScheduler"):
        stream_pipeline(FluxPipeline, directory, "cpu", torch.float32, options=LoadOptions())


def test_part_of_another_class_is_refused(tiny_flux: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_flux, tmp_path / "flux"))
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "FluxPipeline"]}))
    with pytest.raises(WeightsError, match=r"names FluxPipeline as its vae; served is AutoencoderKL$"):
        stream_pipeline(FluxPipeline, directory, "cpu", torch.float32, options=LoadOptions())


@pytest.mark.parametrize("offload", Offload)
def test_text_encoders_stay_on_the_host_only_if_asked(
    published: tuple[type[DiffusionPipeline], Path], offload: Offload
) -> None:
    cls, directory = published
    # The meta device stands for an accelerator.
    pipeline = stream_pipeline(cls, directory, "meta", torch.float32, options=LoadOptions(offload))
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            stays = (offload is not Offload.NONE and name.startswith("text_encoder")) or (
                offload is Offload.LAYERS and name == "transformer"  # until its blocks are wrapped
            )
            assert {p.device.type for p in component.parameters()} == {"cpu" if stays else "meta"}


class HostMemory(TorchDispatchMode):
    """The most bytes of host tensors that operators made, or read from a file, and that lived at the same time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.alive: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.alive[result] = result.untyped_storage().data_ptr(), result.nbytes
            self.peak = max(self.peak, sum(dict(self.alive.values()).values()))  # a storage and its views count once
        return result


def test_host_holds_one_tensor_at_a_time(tiny_flux: Path) -> None:
    largest = max(t.nbytes for t in load_file(tiny_flux / "transformer" / WEIGHTS).values())
    with HostMemory() as memory:
        module = stream_module(FluxTransformer2DModel, tiny_flux / "transformer", "meta", torch.bfloat16)
    assert sum(p.nbytes for p in module.parameters()) > 10 * largest
    assert 0 < memory.peak < 2 * largest  # as it is in the file, and cast to half of that


def test_no_progress_is_shown_without_a_terminal(tiny_flux: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stream_module(FluxTransformer2DModel, tiny_flux / "transformer", "cpu", torch.float32)
    assert capfd.readouterr() == ("", "")
