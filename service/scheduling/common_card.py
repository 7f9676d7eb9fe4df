"""One card for a model that workers on different devices hold. Pure."""

from collections.abc import Sequence
from dataclasses import replace

from models.card import ModelCard


def common_card(cards: Sequence[ModelCard]) -> ModelCard:
    """The card of the slowest worker, with the memory of the largest device.

    Any worker may take a job, so a deadline is promised by the slowest one. A request that fits on one device only is
    left to that one.
    """
    slowest = max(cards, key=lambda card: card.dense_step_seconds)
    largest = max(cards, key=lambda card: card.memory.room)
    return slowest if largest is slowest else replace(slowest, memory=largest.memory)
