"""The front page: a page for trying models in a browser, which uses the public API only."""

from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

_DIRECTORY = Path(__file__).parents[1] / "playground"
_PAGE = (_DIRECTORY / "index.html").read_text(encoding="utf-8")
_POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self' blob:",  # model-viewer fetches the mesh that the page holds
        "style-src 'self' 'unsafe-inline'",  # its styles are written into the page
        "script-src 'self' 'wasm-unsafe-eval'",  # its decoder of compressed meshes
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

router = APIRouter(include_in_schema=False)


@router.get("/")
async def show_playground(request: Request) -> HTMLResponse:
    """The page and its scripts need no key; their calls of the API do, if the server has keys."""
    page = _PAGE.replace('="/', f'="{request.scope.get("root_path", "")}/')  # its links, from the path of this server
    return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})


def add_playground(app: FastAPI) -> None:
    app.include_router(router)
    app.mount("/playground", StaticFiles(directory=_DIRECTORY), name="playground")
