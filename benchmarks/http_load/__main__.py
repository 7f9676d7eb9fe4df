"""How many requests does the server answer under load, beside what a user would write in its place?

`python -m benchmarks.http_load` compares over HTTP, on one machine and in turns:

lock         FastAPI, the stock pipelines of diffusers, and a lock
batching     the same with request-level batching: a window and a largest batch, the best of a small search
fewer steps  batching, where a budget means as many denoise steps as ours computes for it
ungrouped    ours without scheduling: all requests that can share a step do, and the others take turns
ours         elastic-dit serve

Each server runs with one thread on one core, and the clients on another one. The mix was chosen beforehand: exact 10 %,
high 20 %, none 40 %, fast 20 %, draft 10 %; 80 % tiny-flux at 128x128, 10 % at 256x256, 10 % tiny-qwen-image; a tenth,
or `--deadlines` tenths, have a deadline in place of a budget, of 0.4 to 4 times the time of the bare pipeline. `lock`
and `batching` know neither budgets nor deadlines: they compute all steps.

saturation  16 clients make the first requests of the mix, each the next one when it has its answer (closed loop), and
            then exact ones alone. Requests over the seconds from the first call to the last answer; the median over
            rounds. Deadlines are left out, since a server may refuse them
quality     similarity of the first results at saturation to the exact ones of the same seed, as in calibration: the
            mean, the tenth percentile, and the share that is as good as its receipt promised
load        arrivals do not wait for answers (open loop): Poisson at 0.5, 0.9 and 1.5 of the contender's own throughput
            at saturation. Deadlines count as met if the client has the answer in time, of those that are not refused
bursts      at 0.9 on average, each of more work than the server accepts. Clients that are told to come back do so once
one client  exact requests one after the other, each next to a call of the bare pipeline with its PNG file

Figures are kept in records.jsonl in the folder `--out`, so an interrupted run goes on where it stopped. Linux only.
"""

import argparse
import os
import statistics
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.frontier.records import Records
from benchmarks.http_load.clients import use_core
from benchmarks.http_load.contenders import BATCHING, CONTENDERS, LOCK, OURS
from benchmarks.http_load.measurement import (
    ASKED_FOR_EXACT,
    BURST_LEVEL,
    BURSTS,
    EXACT_ALONE,
    LEVELS,
    MIX,
    POISSON,
    Measurement,
    Sizes,
)
from benchmarks.http_load.mix import MODELS
from benchmarks.http_load.summary import budget_rows, load_row, quality_row
from benchmarks.table import TableRow, finish, show
from models.zoo import load_engine

