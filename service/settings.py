"""Everything an operator can set: environment variables `ELASTIC_…`, a TOML file, the command line's options.

The command line goes before the environment, the environment before the file, the file before the defaults.
"""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from service.api.budget import BudgetBody
from service.logging import LogLevel


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="ELASTIC_", extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = Field(default="127.0.0.1", description="The address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="The port to listen on; 0 takes a free one.")
    public_url: str | None = Field(
        default=None, description="What clients call this server, for links; by default what their request says."
    )
    models: Annotated[tuple[Path, ...], NoDecode] = Field(
        default=(
            Path("checkpoints/tiny-flux"),
            Path("checkpoints/tiny-qwen-image"),
            Path("checkpoints/tiny-hunyuan3d"),
        ),
        min_length=1,
        description="Model directories, separated by commas in the environment. The first image model and the first "
        "mesh model are the default ones.",
    )
    router_weights: Path = Field(default=Path("router_weights"), description="The folder of routers and calibrations.")
    device: str = Field(default="cpu", description="Where the models run, in torch's words: cpu, cuda, cuda:1.")
    offload_text_encoders: bool = Field(
        default=False,
        description="Keep text encoders on the CPU, where prompts are then encoded: memory of the device for time.",
    )
    default_budget: BudgetBody = Field(
        default=BudgetBody(quality=0.9),
        description="The budget of requests that name none, as JSON in the environment.",
    )
    max_batch_size: int = Field(
        default=8, ge=1, description="Pictures or meshes that share a denoise step, if the model allows as many."
    )
    max_running: int = Field(
        default=16, ge=1, description="Pictures and meshes in memory at once, over all models and sizes."
    )
    max_backlog_s: float = Field(
        default=120.0,
        gt=0,
        description="Predicted seconds of accepted work above which a request is answered 503 overloaded.",
    )
    grace_s: float = Field(default=30.0, ge=0, description="How long accepted requests may take to finish at shutdown.")
    max_body_bytes: int = Field(default=1_000_000, ge=1, description="The longest request body.")
    max_mesh_body_bytes: int = Field(
        default=32_000_000, ge=1, description="The longest body of POST /v1/meshes, which holds a picture."
    )
    max_image_pixels: int = Field(
        default=25_000_000, ge=1, description="The largest picture to make a mesh of; checked before it is decoded."
    )
    result_ttl_s: float = Field(default=3600.0, gt=0, description="How long finished results can be fetched.")
    max_result_bytes: int = Field(
        default=512_000_000, ge=1, description="Finished results in memory; the oldest go first."
    )
    job_ttl_s: float = Field(default=86400.0, gt=0, description="How long the record of an ended job can be read.")
    log_level: LogLevel = Field(default=LogLevel.INFO, description="DEBUG, INFO, WARNING or ERROR.")

    @field_validator("models", mode="before")
    @classmethod
    def _split_models(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load_settings(config: Path | None = None, **options: Any) -> Settings:
    """The settings, from `config` or the file that `ELASTIC_CONFIG` names, under the environment and the `options`.

    Options that are None are not set. Raises FileNotFoundError, tomllib.TOMLDecodeError and pydantic.ValidationError.
    """
    named = os.environ.get("ELASTIC_CONFIG")
    path = config or (Path(named) if named else None)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"there is no settings file {path}")

    class SettingsWithFile(Settings):
        model_config = SettingsConfigDict(toml_file=path)

    return SettingsWithFile(**{name: value for name, value in options.items() if value is not None})
