"""All settings, as environment variables `ELASTIC_…` or in a TOML file; some are options of the command line too.

Options take precedence over the environment, the environment over the file, and the file over the defaults.
"""

import os
import re
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import ByteSize, Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from models.load_options import LoadOptions, Lora, Offload, Weights
from service.budget import BudgetBody
from service.errors import BadConfiguration
from service.installation import INSTALLATION, find_model, shipped_remover
from service.logging import LogFormat, LogLevel
from service.rate_limits import parse_rate_limit
from service.setting_texts import Pairs, SeveralOf, refusal

# Escapes in its path would have to be compared with those of requests.
_PUBLIC_URL = re.compile(r"https?://[^\s/?#@]+(/[\w.~-]+)*/?", re.ASCII)


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="ELASTIC_", extra="forbid", frozen=True, allow_inf_nan=False)

    host: str = Field(default="127.0.0.1", description="The address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="The port to listen on; 0 takes a free one.")
    worker: bool = Field(
        default=True,
        description="Whether this server runs jobs itself. Else it is an API node, which loads no models: it needs "
        "redis_url, and serves the models of the workers there.",
    )
    public_url: str | None = Field(
        default=None,
        description="This server's address as clients see it, for links, such as https://example.org/images; by "
        "default each request's own address. If it has a path, a proxy may remove it from requests or pass it on.",
    )
    models: SeveralOf[Path] = Field(
        default=(Path("tiny-flux"), Path("tiny-qwen-image"), Path("tiny-hunyuan3d")),
        min_length=1,
        description="Model directories, or names in checkpoints/, separated by commas. The first image model and the "
        "first mesh model are the defaults. An API node expects workers to have them; by default it expects none.",
    )
    model_aliases: Pairs = Field(
        default_factory=dict,
        description="Other names of models, as pattern=model separated by commas, or as JSON: "
        "gpt-image-*=tiny-flux,dall-e-*=tiny-flux serves clients that ask for OpenAI's models. The first pattern that "
        "fits counts; a model's own name comes before all patterns. None by default.",
    )
    loras: Pairs = Field(
        default_factory=dict,
        description="Low-rank adapters (LoRA) for image models, as name=file separated by commas, or as JSON; file@0.8 "
        "adds one at a scale of 0.8. The entry flux-dev+style in models then is flux-dev with the adapter style in its "
        "weights. None by default.",
    )
    router_weights: Path = Field(
        default=INSTALLATION / "router_weights",
        description="The folder of routers and calibrations, with a folder for each model; by default router_weights/ "
        "beside checkpoints/.",
    )
    background_remover: Path | None = Field(
        default_factory=shipped_remover,
        description="The folder of the network that cuts objects out of backgrounds which are not plain; by default "
        "checkpoints/u2netp, if it is there. Without it, images can't be transparent, and input images need a plain "
        "background or transparency.",
    )
    device: str = Field(
        default="cpu",
        description="Where the models run: cpu, cuda, cuda:1. One that is not there is refused at the start.",
    )
    weights: Weights = Field(
        default=Weights.AUTO,
        description="How weights are stored: auto (float32 with the device cpu, else bfloat16), float32, bfloat16, or "
        "float8, which halves the memory of transformers and text encoders against bfloat16, and computes as auto.",
    )
    offload: Offload = Field(
        default=Offload.NONE,
        description="What stays on the CPU, to save memory of a GPU: none; text_encoders, which slows prompts down; or "
        "layers, which also brings each block of a transformer to the GPU only to run.",
    )
    offload_text_encoders: bool = Field(
        default=False, description="Means offload text_encoders, as in earlier versions."
    )
    prompt_cache_bytes: int = Field(
        default=256_000_000,
        ge=0,
        description="The most bytes of embedded prompts to keep in the host's memory, so that a repeated prompt is "
        "not encoded again. Those used last are kept; 0 keeps only each model's empty prompt.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the blocks of all models before the server is ready, to make steps faster. The first "
        "start takes some minutes longer. Results differ from those of the publishers' pipelines by rounding. Needs a "
        "C++ compiler, and Triton on GPUs. Can't be combined with offload layers or weights float8.",
    )
    device_memory: ByteSize | None = Field(
        default=None,
        gt=0,
        description="The most memory of the device to use for weights and requests together, such as 24GiB. By "
        "default all memory of a GPU, and no limit on a CPU. Requests wait for room; what could never fit is refused.",
    )
    default_budget: BudgetBody = Field(
        default=BudgetBody(quality=0.9),
        description="The budget of requests without one, as JSON in the environment.",
    )
    default_response_format: Literal["b64_json", "url"] = Field(
        default="b64_json",
        description="How answers hold results if the request does not say: b64_json or url. Events hold b64_json.",
    )
    max_batch_size: int = Field(
        default=8, ge=1, description="The most images or meshes in one denoise step; a model may allow fewer."
    )
    max_running: int = Field(
        default=16, ge=1, description="The most images and meshes in memory at once, over all models and sizes."
    )
    max_decode_bytes: int = Field(
        default=4_000_000_000,
        ge=1,
        description="The most bytes, as predicted, of the grids of meshes that are decoded at once; a larger mesh is "
        "decoded alone. A grid of 512 cells a side is predicted to take 0.8 GB.",
    )
    max_backlog_s: float = Field(
        default=120.0,
        gt=0,
        description="New requests are refused (503 overloaded) above these predicted seconds of work for each worker.",
    )
    target_backlog_s: float = Field(
        default=30.0,
        gt=0,
        description="The metric elastic_wanted_workers says how many workers finish the backlog in these seconds.",
    )
    grace_s: float = Field(default=30.0, ge=0, description="Seconds that accepted requests have to finish at shutdown.")
    max_body_bytes: int = Field(
        default=100_000,
        ge=1,
        description="The largest request body, apart from its input images. A larger one blocks the server for longer.",
    )
    max_mesh_body_bytes: int = Field(
        default=32_000_000,
        ge=1,
        description="The largest body of POST /v1/meshes, its image included.",
    )
    max_edit_body_bytes: int = Field(
        default=64_000_000,
        ge=1,
        description="The largest body of POST /v1/images/edits, its images included.",
    )
    max_held_body_bytes: int = Field(
        default=512_000_000,
        ge=1,
        description="The most bytes of bodies of unanswered requests together; more are refused (503 overloaded).",
    )
    max_image_pixels: int = Field(
        default=25_000_000, ge=1, description="The largest input image, in pixels; checked before it is decoded."
    )
    redis_url: str | None = Field(
        default=None,
        description="The Redis that keeps the jobs, such as redis://localhost:6379/0; by default, memory does.",
    )
    lease_s: float = Field(
        default=15.0, gt=0, description="Seconds after which the job of a silent worker goes back to the queue."
    )
    max_attempts: int = Field(default=3, ge=1, description="How many workers may crash on a job before it fails.")
    results_url: str | None = Field(
        default=None,
        description="Where finished results are kept, as an fsspec URL such as file:///srv/results or "
        "s3://bucket/results; by default with the jobs, in Redis or in memory.",
    )
    result_ttl_s: float = Field(default=3600.0, gt=0, description="Seconds for which finished results are kept.")
    max_result_bytes: int = Field(
        default=512_000_000,
        ge=1,
        description="The most bytes of finished results to keep; the oldest are dropped first.",
    )
    job_ttl_s: float = Field(default=86400.0, gt=0, description="Seconds for which the record of an ended job is kept.")
    max_input_image_bytes: int = Field(
        default=256_000_000,
        ge=1,
        description="The most bytes of input images of queued and running jobs together; above it, requests with an "
        "image are refused (503 overloaded).",
    )
    max_trace_decisions: int = Field(
        default=20_000,
        ge=1,
        description="The most decisions in a trace: images, times steps, guidance branches and blocks.",
    )
    webhook_hosts: SeveralOf[str] = Field(
        default=(),
        description="Hosts that a job's webhook_url may name, with any unusual port, separated by commas; none by "
        "default.",
    )
    webhook_secret: SecretStr | None = Field(
        default=None, description="The secret that signs webhook calls: whsec_ and base64 of at least 24 bytes."
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="A file of API keys, JSON if it ends in .json and else TOML; 'elastic-dit new-key' prints entries. "
        "Without keys, everybody may do everything.",
    )
    api_keys: str | None = Field(
        default=None, description="API keys as JSON: a list of entries like those in the file."
    )
    link_secret: SecretStr | None = Field(
        default=None,
        min_length=32,
        description="The secret, of at least 32 characters, that signs links to results and events, so that a browser "
        "opens them without an API key. The same at all servers of a Redis. Without it such links need a key.",
    )
    link_ttl_s: float = Field(
        default=3600.0, gt=0, le=1e9, description="Seconds for which a signed link opens what it leads to."
    )
    rate_limit: str | None = Field(
        default=None,
        description="How many generation calls one key may make, such as 60/minute; without keys, one address. No "
        "limit by default. A key's entry may have its own limit.",
    )
    body_timeout_s: float = Field(default=30.0, gt=0, description="Seconds in which a request's body must arrive.")
    max_connections: int = Field(
        default=512,
        ge=1,
        description="The most connections at once. A new one takes the place of one that waits for a request, or is "
        "refused. The process needs some hundred file descriptors more (ulimit -n).",
    )
    header_timeout_s: float = Field(default=10.0, gt=0, description="Seconds in which a request's headers must arrive.")
    send_timeout_s: float = Field(
        default=120.0, gt=0, description="Seconds after which a client that reads nothing of its answer is dropped."
    )
    cors_origins: SeveralOf[str] = Field(
        default=(),
        description="Origins whose pages may call this server, such as https://images.example, separated by commas; * "
        "allows all, none by default.",
    )
    allowed_hosts: SeveralOf[str] = Field(
        default=(),
        description="Names under which clients reach this server, besides localhost, separated by commas; * allows "
        "all. By default, a server with API keys allows all, and one without keys the names that no web page can have.",
    )
    trusted_proxies: SeveralOf[str] = Field(
        default=(),
        description="Addresses or networks of proxies, such as 10.0.0.0/8, separated by commas. Their X-Forwarded-For "
        "and X-Forwarded-Proto are believed; by default, nobody's are.",
    )
    log_level: LogLevel = Field(default=LogLevel.INFO, description="DEBUG, INFO, WARNING or ERROR.")
    log_format: LogFormat = Field(default=LogFormat.TEXT, description="text, or json: one object a line.")
    otlp_endpoint: str | None = Field(
        default=None,
        pattern="^https?://",
        description="The OTLP endpoint (HTTP) for traces, such as http://localhost:4318; no traces by default. Needs "
        "the extra 'tracing'.",
    )

    @property
    def model_directories(self) -> tuple[Path, ...]:
        """The directories of `models`. Raises BadConfiguration if one does not exist."""
        return tuple(find_model(model, self.loras) for model in self.models)

    @property
    def wanted_models(self) -> tuple[str, ...]:
        """The ids of the models that an API node expects workers to have, in the order of `models`."""
        return tuple(path.name for path in self.models) if "models" in self.model_fields_set else ()

    @property
    def has_keys(self) -> bool:
        """Whether callers need an API key."""
        return self.api_keys is not None or self.api_keys_file is not None

    @property
    def path_prefix(self) -> str:
        """The path of `public_url`, empty or such as /images."""
        return urlsplit(self.public_url or "").path

    @field_validator("public_url")
    @classmethod
    def _check_public_url(cls, value: str | None) -> str | None:
        if value is not None and not _PUBLIC_URL.fullmatch(value):
            raise ValueError("must be http or https, a host and at most a path, such as https://example.org/images")
        return None if value is None else value.rstrip("/")

    @field_validator("rate_limit")
    @classmethod
    def _check_rate_limit(cls, value: str | None) -> str | None:
        if value is not None:
            parse_rate_limit(value)
        return value

    @field_validator("trusted_proxies")
    @classmethod
    def _check_networks(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            ip_network(value)
        return values

    @field_validator("loras")
    @classmethod
    def _check_loras(cls, value: Mapping[str, str], info: ValidationInfo) -> Mapping[str, str]:
        for name, place in value.items():
            if not re.fullmatch(r"[\w.-]+", name):
                raise refusal(f"loras has the name '{name}'; names may have letters, digits, '.', '_' and '-'")
            if not (lora := Lora.at(place)).file.is_file() and info.data.get("worker"):  # else it is not read
                raise refusal(f"loras {name}: there is no file '{lora.file}'")
        return value

    @field_validator("model_aliases")
    @classmethod
    def _check_aliases(cls, value: Mapping[str, str], info: ValidationInfo) -> Mapping[str, str]:
        names = [path.name for path in info.data.get("models", ())]  # a model's id is the name of its directory
        for pattern, model in value.items():
            if model not in names and info.data.get("worker"):  # else it depends on other processes
                raise refusal(f"model_aliases {pattern}={model} names none of the models: {', '.join(names)}")
        return value

    @property
    def load_options(self) -> LoadOptions:
        """The options that hold for all models."""
        offload = self.offload
        if offload is Offload.NONE and self.offload_text_encoders:
            offload = Offload.TEXT_ENCODERS
        loras = {name: Lora.at(place) for name, place in self.loras.items()}
        return LoadOptions(
            offload, self.weights, loras, self.prompt_cache_bytes, self.compile, device_memory=self.device_memory
        )

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if not self.worker and self.redis_url is None:
            raise refusal("a server without a worker needs redis_url, such as redis://localhost:6379/0, for its jobs")
        if self.compile and self.offload is Offload.LAYERS:
            raise refusal("compile can't be combined with offload 'layers'; leave one of them out")
        if self.compile and self.weights is Weights.FLOAT8:
            raise refusal("compile can't be combined with weights 'float8'; leave one of them out")
        if self.offload is Offload.LAYERS and self.device.startswith("cpu"):
            raise refusal(f"offload 'layers' needs a GPU, but device is '{self.device}'; leave offload out")
        if self.webhook_hosts and self.webhook_secret is None:
            raise refusal("webhook_hosts requires webhook_secret, which signs the calls")
        return self

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
    """The settings from `options`, the environment, and the file `config` or the one that `ELASTIC_CONFIG` names.

    Options that are None are not set. Raises BadConfiguration, FileNotFoundError, tomllib.TOMLDecodeError
    and pydantic.ValidationError.
    """
    named = os.environ.get("ELASTIC_CONFIG")
    path = config or (Path(named) if named else None)
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"there is no settings file {path}")

    class SettingsWithFile(Settings):
        model_config = SettingsConfigDict(toml_file=path)

    try:
        return SettingsWithFile(**{name: value for name, value in options.items() if value is not None})
    except (UnicodeDecodeError, RecursionError) as error:
        raise BadConfiguration(f"{path} is not TOML: {error}") from error
    except SettingsError as error:  # such as a variable that is not JSON
        raise BadConfiguration(f"{error}: {error.__cause__}") from error
