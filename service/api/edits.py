"""What a picture to edit asks of a model: which fields it takes, how strong an edit is, and how large its result."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from models.card import Edits, ImageCard
from models.errors import InvalidRequest
from models.request import ImageEdit, size_of_png
from service.api.input_image import checked_image
from service.api.input_mask import checked_mask
from service.api.schemas import DEFAULT_MASKED_STRENGTH, DEFAULT_STRENGTH, EditBody
from service.api.sizes import nearest_size


@dataclass(frozen=True, slots=True)
class CheckedPictures:
    """The pictures of an edit, as `checked_image` makes them, and a mask as `checked_mask` does."""

    images: tuple[bytes, ...]
    mask: bytes | None = None


def checked_pictures(images: Mapping[str, bytes], mask: bytes | None, *, max_pixels: int) -> CheckedPictures:
    """The files of an edit, by the names of their fields, checked in this process. Raises what the checks raise."""
    checked = tuple(checked_image(data, field, max_pixels=max_pixels) for field, data in images.items())
    if mask is None:
        return CheckedPictures(checked)
    return CheckedPictures(checked, checked_mask(mask, size_of_png(checked[0]), max_pixels=max_pixels))


def pictures_given(body: EditBody, card: ImageCard) -> list[tuple[str, str]]:
    """The pictures of `body`, each as the name of its field and the text there.

    Raises InvalidRequest if they, the mask or the strength are not for the model of `card`.
    """
    if body.image is not None and body.images is not None:
        raise InvalidRequest("image and images say the same thing; give one of the two", "images")
    name, texts = ("images", body.images) if body.image is None else ("image", body.image)
    if texts is None:
        raise InvalidRequest("image is required: the picture to edit", "image")
    if len(texts) > card.max_input_images:
        pictures = "1 picture" if card.max_input_images == 1 else f"{card.max_input_images} pictures"
        raise InvalidRequest(f"{name} has {len(texts)} pictures; {card.id} edits at most {pictures} at once", name)
    if card.edits is Edits.REFERENCE:
        _check_reference(body, card)
    return [(name if len(texts) == 1 else f"{name}[{index}]", text) for index, text in enumerate(texts)]


def _check_reference(body: EditBody, card: ImageCard) -> None:
    """Models that read pictures beside the noise begin with noise alone, and may change all of it."""
    if body.mask is not None:
        raise InvalidRequest(
            f"mask cannot be used here: {card.id} may change all of a picture; say in the prompt what should stay, or "
            "choose a model whose edits in /v1/models is noised",
            "mask",
        )
    if body.strength is not None:
        raise InvalidRequest(
            f"strength {body.strength:g} cannot be used here: {card.id} begins with noise alone; leave strength out, "
            "or choose a model whose edits in /v1/models is noised",
            "strength",
        )


def parse_edit(body: EditBody, card: ImageCard, pictures: CheckedPictures) -> ImageEdit:
    """The edit of `body`, which `pictures_given` has checked."""
    strength = None
    if card.edits is Edits.NOISED:
        default = DEFAULT_STRENGTH if pictures.mask is None else DEFAULT_MASKED_STRENGTH
        strength = default if body.strength is None else body.strength
    return ImageEdit(pictures.images, pictures.mask, strength)


def size_of_edit(pictures: CheckedPictures, card: ImageCard) -> tuple[int, int]:
    """The valid width and height in pixels that the size "auto" means for these pictures.

    A model that reads pictures beside the noise has sizes of its own for that, by the last picture. Else it is near the
    size of the picture: one with more pixels than the model's default size is scaled down to about these, and one
    outside of the model's limits into them, if its proportions allow that.
    """
    if card.picture_sizes is not None:
        return card.size_of_edit(*size_of_png(pictures.images[-1]))
    size = size_of_png(pictures.images[0])
    sizes, shorter, longer = card.sizes, min(size), max(size)
    most = math.sqrt(card.default_width * card.default_height / (shorter * longer))
    scale = max(min(1.0, most, sizes.maximum / longer), sizes.minimum / shorter)
    width, height = (nearest_size(round(side * scale), sizes) for side in size)
    return width, height
