import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.conversion import convert
from models.elastic.router import RouterStack
from models.errors import InvalidRequest, WeightsError
from models.families import FAMILIES
from models.families.entry import DIFFUSERS, Converter, FamilyEntry, Reference
from models.rules.router import OFFICIAL
from models.weights import read_curve
from service.cli import main


def half_finished(source: Path, base: Path, out: Path, routers: Path, max_shard_bytes: int) -> None:
    """A converter that fails once it has begun to write."""
    (out / "weights").write_text("half")
    (routers / "weights").write_text("half")
    raise WeightsError("there is no more")


@pytest.fixture(autouse=True)
def _broken_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another family, whose converter fails."""
    module = ModuleType("broken_family")
    vars(module)["half_finished"] = half_finished
    monkeypatch.setitem(sys.modules, module.__name__, module)
    converter = Converter("broken", Reference(module.__name__, "half_finished"), needs_base=True)
    entry = FamilyEntry("broken", Reference(module.__name__, "BrokenFamily"), DIFFUSERS, (), (converter,))
    monkeypatch.setitem(FAMILIES, "broken", entry)


def run(format_name: str, root: Path) -> Path:
    return convert(format_name, root, root, root / "made" / "new", router_weights=root / "routers", max_shard_bytes=1)


def test_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no more"):
        run("broken", tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.name not in ("made", "routers")] == []


@pytest.mark.parametrize("there", ["made/new", "routers/new"])
def test_nothing_is_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).mkdir(parents=True)
    with pytest.raises(InvalidRequest, match=f"{there} is there already"):
        run("broken", tmp_path)
    assert list((tmp_path / there).iterdir()) == []


def test_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no format 'gguf'; try elastic-dit, hunyuan3d"):
        run("gguf", tmp_path)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"--format": "gguf"}, 2, "there is no format 'gguf'"),
        ({"--src": "nowhere"}, 2, "'nowhere' does not exist"),
        ({"--base": "nowhere"}, 2, "'nowhere' does not exist"),
        ({"--out": "."}, 2, "is there already"),
        ({"--base": ""}, 2, "format elastic-dit needs --base"),
        ({"--format": "hunyuan3d"}, 2, "format hunyuan3d takes no --base"),
        ({"--format": "hunyuan3d", "--base": ""}, 1, "has no config.yaml beside it"),
        ({"--max-shard-gb": "-1"}, 2, "'--max-shard-gb'"),
        ({"--format": "broken"}, 1, "there is no more"),
        ({}, 1, "model_index.json can't be read"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"--format": "elastic-dit", "--src": ".", "--base": ".", "--out": "new"} | changes
    assert main(["convert", *(word for option in options.items() if option[1] for word in option)]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert message in output.err
    assert not (tmp_path / "new").exists()


@pytest.fixture
def published(tiny_qwen_image: Path, tmp_path: Path) -> Path:
    """A checkpoint of the official layout: the tiny model's backbone, and routers that decide by the time."""
    tensors = load_file(tiny_qwen_image / "transformer" / "diffusion_pytorch_model.safetensors")
    num_blocks = len({name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")})
    torch.manual_seed(0)
    for name, tensor in RouterStack(num_blocks, len(tensors["img_in.weight"]), 16).state_dict().items():
        third = tensor[: len(tensor) // 2] if ".img_mod." in name else tensor[:0]
        tensors[name] = 0.4 * torch.randn(len(tensor) + len(third), *tensor.shape[1:])
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.slow
def test_converted_model_can_be_calibrated(
    published: Path,
    tiny_qwen_image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Given a model converted on the command line
    monkeypatch.setenv("ELASTIC_ROUTER_WEIGHTS", str(tmp_path / "routers"))
    source = ["--src", str(published), "--base", str(tiny_qwen_image)]
    assert main(["convert", "--format", "elastic-dit", *source, "--out", str(tmp_path / "e-dit")]) == 0
    folder = tmp_path / "routers" / "e-dit"
    assert capsys.readouterr() == (f"{tmp_path / 'e-dit'} and {folder} written\n", "")
    # Of small images in few steps
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["defaults"] |= {"num_inference_steps": 2, "height": 32, "width": 32}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    # When it is calibrated
    (tmp_path / "prompts.txt").write_text("a small red circle\n")
    assert (
        main(
            [
                "calibrate",
                "--model",
                str(tmp_path / "e-dit"),
                "--prompts",
                str(tmp_path / "prompts.txt"),
                "--rule",
                "router",
            ]
        )
        == 0
    )
    # Then its authors' policies were tried, and its budgets are those measured
    assert str(OFFICIAL) in capsys.readouterr().out
    curve = read_curve(folder, "ssim")
    assert len(curve) > 1
    assert {point.rule for point in curve[1:]} == {"router"}
