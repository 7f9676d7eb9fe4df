from pathlib import Path

import pytest

from service.cli import main


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
        (["generate", "--prompt", "", "--model", "."], "prompt is empty"),
        (["generate", "--prompt", "a", "--model", ".", "--budget", "quick"], "budget.preset 'quick' is not one of"),
        (["generate", "--prompt", "a", "--model", ".", "--budget", "quality=2"], "budget.quality 2.0 is above 1"),
        (["generate", "--prompt", "a", "--model", ".", "--budget", "speed=2"], "unknown field budget.speed"),
        (["generate", "--prompt", "a", "--model", ".", "--seed", "-1"], "seed -1 is below 0; try 0"),
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


def test_broken_settings_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("port = \n")
    assert main(["serve", "--config", str(broken)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert "serve" in output
    assert "generate" in output


def test_calibrate_names_the_picture_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    assert main(["calibrate", "--pictures", str(tmp_path)]) == 2
    assert "notes.txt: input_image is not a readable image" in capsys.readouterr().err
