from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.load_options import LoadOptions, Lora, Offload, Weights
from service.budget import BudgetBody
from service.cli import main
from service.errors import BadConfiguration
from service.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    "text", ["gpt-*=tiny-flux, dall-e-*=tiny-qwen-image", '{"gpt-*": "tiny-flux", "dall-e-*": "tiny-qwen-image"}']
)
def test_aliases_are_pairs_or_json(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"gpt-*": "tiny-flux", "dall-e-*": "tiny-qwen-image"}
    monkeypatch.setenv("ELASTIC_MODEL_ALIASES", text)
    assert load_settings().model_aliases == expected
    monkeypatch.delenv("ELASTIC_MODEL_ALIASES")
    assert load_settings().model_aliases == {}
    table = tmp_path / "aliases.toml"
    table.write_text('[model_aliases]\n"gpt-*" = "tiny-flux"\n"dall-e-*" = "tiny-qwen-image"\n')
    assert load_settings(table).model_aliases == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt-*=tiny-Flux", "model_aliases gpt-*=tiny-Flux names none of the models: tiny-flux, tiny-qwen-image"),
        ("gpt-*", "model_aliases has 'gpt-*', which is not pattern=model"),
        ('{"gpt-*": 5}', "valid string"),
        ('{"gpt-*"', "delimiter"),
    ],
)
def test_alias_of_no_model_stops_the_start(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ELASTIC_MODEL_ALIASES", text)
    assert main(["serve"]) == 2
    assert message in capsys.readouterr().err


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
    assert Settings().models == tuple(Path(name) for name in names)


def test_defaults_are_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    for directory in settings.model_directories:
        assert directory == ROOT / "checkpoints" / directory.name
        assert (settings.router_weights / directory.name / "manifest.json").is_file()


def test_relative_paths_are_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-flux").mkdir()
    (tmp_path / "models" / "mine").mkdir(parents=True)
    settings = Settings.model_validate({"models": "tiny-flux, models/mine", "router_weights": "routers"})
    assert [path.resolve() for path in settings.model_directories] == [tmp_path / "tiny-flux", tmp_path / "models/mine"]
    assert settings.router_weights.resolve() == tmp_path / "routers"


def test_environment_may_name_a_model_among_the_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_MODELS", "tiny-hunyuan3d,checkpoints/tiny-flux")
    monkeypatch.chdir(ROOT)
    names = [path.resolve() for path in load_settings().model_directories]
    assert names == [ROOT / "checkpoints" / "tiny-hunyuan3d", ROOT / "checkpoints" / "tiny-flux"]


def test_missing_model_is_named_with_the_places_where_it_was_looked_for() -> None:
    with pytest.raises(BadConfiguration, match=r"no model directory 'nothing' or '.*checkpoints/nothing'"):
        _ = Settings(models=(Path("nothing"),)).model_directories


def test_models_with_adapters_are_found_by_their_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = tmp_path / "an@odd place"
    at.mkdir()
    for name in ("style.safetensors", "detail.safetensors"):
        (at / name).touch()
    monkeypatch.setenv("ELASTIC_LORAS", f"style={at}/style.safetensors, detail={at}/detail.safetensors@-0.5")
    monkeypatch.setenv("ELASTIC_MODELS", "tiny-flux,tiny-flux+style+detail")
    settings = load_settings()
    assert settings.load_options.loras == {
        "style": Lora(at / "style.safetensors"),
        "detail": Lora(at / "detail.safetensors", -0.5),
    }
    flux = ROOT / "checkpoints" / "tiny-flux"
    assert settings.model_directories == (flux, flux.with_name("tiny-flux+style+detail"))
    base, loras = settings.load_options.source(settings.model_directories[1])
    assert (base, [*loras]) == (flux, ["style", "detail"])


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ("style", "loras has 'style', which is not name=file"),
        ("style=/nowhere.safetensors", r"loras style: there is no file '/nowhere\.safetensors'"),
        ("my style=/dev/null", "loras has the name 'my style'; names may have letters"),
    ],
)
def test_adapters_that_can_not_be_are_refused(loras: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings.model_validate({"loras": loras})


def test_unknown_adapter_of_a_model_is_named() -> None:
    with pytest.raises(BadConfiguration, match=r"'tiny-flux.stile' names no adapter 'stile'; loras has: none"):
        _ = Settings(models=(Path("tiny-flux+stile"),)).model_directories


def test_every_setting_is_documented() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_layers_are_offloaded_from_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_OFFLOAD", "layers")
    monkeypatch.setenv("ELASTIC_WEIGHTS", "float8")
    assert load_settings(device="cuda:1").load_options == LoadOptions(Offload.LAYERS, Weights.FLOAT8)
    with pytest.raises(ValidationError, match=r"offload 'layers' .* but device is 'cpu'; leave offload out"):
        load_settings()


@pytest.mark.parametrize("name", ["offload", "weights"])
def test_unknown_options_of_loading_are_refused_with_those_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ELASTIC_{name.upper()}", "int4")
    known = {"offload": "'none', 'text_encoders' or 'layers'", "weights": "'auto', 'float32', 'bfloat16' or 'float8'"}
    with pytest.raises(ValidationError, match=f"Input should be {known[name]}"):
        load_settings()


def test_api_node_needs_redis_and_none_of_the_workers_files() -> None:
    with pytest.raises(ValidationError, match="needs redis_url"):
        load_settings(worker=False)
    there: dict[str, Any] = {"redis_url": "redis://localhost:6379/0", "worker": False}
    settings = load_settings(model_aliases="gpt-*=far", loras="style=/far/style.safetensors", **there)
    assert (settings.wanted_models, settings.model_aliases) == ((), {"gpt-*": "far"})
    assert load_settings(models="/srv/flux, qwen", **there).wanted_models == ("flux", "qwen")
