"""Runs measurements in processes of their own, and passes their figures on as they come."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any

from benchmarks.frontier.measurement import Report

Job = Callable[[Report], object]
"""A measurement; it must be picklable."""

_reports: "Queue[tuple[int, dict[str, Any]]]"


def run(jobs: Sequence[Job], num_processes: int, take: Callable[[int, dict[str, Any]], object]) -> None:
    """Run every job in a new process, at most `num_processes` at once.

    `take` gets the index of a job and what the job reported. What a job raises is raised here, after its reports.
    """
    context = multiprocessing.get_context("spawn")
    reports: Queue[tuple[int, dict[str, Any]]] = context.Queue()
    with ProcessPoolExecutor(num_processes, context, _set_up, (reports,), max_tasks_per_child=1) as pool:
        futures = [pool.submit(_work, index, job) for index, job in enumerate(jobs)]
        while not all(future.done() for future in futures):
            _pass_on(reports, take)
    _pass_on(reports, take)  # a process ends only when its reports are under way
    for future in futures:
        future.result()


def _pass_on(reports: "Queue[tuple[int, dict[str, Any]]]", take: Callable[[int, dict[str, Any]], object]) -> None:
    while True:
        try:
            index, figures = reports.get(timeout=0.5)
        except Empty:
            return
        take(index, figures)


def _set_up(reports: "Queue[tuple[int, dict[str, Any]]]") -> None:
    global _reports
    _reports = reports


def _work(index: int, job: Job) -> None:
    job(lambda figures: _reports.put((index, figures)))
