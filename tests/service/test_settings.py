from pathlib import Path

import pytest
from pydantic import ValidationError

from service.budget import BudgetBody
from service.settings import Settings, load_settings


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text('port = 1\ngrace_s = 7\nmodels = ["a", "b"]\n[default_budget]\npreset = "fast"\n')
    return path


def test_file_is_under_environment_is_under_options(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(toml).port == 1
    monkeypatch.setenv("ELASTIC_PORT", "2")
    assert load_settings(toml).port == 2
    assert load_settings(toml, port=3, host=None).port == 3
    assert load_settings(toml).grace_s == 7


def test_environment_names_the_file(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_CONFIG", str(toml))
    settings = load_settings()
    assert settings.models == (Path("a"), Path("b"))
    assert settings.default_budget == BudgetBody.model_validate({"preset": "fast"})


def test_environment_has_lists_and_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_MODELS", "checkpoints/a, checkpoints/b")
    monkeypatch.setenv("ELASTIC_DEFAULT_BUDGET", '{"compute_ratio": 0.5}')
    settings = load_settings()
    assert settings.models == (Path("checkpoints/a"), Path("checkpoints/b"))
    assert settings.default_budget.compute_ratio == 0.5


def test_mistakes_are_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        load_settings(tmp_path / "nowhere.toml")
    unknown = tmp_path / "unknown.toml"
    unknown.write_text("prot = 1\n")
    with pytest.raises(ValidationError, match="prot"):
        load_settings(unknown)
    monkeypatch.setenv("ELASTIC_GRACE_S", "inf")
    with pytest.raises(ValidationError, match="grace_s"):
        load_settings()


def test_default_models_are_one_of_each_family_flux_first() -> None:
    names = ("tiny-flux", "tiny-qwen-image", "tiny-hunyuan3d")
    assert Settings().models == tuple(Path("checkpoints") / name for name in names)


def test_every_setting_is_documented() -> None:
    assert all(field.description for field in Settings.model_fields.values())
