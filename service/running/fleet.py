"""The workers that share the queue, as this process last saw them: what they serve, and how fast."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

from models.card import ModelCard
from service.errors import ModelUnavailable
from service.jobs.store import JobStore
from service.scheduling.common_card import common_card
from service.scheduling.fleet import Load, WorkerRecord, WorkerState, seconds_before, urgent_seconds_before

logger = logging.getLogger(__name__)

KEPT_S = 60.0
"""How long the workers that were seen last count as living while the store can't be read."""
RETRY_AFTER_S = 10
"""After how many seconds clients ask again for a model that no worker holds: some worker may be starting."""


class Fleet:
    """`own` is the record of this process' worker, None if it has none. Nothing but `refresh` waits.

    `models` are the ids of models that should be served, in the order in which they are listed: the first of a kind is
    its default. Those of this process' worker come before them, all others after them, by id.
    """

    def __init__(
        self,
        store: JobStore,
        own: Callable[[], WorkerRecord | None],
        models: Sequence[str] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._own = own
        self._models = models
        self._clock = clock
        self._others: Sequence[WorkerRecord] = ()
        self._cards_of_others: Mapping[str, ModelCard] = {}
        self._read_at = -math.inf
        self._seen_at: dict[str, float] = {}  # when a worker last had the model
        self._unlike: set[str] = set()

    async def refresh(self) -> None:
        """Read which workers live. Raises StoreUnavailable."""
        records, own = await self._store.workers(), self._own()
        others = sorted((record for record in records if own is None or record.id != own.id), key=lambda one: one.id)
        cards: dict[str, list[ModelCard]] = {}
        for record in filter(_takes_jobs, others):
            for model, card in record.cards.items():
                cards.setdefault(model, []).append(card)
        self._warn_of_unlike(cards)
        self._others, self._read_at = others, self._clock()
        self._cards_of_others = {model: common_card(cards[model]) for model in cards}
        self._seen_at |= dict.fromkeys(self.cards, self._read_at)

    @property
    def workers(self) -> list[WorkerRecord]:
        """The living workers."""
        own = self._own()
        return [*([] if own is None else [own]), *(self._others if self._is_current else ())]

    @property
    def cards(self) -> Mapping[str, ModelCard]:
        """The models that can be asked for. A card holds for all workers of its model, see `common_card`."""
        own = self._own()
        cards = {} if own is None else dict(own.cards)
        others = self._cards_of_others if self._is_current else {}
        for model in (*self._models, *sorted(others)):
            if model in others:
                cards[model] = common_card([cards[model], others[model]]) if model in cards else others[model]
        return cards

    def card(self, model: str) -> ModelCard:
        """Raises ModelUnavailable if no worker holds the model."""
        if (card := self.cards.get(model)) is not None:
            return card
        raise self.unavailable(model)

    def unavailable(self, model: str) -> ModelUnavailable:
        """Why there is no worker for a model."""
        why = self._why_absent(model)
        return ModelUnavailable(f"no worker holds the model '{model}': {why}; try again later", model, RETRY_AFTER_S)

    def unavailable_kind(self, kind: str) -> ModelUnavailable:
        """Why there is no worker for any model of a kind."""
        absent = f"models without a worker are {', '.join(self.absent)}" if self.absent else "there is no worker"
        return ModelUnavailable(f"no worker holds any {kind} model now: {absent}; try again later", "", RETRY_AFTER_S)

    @property
    def absent(self) -> list[str]:
        """Models that should be served, or were, and that no worker holds."""
        known, cards = dict.fromkeys([*self._models, *self._seen_at]), self.cards
        return [model for model in known if model not in cards]

    def num_workers(self, model: str) -> int:
        """How many workers take jobs of a model."""
        return len(self._of(model))

    def seconds_before(self, model: str, load: Load) -> float:
        """Seconds until a worker of `model` has done the work that is there now; infinite if no worker holds it."""
        return seconds_before(model, load, self.workers)

    def urgent_seconds_before(self, model: str, load: Load) -> float:
        """Seconds until a worker of `model` runs nothing that goes before a new job with a deadline, at most."""
        return urgent_seconds_before(model, load, self.workers)

    def pace(self, model: str) -> float:
        """Measured seconds for each predicted one, of the slowest worker that may take a job of `model`."""
        return max((worker.pace for worker in self._of(model)), default=1.0)

    def step_pace(self, model: str) -> float:
        """As `pace`, for steps alone."""
        return max((worker.step_pace for worker in self._of(model)), default=1.0)

    def finish_seconds(self, model: str) -> float:
        """How long decoding and encoding takes lately at the model's default size, at most; 0 before the first."""
        return max((worker.finish_s.get(model, 0.0) for worker in self._of(model)), default=0.0)

    @property
    def _is_current(self) -> bool:
        return self._clock() - self._read_at <= KEPT_S

    def _of(self, model: str) -> list[WorkerRecord]:
        return [worker for worker in self.workers if _takes_jobs(worker) and model in worker.cards]

    def _why_absent(self, model: str) -> str:
        if self._seen_at and not self._is_current:
            return f"the job store has told of none for {self._clock() - self._read_at:.0f} s"
        if model in self._seen_at:
            return f"the last one was seen {self._clock() - self._seen_at[model]:.0f} s ago"
        return "none has been seen since this server started"

    def _warn_of_unlike(self, cards: Mapping[str, Sequence[ModelCard]]) -> None:
        """Workers of one model with different calibrations: a budget then means something else on each of them."""
        unlike = {model for model, found in cards.items() if any(card.curve != found[0].curve for card in found)}
        for model in unlike - self._unlike:
            logger.warning("workers of %s have different curves; give all of them the same router_weights", model)
        self._unlike = unlike


def _takes_jobs(worker: WorkerRecord) -> bool:
    return worker.state is not WorkerState.DRAINING
