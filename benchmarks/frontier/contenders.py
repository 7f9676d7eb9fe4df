"""The table of contenders: names, settings from the most careful to the fastest, and how to attach each to a model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from benchmarks.frontier import peers
from benchmarks.frontier.subjects import Prepare
from models.card import ModelCard
from models.curve import CurvePoint
from models.elastic.plan import Policy
from models.rules.router import RouterPolicy

PRESETS = "presets"
"""The contender that every other is compared with: the points of the model's calibration curve."""

_SOLVER_STEPS = (12, 9, 7, 5, 4)
_DBCACHE = ((0.08, 3), (0.15, 3), (0.25, 3), (0.4, 5), (0.8, 8))  # threshold, most re-uses in a row
_SEA = ((0.1, 2), (0.2, 2), (0.4, 2), (0.6, 4), (1.2, 8))  # the same
_MAG = ((0.03, 2, 0.2), (0.06, 3, 0.2), (0.12, 4, 0.2), (0.24, 5, 0.1), (0.6, 8, 0.1))  # and share that always runs

_POLICIES: Mapping[str, tuple[Policy, ...]] = {
    # What calibration has chosen for at least one of the models.
    "router": tuple(
        RouterPolicy(skip_threshold=threshold, reuse_band=band, max_reuses=reuses, width_bias=width_bias)
        for threshold, band, reuses, width_bias in (
            (0.05, 0.6, 1, -4.0),
            (0.05, 0.4, 3, 0.0),
            (0.15, 0.6, 2, -4.0),
            (0.25, 0.4, 3, 0.0),
            (0.05, 0.8, 3, -4.0),
        )
    ),
}


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to buy speed. `settings` have a label each; `attach` takes a subject and a setting.

    `decides_per_batch` says that a row's result depends on the other rows of its batch. `fits_meshes` says that it can
    be attached to Hunyuan3D, which is no model of diffusers. `needs` is a module of the extra `peers`.
    """

    name: str
    settings: Mapping[str, Any]
    attach: Callable[[Any, Any], Prepare]
    decides_per_batch: bool = False
    fits_meshes: bool = False
    is_ours: bool = False
    needs: str | None = None


def contenders(card: ModelCard) -> dict[str, Contender]:
    """All contenders by name. The model's own are its rules and its curve; without routers it has fewer rules."""
    points = {_label(point): point for point in card.curve if not point.is_exact}
    rules = [_rule(rule, policies) for rule, policies in _POLICIES.items() if rule in card.rules]
    curve = [_ours(PRESETS, points)] if points else []
    return {contender.name: contender for contender in (*_PEERS, *rules, *curve)}


def _rule(rule: str, policies: Iterable[Policy]) -> Contender:
    points = [CurvePoint(policy, 1.0, 1.0, 1.0, 1.0) for policy in policies]
    return _ours(rule, {_label(point): point for point in points})


def _ours(name: str, points: Mapping[str, CurvePoint]) -> Contender:
    return Contender(name, points, lambda subject, point: subject.ours(point), fits_meshes=True, is_ours=True)


def _label(point: CurvePoint) -> str:
    """The number of computed steps, the rule of blocks, and its settings that differ from the defaults."""
    policy = point.policy
    changed = {field.name: value for field in fields(policy) if (value := getattr(policy, field.name)) != field.default}
    parts = [] if point.steps is None else [f"{point.steps.computed} steps computed"]
    if not point.is_block_dense:
        parts += [policy.rule, *(f"{name} {value}" for name, value in changed.items())]
    return " ".join(parts)


def _solver(name: str, solver: peers.Solver) -> Contender:
    settings = {f"{steps} steps": (solver, steps) for steps in _SOLVER_STEPS}
    return Contender(name, settings, peers.solver_steps, fits_meshes=True)


def _taylorseer(name: str, is_lite: bool, settings: Iterable[tuple[int, int]]) -> Contender:
    labelled = {f"interval {interval} order {order}": (is_lite, interval, order) for interval, order in settings}
    return Contender(name, labelled, peers.taylorseer)


def _dbcache(name: str, order: int) -> Contender:
    settings = {
        f"threshold {threshold:g} reuses {reuses}": (threshold, reuses, order) for threshold, reuses in _DBCACHE
    }
    return Contender(name, settings, peers.dbcache, decides_per_batch=True, needs="cache_dit")


_PEERS = (
    Contender(
        "fewer steps",
        {f"{steps} steps": steps for steps in (15, 12, 10, 8, 6, 4)},
        peers.fewer_steps,
        fits_meshes=True,
    ),
    _solver("DPM-Solver++ 2M", DPMSolverMultistepScheduler),
    _solver("UniPC", UniPCMultistepScheduler),
    Contender(
        "FirstBlockCache",
        {f"threshold {threshold:g}": threshold for threshold in (0.08, 0.12, 0.18, 0.25, 0.4, 0.6)},
        peers.first_block_cache,
        decides_per_batch=True,
    ),
    Contender(
        "SeaCache",
        {f"threshold {threshold:g} reuses {reuses}": (threshold, reuses) for threshold, reuses in _SEA},
        peers.sea_cache,
        decides_per_batch=True,
    ),
    Contender(
        "MagCache",
        {
            f"threshold {threshold:g} reuses {skips}": (threshold, skips, retained)
            for threshold, skips, retained in _MAG
        },
        peers.mag_cache,
    ),
    _taylorseer("TaylorSeer", False, ((2, 1), (3, 1), (5, 1))),
    _taylorseer("TaylorSeer lite", True, ((2, 2), (2, 1), (3, 1), (4, 1), (6, 1), (8, 1))),
    _dbcache("DBCache", 0),
    _dbcache("DBCache + TaylorSeer", 1),
)
