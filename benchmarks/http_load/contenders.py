"""The servers that are compared, each in a process of its own on one core."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import httpx2

from benchmarks.http_load.clients import use_core
from benchmarks.http_load.mix import EXACT, MODELS
from benchmarks.http_load.stock_server import StockModel
from models.budget import resolve
from models.curve import Preset
from models.engine import Engine
from models.request import PresetBudget, QualityBudget

LOCK, BATCHING, FEWER_STEPS, UNGROUPED, OURS = "lock", "batching", "fewer steps", "ungrouped", "ours"
CONTENDERS: Mapping[str, str] = {
    LOCK: "FastAPI, the stock pipelines and a lock; every budget is exact",
    BATCHING: "the same, with requests of equal size and steps in one call",
    FEWER_STEPS: "the same, with as many denoise steps as a budget of ours computes",
    UNGROUPED: "ours without scheduling: all that can share a step do, and the others take turns",
    OURS: "elastic-dit serve",
}
_START_S, _STOP_S = 240.0, 60.0
_DEFAULT_QUALITY = 0.9


class StartFailed(RuntimeError):
    """A server ended before it was ready. The message has the end of its log."""


class Server:
    """A server on a free port of 127.0.0.1. It runs on `core`, computes with one thread and logs to the file `log`."""

    def __init__(self, command: Sequence[str], log: Path, core: int, environment: Mapping[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *command, "--port", str(port)],
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdout=output,
                stderr=output,
                preexec_fn=partial(use_core, core),  # also before it starts threads
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise StartFailed(f"exit status {self._process.poll()}:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz").status_code == 200
        except httpx2.TransportError:
            return False


class Servers:
    """Starts each contender when it is first asked for, and calls `warm_up` with its address. `log` is a folder.

    Ours accept `max_backlog_s` of work.
    """

    def __init__(
        self,
        stock: Mapping[str, StockModel],
        log: Path,
        core: int,
        *,
        max_backlog_s: float,
        warm_up: Callable[[str], object],
    ) -> None:
        self._stock, self._log, self._core, self._warm_up = stock, log, core, warm_up
        self._settings = {
            "ELASTIC_MODELS": ",".join(MODELS),
            "ELASTIC_MAX_BACKLOG_S": str(max_backlog_s),
            "ELASTIC_PROMPT_CACHE_BYTES": "0",  # prompts come again here, in every round
        }
        self._running: dict[str, Server] = {}

    def is_running(self, name: str) -> bool:
        return name in self._running

    def url(self, name: str) -> str:
        if name not in self._running:
            self._running[name] = Server(*self._command(name), self._core, self._settings)
            self._running[name].wait_until_ready()
            self._warm_up(self._running[name].url)
        return self._running[name].url

    def stop(self) -> None:
        for server in self._running.values():
            server.stop()

    def _command(self, name: str) -> tuple[Sequence[str], Path]:
        log = self._log / f"{name.replace(' ', '-')}.log"
        stock = {model: asdict(self._stock[model]) for model in MODELS}
        if name != FEWER_STEPS:
            stock = {model: asdict(exact_steps(self._stock[model])) for model in MODELS}
        batching = [] if name == LOCK else ["--batching"]
        match name:
            case "ours":
                return ["service.cli", "serve"], log
            case "ungrouped":
                return ["benchmarks.http_load.ungrouped_server", "serve"], log
            case _:
                return ["benchmarks.http_load.stock_server", "--models", json.dumps(stock), *batching], log


def stock_models(engine: Engine, directories: Mapping[str, Path]) -> dict[str, StockModel]:
    """How a stock server calls the models. Its number of steps for a budget is what ours computes for it.

    Prompts are padded to the length that ours reads. Pipelines would pad to 512 tokens by default, and take several
    times as long.
    """
    models = {}
    for name, directory in directories.items():
        card = engine.cards[name]
        budgets = {str(preset): PresetBudget(preset) for preset in Preset}
        points = {budget: resolve(value, card.curve) for budget, value in budgets.items()}
        points["default"] = resolve(QualityBudget(_DEFAULT_QUALITY), card.curve)
        steps = {budget: point.num_computed_steps(card.default_num_inference_steps) for budget, point in points.items()}
        length = engine.max_sequence_length(name)
        models[name] = StockModel(str(directory), card.default_guidance_scale, length, steps)
    return models


def exact_steps(model: StockModel) -> StockModel:
    """The model with all steps for every budget."""
    return replace(model, steps=dict.fromkeys(model.steps, model.steps[EXACT]))
