"""The faults of a run: what happens to its processes, its Redis and its volume of results."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from errno import ENOSPC
from threading import Event, Thread

from benchmarks.chaos.cluster import LEASE_S, Cluster, Member

_SHORT_S = (0.1, 2.0)
_LONG_S = (1.0, 3 * LEASE_S)  # so that some leases end
_TOGETHER_SHARE = 0.25  # of faults that come together with another one
_LOOK_S = 0.2
_NO_JOB_S = 5.0
_AFTER_START_S = (0.0, 1.0)
_MEBIBYTE = bytes(2**20)


@contextmanager
def _killed(cluster: Cluster, member: Member) -> Iterator[None]:
    member.is_expected_to_end = True
    member.process.kill()
    cluster.exits.note_kill(member)
    yield
    member.start()


@contextmanager
def _frozen(_: Cluster, member: Member) -> Iterator[None]:
    member.signal(signal.SIGSTOP)
    yield
    member.signal(signal.SIGCONT)


@contextmanager
def _terminated(cluster: Cluster, member: Member) -> Iterator[None]:
    member.is_expected_to_end = True
    member.signal(signal.SIGTERM)
    yield
    cluster.exits.note_stop(member)
    member.start()


@contextmanager
def _redis_lost(cluster: Cluster) -> Iterator[None]:
    cluster.redis.kill()
    yield
    cluster.redis.start()


@contextmanager
def _redis_frozen(cluster: Cluster) -> Iterator[None]:
    cluster.redis.process.send_signal(signal.SIGSTOP)
    yield
    cluster.redis.process.send_signal(signal.SIGCONT)


@contextmanager
def _redis_emptied(cluster: Cluster) -> Iterator[None]:
    cluster.empty_redis()
    yield


@contextmanager
def _volume_full(cluster: Cluster) -> Iterator[None]:
    assert cluster.volume is not None
    filler = cluster.volume / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while file.write(_MEBIBYTE):
                pass
    except OSError as error:
        if error.errno != ENOSPC:
            raise
    yield
    filler.unlink()


@dataclass(frozen=True, slots=True)
class Fault:
    """`befall` lasts as long as its context, some time between the two of `lasts_s`. `share` is how often it comes."""

    befall: Callable[..., AbstractContextManager[None]]
    lasts_s: tuple[float, float]
    share: int = 1


_OF_MEMBERS: Mapping[str, Fault] = {
    "killed": Fault(_killed, _SHORT_S, share=2),
    "frozen": Fault(_frozen, _LONG_S, share=2),
    "terminated": Fault(_terminated, _SHORT_S),
}
FAULTS: Mapping[str, Fault] = {
    **{f"{kind} {name}": fault for kind in ("serve", "worker") for name, fault in _OF_MEMBERS.items()},
    "redis lost for a moment": Fault(_redis_lost, _SHORT_S, share=2),
    "redis lost for longer than a lease": Fault(_redis_lost, (LEASE_S, 3 * LEASE_S)),
    "redis frozen": Fault(_redis_frozen, _LONG_S),
    "redis emptied": Fault(_redis_emptied, (0.0, 0.0)),
    "volume full": Fault(_volume_full, _LONG_S),
}


@dataclass(slots=True)
class Load:
    """The numbers of the jobs that run now, and how many faults have come or are about to."""

    running: set[int] = field(default_factory=set)
    num_announced: int = 0


class _Deck:
    """Draws all faults equally often, in an order that a seed decides."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng
        self._names: list[str] = []

    def draw(self, befallen: set[object]) -> tuple[str, Fault, object] | None:
        """Draw a fault: its name, itself and its target, which is not in `befallen`. None if no target is left."""
        if not self._names:
            names = [name for name, fault in FAULTS.items() for _ in range(fault.share)]
            names = [name for name in names if name != "volume full" or self._cluster.volume is not None]
            self._names = self._rng.sample(names, len(names))
        name = self._names.pop()
        kind = name.partition(" ")[0]
        if kind in ("redis", "volume"):
            targets: list[object] = [kind]
        else:
            targets = [member for member in self._cluster.members if member.kind == kind and member.is_ready]
        targets = [target for target in targets if target not in befallen]
        return (name, FAULTS[name], self._rng.choice(targets)) if targets else None


@contextmanager
def faults_befall(
    cluster: Cluster, seed: int, mean_s: float, max_faults: float, befell: Counter[str], load: Load
) -> Iterator[None]:
    """A fault, or two at once, every `mean_s` seconds on average, up to `max_faults`. `befell` counts them by name.

    Each is announced in `load`, and comes soon after a job runs, or without one if none comes.
    """
    rng, is_over = random.Random(seed), Event()
    deck = _Deck(cluster, rng)

    def pause(seconds: float) -> None:
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0 and not is_over.wait(min(left, _LOOK_S)):
            cluster.exits.notice(cluster.members)

    def befall() -> None:
        while befell.total() < max_faults and not is_over.is_set():
            pause(rng.expovariate(1 / mean_s))
            load.num_announced = befell.total() + 1
            gives_up_at = time.monotonic() + _NO_JOB_S
            while not load.running and time.monotonic() < gives_up_at and not is_over.is_set():
                pause(0.05)
            pause(rng.uniform(*_AFTER_START_S))
            befallen: set[object] = set()
            with ExitStack() as stack:
                for _ in range(2 if rng.random() < _TOGETHER_SHARE else 1):
                    is_enough = is_over.is_set() or befell.total() >= max_faults
                    if is_enough or (drawn := deck.draw(befallen)) is None:
                        continue
                    name, fault, target = drawn
                    befallen.add(target)
                    befell[name] += 1
                    stack.enter_context(fault.befall(cluster, *([target] if isinstance(target, Member) else [])))
                    pause(rng.uniform(*fault.lasts_s))
            load.num_announced = befell.total()  # one more than announced, if two came at once

    def befall_until_over() -> None:
        try:
            befall()
            while not is_over.wait(_LOOK_S):
                cluster.exits.notice(cluster.members)
        except Exception as error:  # in a thread, which must not hide it
            cluster.faults.append(f"the benchmark itself failed: {error!r}")

    thread = Thread(target=befall_until_over)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
