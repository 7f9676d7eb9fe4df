"""The table of products: everything that differs between the endpoints for images, edits and meshes in answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.file_formats import MeshFormat, OutputFormat
from models.request import GenerationRequest, ImageEdit, ImageRequest, MeshRequest
from service.api.errors import error_responses
from service.api.responses import ACCEPTED, EVENT_STREAM, RESULT, ImageResponse, MeshResponse
from service.jobs.job import Job


@dataclass(frozen=True, slots=True)
class Product:
    """One kind of artifact, and how it came about, as in `image` and `generation`.

    `result` names all artifacts of a job in the documentation. `own_fields` gives the fields of the `response` and of
    events that only this product has, from a job. `preview_fields` are those that are the same in all previews.
    """

    name: str
    action: str
    result: str
    formats: type[OutputFormat] | type[MeshFormat]
    response: type[ImageResponse] | type[MeshResponse]
    own_fields: Callable[[Job], Mapping[str, Any]]
    preview_fields: Mapping[str, Any]

    @property
    def preview_event(self) -> str:
        return f"{self.name}_{self.action}.partial_{self.name}"

    @property
    def completed_event(self) -> str:
        return f"{self.name}_{self.action}.completed"

    @property
    def has_usage(self) -> bool:
        return "usage" in self.response.model_fields

    @property
    def documentation(self) -> dict[str, Any]:
        """The answers of the endpoint, as arguments of a route."""
        files = {file_format.content_type: _FILE for file_format in self.formats}
        description = (
            f"{self.result}. With response_format binary: the {self.name} file, with the headers `X-Job-ID`, "
            f"`X-Seed` and `X-Receipt`. With stream: the job's events. They end with `{self.completed_event}` for each "
            f"{self.name}, the last of which has all fields of this answer too, or with `error`."
        )
        return {
            "response_model": self.response,
            "responses": {
                200: {**RESULT, "description": description, "content": {**files, **EVENT_STREAM}},
                202: ACCEPTED,
                **error_responses(400, 404, 409, 413, 415, 422, 500, 503),
            },
        }


_FILE = {"schema": {"type": "string", "format": "binary"}}


def _image_fields(job: Job) -> Mapping[str, Any]:
    request = job.requests[0]
    assert isinstance(request, ImageRequest)
    return {
        "size": f"{request.width}x{request.height}",
        "quality": job.output.quality_level or "auto",
        "background": "transparent" if request.is_transparent else "opaque",
    }


def _mesh_fields(job: Job) -> Mapping[str, Any]:
    request = job.requests[0]
    assert isinstance(request, MeshRequest)
    return {"octree_resolution": request.octree_resolution}


_IMAGE_PREVIEW = {"output_format": OutputFormat.PNG, "background": "opaque"}  # objects are cut out at the end

IMAGE = Product("image", "generation", "The images", OutputFormat, ImageResponse, _image_fields, _IMAGE_PREVIEW)
EDIT = Product("image", "edit", "The images", OutputFormat, ImageResponse, _image_fields, _IMAGE_PREVIEW)
MESH = Product(
    "mesh", "generation", "The mesh", MeshFormat, MeshResponse, _mesh_fields, {"output_format": MeshFormat.GLB}
)

PRODUCTS = (IMAGE, EDIT, MESH)


def product_of(request: GenerationRequest) -> Product:
    match request:
        case MeshRequest():
            return MESH
        case ImageRequest(edit=ImageEdit()):
            return EDIT
        case _:
            return IMAGE
