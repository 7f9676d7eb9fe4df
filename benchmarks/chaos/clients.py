"""How clients ask for jobs and learn of their ends. Calls that break off are made again, to any server that answers."""

import base64
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2

from benchmarks.chaos.cluster import Cluster, Stuck
from benchmarks.chaos.tasks import Kind, Task
from benchmarks.chaos.webhooks import WebhookHost
from service.jobs.job import JobStatus

PATIENCE_S = 900.0
"""How long a client waits for the end of a job, over all its calls."""
_POLL_S = 0.5
_WAIT_S = 300.0
_TRY_AGAIN = ("draining", "store_unavailable", "overloaded")


class Gone(Exception):
    """No server knows the job."""


class Unexpected(Exception):
    """An answer that no fault explains."""


@dataclass
class Outcome:
    """How a job went. `status` is that of the job; "refused", if its deadline was; "gone", "stuck" or "unexpected"."""

    task: Task
    began: float = field(default_factory=time.monotonic)
    status: str = ""
    job_id: str = ""
    message: str = ""
    files: tuple[bytes, ...] = ()


class Client:
    """One job's client."""

    def __init__(self, cluster: Cluster, webhooks: WebhookHost, task: Task) -> None:
        self._cluster = cluster
        self._task = task
        self._headers = {"Idempotency-Key": f"chaos-{task.number}"}
        self._body = dict(task.body)
        if task.webhook is not None:
            self._body["webhook_url"] = webhooks.url(task.webhook, task.number)
        self.outcome = Outcome(task)
        self._until = self.outcome.began + PATIENCE_S

    def run(self) -> Outcome:
        """Ask for the job, and see it through."""
        ways: Mapping[Kind, Callable[[], None]] = {
            Kind.STREAMED: self._stream,
            Kind.AWAITED: self._wait,
            Kind.PREVIEWED: self._submit_and_follow,
            Kind.CANCELLED: self._submit_and_cancel,
        }
        try:
            ways.get(self._task.kind, self._submit_and_poll)()
        except (Gone, Stuck, Unexpected) as error:
            self.outcome.status = type(error).__name__.lower()
            self.outcome.message = str(error)
        return self.outcome

    def _call(self, method: str, path: str, **options: Any) -> httpx2.Response:
        return self._cluster.call(method, path, until=self._until, **options)

    def _submit(self) -> bool:
        """False if the job was refused because of its deadline."""
        headers = {**self._headers, "Prefer": "respond-async"}
        response = self._call("POST", self._task.path, json=self._body, headers=headers)
        if self._task.kind is Kind.DEADLINE and response.status_code == 422:
            self.outcome.status, self.outcome.message = "refused", response.text
            return False
        self.outcome.job_id = str(_json(response, 202)["id"])
        return True

    def _submit_and_poll(self) -> None:
        if self._submit():
            self._poll()

    def _submit_and_cancel(self) -> None:
        self._submit()
        time.sleep(self._task.cancel_after_s)
        _json(self._call("DELETE", f"/v1/jobs/{self.outcome.job_id}"), 200)
        self._poll()

    def _submit_and_follow(self) -> None:
        self._submit()
        last: str | None = None
        while True:
            headers = {} if last is None else {"Last-Event-ID": last}
            for name, event_id, data in self._events("GET", f"/v1/jobs/{self.outcome.job_id}/events", headers=headers):
                last = event_id or last
                if self._is_end(name, data):
                    return
            job = self._job()
            if JobStatus(job["status"]).is_terminal:  # its end came between two connections
                self._end(job)
                return

    def _stream(self) -> None:
        while True:
            for name, _, data in self._events("POST", self._task.path, json=self._body, headers=self._headers):
                if self._is_end(name, data):
                    return

    def _wait(self) -> None:
        response = self._call("POST", self._task.path, json=self._body, headers=self._headers, timeout=_WAIT_S)
        self.outcome.job_id = response.headers.get("X-Job-ID", "")
        if response.status_code == 500 and self.outcome.job_id:
            self._poll()
            return
        self._succeed(_json(response, 200)["data"])

    def _poll(self) -> None:
        while not JobStatus((job := self._job())["status"]).is_terminal:
            time.sleep(_POLL_S)
        self._end(job)

    def _job(self) -> dict[str, Any]:
        return _json(self._call("GET", f"/v1/jobs/{self.outcome.job_id}"), 200)

    def _end(self, job: Mapping[str, Any]) -> None:
        outcome = self.outcome
        outcome.status = job["status"]
        outcome.message = (job.get("error") or {}).get("message", "").replace(outcome.job_id, "…")
        if outcome.status == JobStatus.SUCCEEDED:
            path = f"/v1/jobs/{outcome.job_id}/content"
            contents = [self._call("GET", path, params={"index": n}) for n in range(self._task.num_files)]
            outcome.files = tuple(_expect(response, 200).content for response in contents)

    def _succeed(self, files: Iterable[Mapping[str, Any]]) -> None:
        self.outcome.status = JobStatus.SUCCEEDED
        self.outcome.files = tuple(base64.b64decode(file["b64_json"]) for file in files)

    def _is_end(self, name: str, data: Mapping[str, Any]) -> bool:
        """Whether an event is the job's last one. Raises Gone if no server knows the job."""
        if name.endswith(".completed") and "data" in data:
            self._succeed(data["data"])
            return True
        if name != "error" or data["error"]["code"] in _TRY_AGAIN:
            return False
        if data["error"]["code"] == "job_not_found":
            raise Gone(data["error"]["message"])
        self._end(self._job())
        return True

    def _events(self, method: str, path: str, **options: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Name, id and data of the events of one connection, until they end or the connection breaks."""
        if time.monotonic() > self._until:
            raise Stuck(f"{method} {path} brought no end")
        server = next(iter(self._cluster.servers()), None)
        if server is None:
            time.sleep(_POLL_S)
            return
        with (
            suppress(httpx2.TransportError, httpx2.StreamError),
            self._cluster.http.stream(method, server.process.url + path, **options) as response,
        ):
            if response.status_code == 503:
                time.sleep(_POLL_S)
                return
            if response.status_code == 204:  # nothing follows
                return
            if response.status_code != 200:
                response.read()
            _expect(response, 200)
            self.outcome.job_id = response.headers["X-Job-ID"]
            yield from events_of(response.iter_lines())


def events_of(lines: Iterable[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, id and data of server-sent events. An event that breaks off is left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line and "event" in fields:
            yield fields["event"], fields.get("id", ""), json.loads(fields["data"])
        if not line:
            fields = {}
            continue
        name, _, value = line.partition(": ")
        fields[name] = value


def _json(response: httpx2.Response, status: int) -> dict[str, Any]:
    body: dict[str, Any] = _expect(response, status).json()
    return body


def _expect(response: httpx2.Response, status: int) -> httpx2.Response:
    """Raises Gone for a job that no server knows, Unexpected for other answers than `status`."""
    if response.status_code == 404 and response.json()["error"]["code"] == "job_not_found":
        raise Gone(response.text)
    if response.status_code != status:
        raise Unexpected(
            f"{response.request.method} {response.request.url.path}: {response.status_code} {response.text[:300]}"
        )
    return response
