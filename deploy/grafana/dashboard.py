"""Write Grafana's dashboard: `python deploy/grafana/dashboard.py`. A test compares the written file with this script.

`panels.py` has what a panel is and how it is written, `queries.py` what queries share.
"""

import json
from pathlib import Path

from block_row import BLOCKS
from panels import Query, Row, dashboard, lines, stat
from queries import (
    BACKLOG,
    BLOCK_DECISIONS,
    LIVING_WORKERS,
    OF_MODEL,
    RUNNING,
    WAITING,
    WANTED_WORKERS,
    WORKERS_BY_STATE,
    mean,
    median_and_p95,
    or_none,
    quantile,
    ratio,
)

OUT = Path(__file__).parent / "dashboards" / "elastic-dit.json"

NOW = Row(
    "Now",
    (
        stat(
            "Requests a minute",
            "Requests that ended, with any status.",
            "none",
            f"sum(rate(elastic_requests_total{{{OF_MODEL}}}[$__rate_interval])) * 60",
        ),
        stat("Running", "Requests that a process has claimed.", "none", f"sum({RUNNING})"),
        stat("Waiting", "Requests in the queue.", "none", f"sum({WAITING})"),
        stat(
            "Latency, p95",
            "From a request's arrival to its result.",
            "s",
            quantile(0.95, "elastic_e2e_request_latency_seconds"),
        ),
        stat(
            "Compute ratio",
            "Mean share of the dense model's block compute that an image or mesh took.",
            "percentunit",
            mean("elastic_compute_ratio"),
        ),
        stat(
            "Blocks left out",
            "Share of block decisions that were not run: skipped, re-used or forecast.",
            "percentunit",
            f'1 - sum(rate(elastic_block_decisions_total{{{OF_MODEL}, decision="run"}}[$__rate_interval]))'
            f" / sum(rate({BLOCK_DECISIONS}[$__rate_interval]))",
        ),
    ),
)

REQUESTS = Row(
    "Requests",
    (
        lines(
            "Latency by preset",
            "From a request's arrival to its result. Budgets without a preset are grouped by their form.",
            "s",
            *median_and_p95("elastic_e2e_request_latency_seconds", "preset"),
        ),
        lines(
            "Time in the queue",
            "From a request's arrival until a worker claimed it.",
            "s",
            *median_and_p95("elastic_request_queue_time_seconds", "model"),
        ),
        lines(
            "Running and waiting",
            "All processes that share the queue.",
            "none",
            Query(RUNNING, "{{model}} running"),
            Query(WAITING, "{{model}} waiting"),
        ),
        lines(
            "Stages",
            "Mean time that an image or mesh spends in each stage.",
            "s",
            Query(mean("elastic_stage_latency_seconds", "model", "stage"), "{{model}} {{stage}}"),
        ),
        lines(
            "Requests that ended",
            "By status.",
            "reqps",
            Query(
                f"sum by (status) (rate(elastic_requests_total{{{OF_MODEL}}}[$__rate_interval]))",
                "{{status}}",
            ),
        ),
        lines(
            "Deadlines and lowered quality",
            "Requests with a deadline by outcome, and requests whose quality was lowered as their min_quality allows.",
            "reqps",
            Query(
                or_none(f"sum by (outcome) (rate(elastic_deadline_total{{{OF_MODEL}}}[$__rate_interval]))"),
                "deadline {{outcome}}",
            ),
            Query(
                or_none(f"sum(rate(elastic_quality_degraded_total{{{OF_MODEL}}}[$__rate_interval]))"),
                "lowered quality",
            ),
        ),
    ),
)

COMPUTE = Row(
    "Elastic compute",
    (
        lines(
            "Compute ratio",
            "Share of the dense model's block compute that images and meshes took. One in ten takes more than p90.",
            "percentunit",
            Query(mean("elastic_compute_ratio", "model"), "{{model}} mean"),
            Query(quantile(0.9, "elastic_compute_ratio", "model"), "{{model}} p90"),
            maximum=1,
        ),
        lines(
            "Error of the predicted compute ratio",
            "Difference between the counted compute ratio and the calibration's. If it stays high, calibrate again "
            "with prompts like the current ones.",
            "percentunit",
            Query(mean("elastic_predicted_compute_ratio_error", "model"), "{{model}} mean"),
            Query(quantile(0.95, "elastic_predicted_compute_ratio_error", "model"), "{{model}} p95"),
        ),
        lines(
            "Decisions of results",
            "Results whose budgets ask for less than exact: varied, as they should be, or the one decision that all "
            "their blocks had.",
            "cps",
            Query(
                f"sum by (model, decisions) (rate(elastic_saving_results_total{{{OF_MODEL}}}[$__rate_interval]))",
                "{{model}} {{decisions}}",
            ),
        ),
        lines(
            "GPU memory",
            "As PyTorch counts it, and what is planned: limit, reserve, weights, and what requests hold. Empty "
            "on a CPU without a limit.",
            "bytes",
            Query(or_none("sum by (instance, kind) (elastic_gpu_memory_bytes)"), "{{instance}} {{kind}}"),
            width=12,
        ),
        lines(
            "Prompts",
            "Found in the cache (hit), or encoded (miss).",
            "cps",
            Query(
                f"sum by (model, outcome) (rate(elastic_prompts_total{{{OF_MODEL}}}[$__rate_interval]))",
                "{{model}} {{outcome}}",
            ),
            width=12,
        ),
    ),
)

