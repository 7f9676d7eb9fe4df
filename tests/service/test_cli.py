import json
import re
import socket
import tomllib
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from service.cli import app, main
from service.settings import Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command."),
        (["paint"], "No such command 'paint'."),
        (["serve", "--port", "http"], "Invalid value for '--port': Input should be a valid integer"),
        (["serve", "--port", "-1"], "port -1 is below 0; try 0"),
        (["serve", "--config", "nowhere.toml"], "there is no settings file nowhere.toml"),
        (["generate"], "Missing option '--prompt'."),
        (["generate", "--prompt", "a", "--out", "a.gif"], "--out a.gif must end in .png, .webp, .jpeg"),
        (["generate", "--prompt", "a", "--model", "nothing"], "there is no model directory 'nothing'"),
        (["serve", "--models", "nothing"], "there is no model directory 'nothing'"),
        (["generate", "--prompt", "a", "--out", "no/a.png"], "--out no/a.png: there is no folder no; create it"),
        (["generate", "--prompt", "a", "--receipt", "no/a.json"], "--receipt no/a.json: there is no folder no"),
        (["mesh", "--image", "a.png", "--out", "no/a.glb"], "--out no/a.glb: there is no folder no; create it"),
        (["mesh", "--image", "a.png", "--receipt", "no/a.json"], "--receipt no/a.json: there is no folder no"),
        (["generate", "--prompt", "", "--model", "."], "prompt is empty"),
        (["serve", "--no-worker"], "a server without a worker needs redis_url, such as redis://localhost:6379/0"),
        (["worker", "--devices", "cpu,cpu"], "a worker shares a queue with servers: set ELASTIC_REDIS_URL"),
        (["generate", "--prompt", "a", "--model", ".", "--budget", "quick"], "budget.preset 'quick' is not one of"),
        (["generate", "--prompt", "a", "--model", ".", "--budget", "quality=2"], "budget.quality 2.0 is above 1"),
        (["generate", "--prompt", "a", "--model", ".", "--budget", "speed=2"], "unknown field budget.speed"),
        (
            ["generate", "--prompt", "a", "--model", ".", "--seed", "-1"],
            "seed -1 is below 0; leave seed out for a random one",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert message in output.err


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_directory_that_is_no_model_is_one_line_and_exit_code_1(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"serve": ["--models", str(tmp_path)], "generate": ["--prompt", "a", "--model", str(tmp_path)]}
    assert main([command, *arguments[command]]) == 1
    assert "is no model directory" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"port = \n", b"\xff", b"port = " + b"[" * 5000])
def test_broken_settings_file_is_one_line(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_bytes(content)
    assert main(["serve", "--config", str(broken)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("REDIS_URL", "http://localhost:6379", "redis_url: Redis URL must specify one of the following schemes"),
        ("REDIS_URL", "", "redis_url: Redis URL must specify"),
        ("REDIS_URL", "redis://localhost:99999/0", "redis_url: Port out of range"),
        ("REDIS_URL", "redis://localhost/0?colour=red", "redis_url: "),
        ("RESULTS_URL", "paper://shelf", "results_url: Protocol not known: paper"),
        ("DEFAULT_BUDGET", "{", "default_budget"),
        ("API_KEYS", "[" * 50_000, "api_keys is not JSON"),
        ("OFFLOAD", "layers", "elastic-dit: offload 'layers' needs a GPU, but device is 'cpu'; leave offload out\n"),
        ("LORAS", "style", "elastic-dit: loras has 'style', which is not name=file\n"),
        ("DEVICE_MEMORY", "10Zork", "device_memory '10Zork' is no number of bytes, such as 24GiB\n"),
        ("DEVICE_MEMORY", "-1", "device_memory '-1' is no number of bytes, such as 24GiB\n"),
    ],
)
def test_broken_variable_is_one_line_and_exit_code_2(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"ELASTIC_{name}", value)
    assert main(["serve", "--models", "tiny-flux", "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_port_in_use_is_told_before_models_are_loaded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--models", str(tmp_path), "--port", str(port)]) == 2  # which is no model directory
    error = capsys.readouterr().err
    assert f"can't listen on 127.0.0.1 port {port}: Address already in use" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["serve", "worker"])
