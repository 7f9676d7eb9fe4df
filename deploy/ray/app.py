"""The Ray Serve application: the API as its ingress, and for every model a deployment of workers.

`python -m deploy.ray` runs it on one machine, `serve deploy deploy/ray/cluster.yaml` on a cluster. Redis keeps the
jobs. Ray places the processes, restarts them and chooses their number. No job passes through Ray.
"""

import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from redis.exceptions import RedisError

from deploy.ray.demand import Demand
from deploy.ray.policy import BacklogPolicy
from deploy.ray.worker import LoadEngine, ModelWorker
from service.api.errors import answer_error
from service.app import build_dispatcher, create_app
from service.errors import BadConfiguration, ModelUnavailable
from service.loading import load_models
from service.logging import configure_logging
from service.settings import Settings, load_settings

logger = logging.getLogger(__name__)

AFTER_GRACE_S = 20.0
"""What a replica has after the grace period, to end its last step and to store results. Serve kills it then."""
SCALING: dict[str, Any] = {"min_replicas": 1, "max_replicas": 1, "upscale_delay_s": 5.0, "downscale_delay_s": 120.0}
"""Serve's autoscaling options where the arguments do not give them."""


class ModelArguments(BaseModel):
    """A model and its workers. `settings` are those of its workers, besides the ones that all processes share.

    `autoscaling` and `ray_actor_options` are Serve's own: min_replicas, max_replicas, …, and num_gpus, label_selector,
    resources, …. Without `ray_actor_options`, a worker takes a GPU if its device is one, else a CPU.
    """

    model_config = ConfigDict(extra="forbid")

    model: Path
    settings: dict[str, Any] = Field(default_factory=dict)
    autoscaling: dict[str, Any] = Field(default_factory=dict)
    ray_actor_options: dict[str, Any] = Field(default_factory=dict)


class Arguments(BaseModel):
    """`settings` are those of all processes; what is not in them is read from the ELASTIC_ variables of each node.

    Without `models`, each model of the setting `models` has one worker.
    """

    model_config = ConfigDict(extra="forbid")

    models: list[ModelArguments] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    num_api_replicas: int = Field(default=1, ge=1)
    api_actor_options: dict[str, Any] = Field(default_factory=dict)


@serve.ingress()
class Api:
    """A node of the API. `workers` are the deployments of the models: bound, so that they belong to the application."""

    def __init__(self, settings: dict[str, Any], *workers: object) -> None:
        self._settings = load_settings(**settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        configure_logging(self._settings.log_level, self._settings.log_format)
        dispatcher = build_dispatcher(self._settings)
        app = create_app(self._settings, dispatcher)
        assert self._settings.redis_url is not None  # an API node has one
        demand = Demand(self._settings.redis_url)

        async def note_demand(request: Request, error: ModelUnavailable) -> JSONResponse:
            """Let the policy start a worker; the client asks again. A GET of a model starts none."""
            try:
                if request.method == "POST":
                    await demand.ask([error.model] if error.model else dispatcher.fleet.absent)
            except RedisError as failure:
                logger.warning("no worker can be asked for: %s", failure)
            return await answer_error(request, error)

        app.add_exception_handler(ModelUnavailable, note_demand)  # type: ignore[arg-type]  # takes any Exception
        return app


def build(arguments: Arguments) -> Application:
    """The application. Raises BadConfiguration and pydantic.ValidationError."""
    return build_with(arguments, load_models)


def build_with(arguments: Arguments, load: LoadEngine) -> Application:
    settings = load_settings(**arguments.settings)
    if settings.redis_url is None:
        raise BadConfiguration("the processes share a queue: set ELASTIC_REDIS_URL, or redis_url among the settings")
    models = arguments.models or [ModelArguments(model=model) for model in settings.models]
    workers = [_worker(model, arguments.settings, load) for model in models]
    of_api = {**arguments.settings, "worker": False, "models": [str(model.model) for model in models]}
    deployment = serve.deployment(
        name="api",
        num_replicas=arguments.num_api_replicas,
        ray_actor_options=arguments.api_actor_options,
        max_ongoing_requests=settings.max_connections,
        logging_config={"enable_access_log": False},  # the service logs its requests itself
        **_ending(settings),
    )(Api)
    return deployment.bind(of_api, *workers)


def _worker(arguments: ModelArguments, shared: dict[str, Any], load: LoadEngine) -> Application:
    options = {**shared, **arguments.settings, "models": [str(arguments.model)]}
    settings = load_settings(**options)
    name = arguments.model.name
    policy = AutoscalingPolicy(
        policy_function=BacklogPolicy,
        policy_kwargs={"model": name, "target_s": settings.target_backlog_s, "settings": shared},
    )
    deployment = serve.deployment(
        name=f"worker-{name}",
        autoscaling_config=AutoscalingConfig(**{**SCALING, **arguments.autoscaling}, policy=policy),
        ray_actor_options=arguments.ray_actor_options or ({} if settings.device.startswith("cpu") else {"num_gpus": 1}),
        health_check_period_s=2,
        **_ending(settings),
    )(ModelWorker)
    return deployment.bind(options, load)


def _ending(settings: Settings) -> dict[str, Any]:
    return {"graceful_shutdown_timeout_s": settings.grace_s + AFTER_GRACE_S, "graceful_shutdown_wait_loop_s": 0.1}