STEPS = Row(
    "Steps",
    (
        lines(
            "Denoise steps",
            "Of images and meshes. Forecast steps run nothing of the model.",
            "none",
            Query(
                f"sum by (model, decision) (rate(elastic_steps_total{{{OF_MODEL}}}[$__rate_interval]))",
                "{{model}} {{decision}}",
            ),
            width=6,
        ),
        lines(
            "Computed step",
            "Time of one computed step of a batch.",
            "s",
            *median_and_p95("elastic_step_latency_seconds", "model"),
            width=6,
        ),
        lines(
            "Batch size",
            "Mean number of images or meshes that shared a computed step.",
            "none",
            Query(mean("elastic_generation_batch_size", "model"), "{{model}}"),
            width=6,
        ),
        lines(
            "Batch groups",
            "Groups in which running requests step: of one shape and similar sparsity.",
            "none",
            Query(f"sum by (model) (elastic_batch_groups{{{OF_MODEL}}})", "{{model}}"),
            width=6,
        ),
        lines(
            "Routers",
            "Share of a step's time spent in routers.",
            "percentunit",
            Query(
                ratio("elastic_router_latency_seconds_sum", "elastic_step_latency_seconds_sum", "model"), "{{model}}"
            ),
            width=12,
        ),
        lines(
            "Compiled graphs",
            "Those that steps compiled, with ELASTIC_COMPILE: requests waited for them. There should be none.",
            "none",
            Query(
                or_none(
                    f"sum by (model, kind) (increase(elastic_compiled_graphs_total{{{OF_MODEL}}}[$__rate_interval]))"
                ),
                "{{model}} {{kind}}",
            ),
            width=12,
        ),
    ),
)

WORKERS = Row(
    "Workers",
    (
        lines(
            "Workers by state",
            "Living workers that have the model. A draining worker finishes its jobs and takes no more.",
            "none",
            Query(WORKERS_BY_STATE, "{{model}} {{state}}"),
            width=12,
        ),
        lines(
            "Pace",
            "Measured over predicted seconds of the latest work, the mean over the workers. Above 1 they are slower "
            "than when their models were loaded; batches bring it below 1.",
            "none",
            Query(f"max by (model) (elastic_worker_pace_ratio{{{OF_MODEL}}})", "{{model}}"),
            width=12,
        ),
    ),
)

QUEUE = Row(
    "Backlog",
    (
        lines(
            "Backlog",
            "Predicted seconds of work in queued and running jobs, for one worker.",
            "s",
            Query(BACKLOG, "{{model}}"),
        ),
        lines(
            "Queued",
            "Requests that no worker has claimed yet.",
            "none",
            Query(WAITING, "{{model}}"),
        ),
        lines(
            "Wanted and living workers",
            "Wanted are those that finish the backlog within target_backlog_s. Living are those that take jobs.",
            "none",
            Query(WANTED_WORKERS, "{{model}} wanted"),
            Query(LIVING_WORKERS, "{{model}} living"),
        ),
    ),
)

TROUBLE = Row(
    "Trouble",
    (
        lines(
            "Refused requests",
            "By error code. Until the first refusal there is an unnamed line at zero.",
            "reqps",
            Query(
                or_none(f"sum by (code) (rate(elastic_requests_rejected_total{{{OF_MODEL}}}[$__rate_interval]))"),
                "{{code}}",
            ),
        ),
        lines(
            "Recovered jobs",
            "Jobs requeued after their process died.",
            "none",
            Query(or_none("sum(increase(elastic_jobs_recovered_total[$__rate_interval]))"), "jobs"),
        ),
        lines(
            "Errors of the job store",
            "By operation.",
            "none",
            Query(
                or_none("sum by (operation) (increase(elastic_store_errors_total[$__rate_interval]))"),
                "{{operation}}",
            ),
        ),
    ),
)

ROWS = (NOW, REQUESTS, QUEUE, WORKERS, COMPUTE, STEPS, BLOCKS, TROUBLE)

if __name__ == "__main__":
    OUT.write_text(json.dumps(dashboard(ROWS), indent=2) + "\n")
    print(f"{OUT} written")
