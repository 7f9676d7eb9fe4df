"""Traces as they are kept: compressed, since they repeat themselves and records live for a day."""

import base64
import json
import zlib
from collections.abc import Iterable

from models.report import Decision, StepDecision


def pack(decisions: Iterable[StepDecision]) -> str:
    """The decisions as text, of one to two bytes for each."""
    rows = [(entry.step, entry.branch, entry.block, entry.decision, entry.mlp_width) for entry in decisions]
    columns = [*zip(*rows, strict=True)]  # like stands beside like, which compresses best
    return base64.b85encode(zlib.compress(json.dumps(columns).encode())).decode()


def unpack(text: str) -> tuple[StepDecision, ...]:
    """The decisions that `pack` made `text` of."""
    columns = json.loads(zlib.decompress(base64.b85decode(text)))
    return tuple(
        StepDecision(step, branch, block, Decision(decision), mlp_width)
        for step, branch, block, decision, mlp_width in zip(*columns, strict=True)
    )
