"""The names under which clients ask for models."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from models.card import ModelCard
from models.errors import InvalidRequest, UnknownModel
from service.api.validation import shown

Card = TypeVar("Card", bound=ModelCard)


def named_card(name: str, loaded: Mapping[str, ModelCard], aliases: Mapping[str, str]) -> ModelCard:
    """The card of the model `name`, or else that which the first pattern of `aliases` that fits stands for.

    Raises UnknownModel.
    """
    if name in loaded:
        return loaded[name]
    meant = next((model for pattern, model in aliases.items() if fnmatchcase(name, pattern)), None)
    if meant is None:
        raise UnknownModel(
            f"there is no model {shown(name)}; loaded: {', '.join(loaded)}; the setting model_aliases can let a name "
            "stand for one of them"
        )
    return loaded[meant]


def card_of(
    name: str | None, loaded: Mapping[str, ModelCard], card_type: type[Card], aliases: Mapping[str, str]
) -> Card:
    """The card of the model `name`, or the first card of `card_type` if it is None or empty.

    Raises UnknownModel, and InvalidRequest for a model of another type.
    """
    cards = {card.id: card for card in loaded.values() if isinstance(card, card_type)}
    kind = card_type.modality
    if not name:
        if not cards:
            raise UnknownModel(f"no {kind} model is loaded; loaded: {', '.join(loaded)}")
        return next(iter(cards.values()))
    card = named_card(name, loaded, aliases)
    if isinstance(card, card_type):
        return card
    able = f"try {', '.join(cards)}" if cards else f"no {kind} model is loaded"
    given = shown(name) if name == card.id else f"{shown(name)}, which stands for {card.id},"
    raise InvalidRequest(f"model {given} makes no {kind}, but a {card.modality}; {able}", "model")
