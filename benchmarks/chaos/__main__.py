"""Is any job lost, run twice or mixed up while everything around it fails?

`python -m benchmarks.chaos --jobs 300` starts a Redis with an append-only file, a small volume for results, and two
servers and two workers that share them. Clients ask for jobs of all kinds: images polled for, streamed, waited for,
with previews, three at a time, with a deadline; jobs that are cancelled; and meshes. Each has its own seed, budget and
idempotency key, and some have a webhook whose host answers badly. A call that breaks off is made again, to any server
that answers. Meanwhile, faults come in a random order that `--seed` decides, some of them two at once:

- a process is killed (SIGKILL), frozen for a while (SIGSTOP, SIGCONT) or told to stop (SIGTERM), and started again;
- Redis is killed for a moment or for longer than a lease, is frozen, or loses all its keys (FLUSHALL);
- the volume of results is full for a while. That needs the right to mount a file system; without it, it is left out.

With `--other FOLDER`, every second server and worker runs the version in that checkout. In the end,

- every job has ended exactly once. It succeeded; or it was cancelled by its client; or it is gone because Redis lost
  its keys; or it failed for a reason that was injected, or that it also fails for alone;
- its files are those that its seed makes alone, in an engine in this process. Images are compared by their 8-bit
  colours: batches of other sizes round differently, so 2 of 255 are allowed, and reported. Meshes are compared by their
  volume and size. A job with a deadline may have any quality. With `--other`, only budgets at `exact` are compared,
  because another version may have another calibration, and there are no edits;
- every webhook was called, and was told how its job ended;
- Redis holds no job that no client was told of, nothing queued, running or leased, and no key without a time to live;
- no process has ended by itself; each ends with status 0 when it is told to, and so do the processes it started.

The exit status is 1 if any of this does not hold.
"""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.chaos.run import run
from benchmarks.chaos.verdict import Findings
from benchmarks.environment import environment
from benchmarks.table import TableRow, finish, show


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mean-s", type=float, default=6.0, help="seconds between two faults, on average")
    parser.add_argument("--faults", type=float, default=math.inf, help="spread the jobs over this many faults")
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--other", type=Path, metavar="FOLDER", help="a checkout of another version")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    findings = run(
        options.jobs,
        seed=options.seed,
        mean_s=options.mean_s,
        num_faults=options.faults,
        num_servers=options.servers,
        num_workers=options.workers,
        other=options.other and options.other.resolve(),
    )
    _show(findings)
    result = {
        "benchmark": "chaos",
        "environment": environment(),
        "seed": options.seed,
        "mean_s": options.mean_s,
        "servers": options.servers,
        "workers": options.workers,
        "other": str(options.other) if options.other else None,
        **_result(findings),
    }
    finish(result, options.json)
    return 1 if findings.faults else 0


def _show(findings: Findings) -> None:
    statuses = sorted(findings.statuses)
    rows: list[TableRow] = [
        {**{status: ends[status] or None for status in statuses}, "kind": kind}
        for kind, ends in sorted(findings.jobs.items())
    ]
    show("jobs", rows)
    tallies: dict[str, Counter[Any]] = {
        "faults injected": findings.befell,
        "exits": findings.exits,
        "workers that claimed a job": findings.attempts,
        "messages of jobs": findings.reasons,
        "errors in logs": findings.log_errors,
    }
    for title, tally in tallies.items():
        print(f"\n{title}")
        print("\n".join(f"{count:>6}  {name}" for name, count in sorted(tally.items())) or "     none")
    print(f"\nlargest difference of an image: {findings.largest_difference} of 255")
    print("\n".join(f"left out: {reason}" for reason in findings.left_out))
    print("\n".join(findings.faults) or "no job was lost, run twice or mixed up")


def _result(findings: Findings) -> dict[str, Any]:
    return {
        "jobs": {kind: dict(ends) for kind, ends in sorted(findings.jobs.items())},
        "injected": dict(sorted(findings.befell.items())),
        "left_out": findings.left_out,
        "exits": dict(sorted(findings.exits.items())),
        "attempts": {str(count): jobs for count, jobs in sorted(findings.attempts.items())},
        "messages": dict(findings.reasons),
        "log_errors": dict(findings.log_errors),
        "redis_keys": dict(findings.keys),
        "largest_difference": findings.largest_difference,
        "seconds": round(findings.seconds, 1),
        "faults": findings.faults,
    }


if __name__ == "__main__":
    sys.exit(main())