def test_options_show_the_description_and_default_of_their_setting(command: str) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    shown = {parameter.name: getattr(parameter, "help", "") for parameter in group.commands[command].params}
    own = {"serve": {"worker"}, "worker": {"devices"}}[command]
    assert set(shown) == {"host", "port", "models", "device", "config", *own}
    for name in set(shown) - {"config", "devices"}:
        field = Settings.model_fields[name]
        assert field.description
        assert field.description in shown[name]
    assert shown["models"].endswith("[default: tiny-flux,tiny-qwen-image,tiny-hunyuan3d]")
    assert shown["port"].endswith("[default: 8000]")


def test_serve_finds_models_by_name_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server would not end, so the models are followed by a mistake that is found after them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ELASTIC_API_KEYS", "broken")
    assert main(["serve", "--models", "tiny-flux,tiny-hunyuan3d"]) == 2
    error = capsys.readouterr().err
    assert "model" not in error
    assert "api_keys" in error.lower()


@pytest.mark.slow
def test_image_made_in_another_folder_uses_the_routers_and_prints_no_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--prompt", "a red circle", "--seed", "1", "--budget", "fast", "--receipt", "receipt.json"]
    assert main(["generate", *arguments]) == 0
    assert json.loads((tmp_path / "receipt.json").read_text())["compute_ratio"] < 1
    assert (tmp_path / "image.png").is_file()
    output = capfd.readouterr()
    assert re.fullmatch(r"image\.png: \d+% of the dense compute, \d+\.\d+ s\n", output.out)
    assert [line for line in output.err.splitlines() if line and "denoising" not in line] == []


@pytest.mark.slow
def test_picture_is_edited_where_its_mask_is_white(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, mask, out = tmp_path / "picture.png", tmp_path / "mask.png", tmp_path / "out.png"
    Image.new("RGB", (64, 64), "navy").save(picture)
    left = Image.new("L", (64, 64), 0)
    left.paste(255, (0, 0, 32, 64))
    left.save(mask)
    arguments = ["generate", "--prompt", "a red circle", "--image", str(picture), "--out", str(out), "--steps", "2"]
    assert main([*arguments, "--mask", str(mask)]) == 0
    made = np.asarray(Image.open(out))
    assert made.shape == (64, 64, 3)
    assert (made[:, 32:] == (0, 0, 128)).all()
    assert (made[:, :32] != (0, 0, 128)).any()
    assert main([*arguments, "--background", "transparent"]) == 0
    with Image.open(out) as image:
        assert image.mode == "RGBA"
    assert main([*arguments, "--image", str(mask)]) == 2
    assert "image has 2 pictures; tiny-flux edits at most 1 picture" in capsys.readouterr().err
    picture.write_text("no picture")
    assert main(arguments) == 1
    assert f"{picture} is not a readable image" in capsys.readouterr().err


def test_unknown_background_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "a", "--background", "clear"]) == 2
    assert "background 'clear' is not one of" in capsys.readouterr().err


def test_mask_and_strength_need_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "a", "--strength", "0.5"]) == 2
    assert "--mask and --strength need --image" in capsys.readouterr().err


def test_new_key_prints_the_key_and_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-key", "--id", "ci", "--scope", "generate", "--scope", "metrics"]) == 0
    output = capsys.readouterr().out
    entry = tomllib.loads(output[output.index("[[keys]]") :])["keys"][0]
    (secret,) = re.findall(r"^elastic_\S+$", output, re.MULTILINE)
    assert entry == {"id": "ci", "sha256": sha256(secret.encode()).hexdigest(), "scopes": ["generate", "metrics"]}


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert "serve" in output
    assert "generate" in output


def test_calibrate_names_the_image_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert main(["calibrate", "--images", str(tmp_path)]) == 2
    assert "notes.txt: input_image is not a readable image" in capsys.readouterr().err