_FULL = Sizes(
    num_mixed=50, num_exact=24, num_rounds=2, num_tuning=30, num_alone=12, num_samples=40, seconds=30, our_seconds=90
)
_QUICK = Sizes(
    num_mixed=10, num_exact=4, num_rounds=1, num_tuning=4, num_alone=1, num_samples=5, seconds=5, our_seconds=5
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", default=[*CONTENDERS], choices=[*CONTENDERS], metavar="NAME")
    parser.add_argument("--levels", type=float, nargs="*", default=[*LEVELS], help="rates over that at saturation")
    parser.add_argument("--seconds", type=float, help="in which requests arrive at the others")
    parser.add_argument("--our-seconds", type=float, help="in which requests arrive at ours")
    parser.add_argument(
        "--deadlines", type=int, help="of ten requests that arrive, so many have a deadline; 1 if not given"
    )
    parser.add_argument("--quick", action="store_true", help="a few requests of each, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("runs/http_load"), help="folder of the figures and logs")
    parser.add_argument("--plot", type=Path, help="draw throughput and latency into this file; needs the extra 'peers'")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    sizes = _QUICK if arguments.quick else _FULL
    given = {
        "seconds": arguments.seconds,
        "our_seconds": arguments.our_seconds,
        "num_deadlines": arguments.deadlines,
    }
    return Sizes(**(asdict(sizes) | {name: value for name, value in given.items() if value is not None}))


def two_cores() -> tuple[int, int]:
    """The cores of the servers and of the clients."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this needs two cores: one for the servers, and one for the clients")
    return cores[0], cores[-1]


def saturation_rows(measurement: Measurement, contenders: list[str], num_rounds: int) -> list[TableRow]:
    loads = {MIX: contenders, EXACT_ALONE: [name for name in contenders if name in ASKED_FOR_EXACT]}
    turns = [(load, n, name) for load, names in loads.items() for n in range(num_rounds) for name in names]
    for load, number, name in tqdm(turns, desc="saturation"):
        measurement.saturation(name, load, number)
    rows: list[TableRow] = []
    for load, names in loads.items():
        throughput = {name: measurement.throughput(name, load) for name in names}
        for name in names:
            row: TableRow = {"contender": name, "load": load, "per_s": throughput[name]}
            for other in (LOCK, BATCHING):
                row[f"over {other}"] = throughput[name] / throughput[other] if other in throughput else None
            rows.append(row)
    return rows


def main() -> None:
    arguments = parse_arguments()
    server_core, client_core = two_cores()
    use_core(client_core)  # this process computes the exact results, while no server is measured
    torch.set_num_threads(1)
    directories = [Path("checkpoints") / model for model in MODELS]
    engine = load_engine(directories, device="cpu", router_weights=Path("router_weights"))
    sizes, contenders, where = sizes_of(arguments), arguments.contenders, environment()
    key = {"commit": where["commit"], "sizes": str(sizes)}
    records = Records(arguments.out / "records.jsonl")
    with Measurement(engine, sizes, records, key, logs=arguments.out, cores=(server_core, client_core)) as measurement:
        bare = {f"{kind.model} {kind.side}": seconds for kind, seconds in measurement.bare_seconds.items()}
        saturation = saturation_rows(measurement, contenders, sizes.num_rounds)
        samples = {name: measurement.saturation(name, MIX, 0)["samples"] for name in contenders}
        pairs = measurement.alone() if OURS in contenders else []
        turns = [(level, POISSON, name) for level in arguments.levels for name in contenders]
        if OURS in contenders and arguments.levels:
            turns.append((BURST_LEVEL, BURSTS, OURS))
        answers = {turn: measurement.under_load(turn[2], *turn[:2]) for turn in tqdm(turns, desc="loads")}
        tuning = measurement.tuning if BATCHING in contenders else []
    quality = [{"contender": name, **quality_row(samples[name])} for name in contenders]
    loads: list[TableRow] = []
    latencies: list[TableRow] = []
    for (level, pattern, name), figures in answers.items():
        place: TableRow = {"contender": name, "level": level, "pattern": pattern}
        loads.append({**place, "rate": figures["rate"], **load_row(figures["answers"])})
        latencies += [{**place, **row} for row in budget_rows(figures["answers"])]
    one_client = statistics.median(pair["seconds"] / pair["bare_s"] for pair in pairs) if pairs else None
    show("throughput at saturation, requests a second", saturation)
    show("similarity to the exact results", quality)
    if loads:
        show("under load", loads)
        show("latency by budget", latencies)
    print(f"one client, time over the bare pipeline's: {one_client}")
    result = {
        "benchmark": "http_load",
        "environment": where | {"threads": "1"},
        "contenders": {name: CONTENDERS[name] for name in contenders},
        "sizes": asdict(sizes),
        "max_backlog_s": measurement.max_backlog_s,
        "bare_seconds": bare,
        "batching": tuning,
        "saturation": saturation,
        "quality": quality,
        "one_client": {"ratio": one_client, "pairs": pairs},
        "loads": loads,
        "latencies": latencies,
    }
    if arguments.plot:
        from benchmarks.http_load.plot import draw  # matplotlib is in the extra 'peers'

        draw(arguments.plot, result)
    finish(result, arguments.json)


if __name__ == "__main__":
    main()
