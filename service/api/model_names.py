"""The names under which clients ask for models."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from models.card import ModelCard
from models.errors import InvalidRequest, UnknownModel
from service.api.validation import shown
from service.errors import ModelUnavailable
from service.running.fleet import RETRY_AFTER_S, Fleet

Card = TypeVar("Card", bound=ModelCard)


def named_card(name: str, fleet: Fleet, aliases: Mapping[str, str]) -> ModelCard:
    """The card of the model `name`, or else of the model that the first fitting pattern of `aliases` stands for.

    Raises UnknownModel, and ModelUnavailable if no worker holds the model any more.
    """
    served = fleet.cards
    if name in served or name in fleet.absent:
        return fleet.card(name)
    meant = next((model for pattern, model in aliases.items() if fnmatchcase(name, pattern)), None)
    if meant is None and not served:  # nobody can say which models there will be; a label has no name of a client's
        raise ModelUnavailable(f"no worker holds {shown(name)}, or any other model; try again later", "", RETRY_AFTER_S)
    if meant is None:
        raise UnknownModel(
            f"there is no model {shown(name)}; loaded: {', '.join(served)}; the setting model_aliases can let a name "
            "stand for one of them"
        )
    return fleet.card(meant)


def card_of(
    name: str | None,
    fleet: Fleet,
    card_type: type[Card],
    aliases: Mapping[str, str],
    *,
    is_preferred: Callable[[Card], bool] = lambda card: True,
) -> Card:
    """The card of the model `name`, or the first card of `card_type` if it is None or empty: a preferred one, if any.

    Raises UnknownModel, ModelUnavailable if no worker holds the model now, and InvalidRequest for a model of another
    type.
    """
    cards = {card.id: card for card in fleet.cards.values() if isinstance(card, card_type)}
    kind = card_type.modality
    if not name:
        if not cards and (fleet.absent or not fleet.cards):
            raise fleet.unavailable_kind(kind)
        if not cards:
            raise UnknownModel(f"no {kind} model is loaded; loaded: {', '.join(fleet.cards)}")
        return next(filter(is_preferred, cards.values()), next(iter(cards.values())))
    card = named_card(name, fleet, aliases)
    if isinstance(card, card_type):
        return card
    able = f"try {', '.join(cards)}" if cards else f"no {kind} model is loaded"
    given = shown(name) if name == card.id else f"{shown(name)}, which stands for {card.id},"
    raise InvalidRequest(f"model {given} makes no {kind}, but a {card.modality}; {able}", "model")
