"""What is written of workers and of the cards of their models, and how it is read.

Workers of two versions share a Redis. Readers ignore fields that they do not know.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from models.card import ImageCard, MeshCard, ModelCard, PictureSizes
from models.curve import point_entry, point_of
from models.memory import ImageMemory, MeshMemory
from service.scheduling.fleet import WorkerRecord, WorkerState

_TYPES: Mapping[str, tuple[TypeAdapter[Any], TypeAdapter[Any]]] = {
    card.modality: (TypeAdapter(card), TypeAdapter(memory))
    for card, memory in ((ImageCard, ImageMemory), (MeshCard, MeshMemory))
}
for _, _memory in _TYPES.values():
    _memory.rebuild(_types_namespace={"PictureSizes": PictureSizes})
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class WorkerEntry:
    """What is written of a `WorkerRecord`. `cards` has the names under which the cards are kept, by model.

    Promises to clients are computed with these numbers, so all of them must be possible. A worker of the version before
    does not write `urgent_waits`: there they do wait.
    """

    id: str
    version: str
    device: str
    state: WorkerState
    cards: Mapping[str, str]
    pace: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    finish_s: Mapping[str, _Seconds] = field(default_factory=dict)
    num_held: int = 0
    max_running: int = 0
    step_s: _Seconds = 0.0
    step_pace: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    urgent_waits: bool = True

    def record(self, cards: Mapping[str, ModelCard]) -> WorkerRecord:
        """The record with these of its cards."""
        return WorkerRecord(
            *(self.id, self.version, self.device, self.state, cards),
            *(self.pace, self.finish_s, self.num_held, self.max_running),
            step_s=self.step_s,
            step_pace=self.step_pace,
            urgent_waits=self.urgent_waits,
        )


_WORKER = TypeAdapter(WorkerEntry)


def dump_worker(record: WorkerRecord, card_names: Mapping[str, str]) -> bytes:
    return _WORKER.dump_json(
        WorkerEntry(
            *(record.id, record.version, record.device, record.state, card_names),
            *(record.pace, record.finish_s, record.num_held, record.max_running),
            step_s=record.step_s,
            step_pace=record.step_pace,
            urgent_waits=record.urgent_waits,
        )
    )


def load_worker(data: bytes) -> WorkerEntry:
    """Raises ValueError if this version can't read it."""
    entry: WorkerEntry = _WORKER.validate_json(data)
    return entry


def dump_card(card: ModelCard) -> bytes:
    curve = [point_entry(point) for point in card.curve]
    return json.dumps({**asdict(card), "modality": card.modality, "curve": curve}).encode()


def load_card(data: bytes) -> ModelCard:
    """Raises ValueError if this version can't read it."""
    try:
        fields = json.loads(data)
        card_type, memory_type = _TYPES[fields["modality"]]
        memory = memory_type.validate_python(fields["memory"])
        curve = tuple(point_of(point) for point in fields["curve"])
        card: ModelCard = card_type.validate_python({**fields, "memory": memory, "curve": curve})
        if not (card.curve and 0 < card.dense_step_seconds < inf and 0 <= card.encode_seconds < inf):
            raise ValueError("no curve, or impossible seconds")
    except Exception as error:  # a card may break in any way that a reader can fail
        raise ValueError(f"the card can't be read: {error!r}") from error
    return card
