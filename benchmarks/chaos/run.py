"""One run: jobs are asked for while faults befall the cluster; then everything is checked."""

import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.chaos.clients import Client, Outcome
from benchmarks.chaos.cluster import Cluster
from benchmarks.chaos.faults import Load, faults_befall
from benchmarks.chaos.tasks import IMAGE_MODEL, MESH_MODEL, Kind, Task, files_alone, random_tasks
from benchmarks.chaos.verdict import Findings, judge_job, judge_logs, judge_redis, judge_webhooks
from benchmarks.chaos.webhooks import webhook_host
from models.zoo import load_engine
from service.jobs.job import JobStatus

_NUM_CLIENTS = 8
_START_S = 300.0


def run(
    num_jobs: int,
    *,
    seed: int,
    mean_s: float,
    num_servers: int,
    num_workers: int,
    num_faults: float = math.inf,
    other: Path | None = None,
) -> Findings:
    """Ask for the jobs while faults befall the cluster, then check every job, every process and Redis.

    With `num_faults`, the jobs are spread over this many faults; else, faults come until the jobs have ended.
    `other` is a checkout of another version, which every second server and worker runs.
    """
    tasks, findings, load = random_tasks(num_jobs, seed, with_edits=other is None), Findings(), Load()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        webhooks = stack.enter_context(webhook_host())
        cluster = Cluster(
            folder, num_servers=num_servers, num_workers=num_workers, webhook_hosts=webhooks.address, other=other
        )
        stack.callback(cluster.close)
        cluster.wait_until_ready(_START_S)
        began = time.monotonic()

        def ask(task: Task) -> Outcome:
            while math.isfinite(num_faults) and load.num_announced < num_faults * task.number / num_jobs:
                time.sleep(0.05)
            load.running.add(task.number)
            try:
                return Client(cluster, webhooks, task).run()
            finally:
                load.running.discard(task.number)

        with (
            faults_befall(cluster, seed, mean_s, num_faults, findings.befell, load),
            ThreadPoolExecutor(_NUM_CLIENTS) as clients,
        ):
            outcomes = list(tqdm(clients.map(ask, tasks), total=num_jobs, desc="ended"))
        findings.seconds = time.monotonic() - began
        cluster.wait_until_ready(_START_S)
        judge_webhooks(webhooks, outcomes, cluster, findings)
        judge_redis(cluster.client(), outcomes, max(cluster.emptied_at, default=-math.inf), findings)
        cluster.exits.notice(cluster.members)
        cluster.stop_all()
        cluster.note_left_processes()
        if cluster.volume is None:
            findings.left_out.append("a full volume: mounting a small one takes more rights")
        findings.exits = cluster.exits.counts
        judge_logs(cluster.logs, findings)
        findings.faults += [*cluster.exits.faults, *cluster.faults]
    torch.set_num_threads(1)
    engine = load_engine([IMAGE_MODEL, MESH_MODEL], device="cpu", router_weights=Path("router_weights"))
    for outcome in tqdm(outcomes, desc="made alone"):
        has_files = outcome.status in (JobStatus.SUCCEEDED, JobStatus.FAILED)
        judge_job(
            outcome,
            files_alone(engine, outcome.task) if has_files else (),
            findings,
            is_emptied=cluster.is_emptied_since(outcome.began),
            is_comparable=outcome.task.kind is not Kind.DEADLINE and (other is None or outcome.task.is_exact),
        )
    return findings
