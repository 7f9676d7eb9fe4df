"""Who takes the next denoise step together."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from models.request import GenerationRequest, ImageRequest


@dataclass(frozen=True, slots=True)
class Candidate:
    """A started picture. `last_turn` is the turn of its last step, or the one in which it was started."""

    batch_key: Hashable
    last_turn: int


def next_group(candidates: Sequence[Candidate]) -> list[int]:
    """Indices of the candidates that can step next: who waited longest, and all that can share its step, in that order.

    Whoever takes the first few of them, turn by turn, starves nobody: each candidate is among them at the latest after
    as many turns as there were candidates when it came.
    """
    by_wait = sorted(range(len(candidates)), key=lambda index: candidates[index].last_turn)
    batch_key = candidates[by_wait[0]].batch_key
    return [index for index in by_wait if candidates[index].batch_key == batch_key]


def shape_of(request: GenerationRequest) -> str:
    """Requests of equal shape will share steps: what can be told of a `batch_key` before the request is started."""
    match request:
        case ImageRequest():
            guided = " guided" if request.true_cfg_scale > 1 else ""
            return f"{request.model} {request.width}x{request.height}{guided}"
        case _:
            return request.model
