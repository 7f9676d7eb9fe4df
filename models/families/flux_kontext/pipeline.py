"""FLUX.1-Kontext: FLUX.1 that reads a picture beside the noise. Without a picture it draws from text alone."""

from typing import ClassVar

from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext

from models.card import PictureSizes
from models.families.flux.pipeline import FluxFamily
from models.families.references import EditingFamily


class FluxKontextFamily(EditingFamily, FluxFamily):
    """Results have the size that is asked for, where the stock pipeline scales it to an area of `max_area`."""

    pipeline_class = FluxKontextPipeline
    needs_input_image: ClassVar[bool] = False

    @property
    def default_guidance_scale(self) -> float:
        """As in the model card of FLUX.1-Kontext-dev."""
        return 2.5

    @property
    def picture_sizes(self) -> PictureSizes:
        """The sizes that it was trained on."""
        preferred = tuple(pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS)
        return PictureSizes(preferred=preferred, ratio_unit=self.pixels_per_token)
