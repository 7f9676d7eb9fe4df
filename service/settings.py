"""Everything an operator can set: environment variables `ELASTIC_…`, a TOML file, the command line's options.

The command line goes before the environment, the environment before the file, the file before the defaults.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from service.budget import BudgetBody
from service.logging import LogFormat, LogLevel
from service.rate_limits import parse_rate_limit


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
    redis_url: str | None = Field(
        default=None, description="Where jobs are kept, such as redis://localhost:6379/0; in memory by default."
    )
    lease_s: float = Field(
        default=15.0, gt=0, description="How long a job stays with a worker that gives no sign of life."
    )
    max_attempts: int = Field(default=3, ge=1, description="How many workers may die of a job before it fails.")
    results_url: str | None = Field(
        default=None,
        description="Where finished results are kept, as fsspec names it, such as file:///srv/results or "
        "s3://bucket/results; by default in Redis, or in memory without it.",
    )
    result_ttl_s: float = Field(default=3600.0, gt=0, description="How long finished results can be fetched.")
    max_result_bytes: int = Field(
        default=512_000_000, ge=1, description="Finished results that are kept; the oldest go first."
    )
    job_ttl_s: float = Field(default=86400.0, gt=0, description="How long the record of an ended job can be read.")
    webhook_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Hosts that jobs may name to be told of their ends, with a port where it is not the usual one, "
        "separated by commas in the environment; none by default.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None, description="What webhooks are signed with: base64 of at least 24 bytes, after whsec_."
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="A file of API keys, .json or else TOML; 'elastic-dit new-key' prints what belongs there. Without "
        "keys, everybody may do everything.",
    )
    api_keys: str | None = Field(default=None, description="API keys as JSON, a list of what the file has.")
    rate_limit: str | None = Field(
        default=None,
        description="How many pictures and meshes a key may ask for, such as 60/minute; without keys, an address. No "
        "limit by default. A key may have one of its own.",
    )
    body_timeout_s: float = Field(default=30.0, gt=0, description="How long a request's body may take to arrive.")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins whose pages may call this server, such as https://pictures.example, separated by commas "
        "in the environment; * is all of them, by default it is none.",
    )
    log_level: LogLevel = Field(default=LogLevel.INFO, description="DEBUG, INFO, WARNING or ERROR.")
    log_format: LogFormat = Field(default=LogFormat.TEXT, description="text, or json: an object a line.")
    otlp_endpoint: str | None = Field(
        default=None,
        pattern="^https?://",
        description="Where traces are sent, by OTLP over HTTP, such as http://localhost:4318; nowhere by default. "
        "Needs the packages of the extra 'tracing'.",
    )

    @field_validator("rate_limit")
    @classmethod
    def _check_rate_limit(cls, value: str | None) -> str | None:
        if value is not None:
            parse_rate_limit(value)
        return value

    @model_validator(mode="after")
    def _check_webhooks(self) -> Self:
        if self.webhook_hosts and self.webhook_secret is None:
            raise ValueError("webhook_hosts need a webhook_secret, which what they are told is signed with")
        return self

    @field_validator("models", "cors_origins", "webhook_hosts", mode="before")
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

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
