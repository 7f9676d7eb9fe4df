"""The command line: `elastic-dit serve`, `worker`, `generate`, `mesh`, `calibrate`, `convert`."""

import secrets
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from fastapi import FastAPI
from pydantic import ValidationError
from typer.exceptions import TyperException

from models.errors import GenerationError, InvalidRequest
from models.file_formats import MeshFormat, OutputFormat
from service.api.input_image import checked_image
from service.api.parsing import RANDOM_SEEDS
from service.api.responses import ReceiptBody
from service.api.schemas import ImageBody, MeshBody
from service.api.validation import invalid_request
from service.budget import budget_fields
from service.errors import BadConfiguration, InvalidImage, ServiceError
from service.logging import configure_logging
from service.new_key import new_key
from service.running.dispatcher import Dispatcher
from service.settings import Settings, load_settings

app = typer.Typer(help="Elastic diffusion transformers, served.", add_completion=False, rich_markup_mode=None)

Format = TypeVar("Format", OutputFormat, MeshFormat)
Config = Annotated[Path | None, typer.Option(help="A TOML file of settings.")]

app.command()(new_key)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="The address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on.  [default: 8000]")] = None,
    models: Annotated[
        str | None,
        typer.Option(
            help="Model directories, separated by commas; the first of each kind is the default one.  "
            "[default: checkpoints/tiny-flux,checkpoints/tiny-qwen-image,checkpoints/tiny-hunyuan3d]"
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.  [default: cpu]")] = None,
    config: Config = None,
) -> None:
    """Load the models and answer HTTP requests. All settings can also be given as ELASTIC_… variables."""
    settings = load_settings(config, host=host, port=port, models=models, device=device)
    configure_logging(settings.log_level, settings.log_format)
    from service.app import create_app

    _serve(settings, create_app)


@app.command()
def worker(
    host: Annotated[str | None, typer.Option(help="Where to answer for its state.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Likewise.  [default: 8000]")] = None,
    models: Annotated[str | None, typer.Option(help="Model directories, separated by commas.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.  [default: cpu]")] = None,
    config: Config = None,
) -> None:
    """Make what servers have queued in the same Redis. Answers /healthz, /readyz and /metrics only."""
    settings = load_settings(config, host=host, port=port, models=models, device=device)
    configure_logging(settings.log_level, settings.log_format)
    if settings.redis_url is None:
        raise typer.BadParameter("a worker shares a queue with servers: set ELASTIC_REDIS_URL")
    from service.app import create_worker_app

    _serve(settings, create_worker_app)


def _serve(settings: Settings, create: Callable[[Settings, Dispatcher], FastAPI]) -> None:
    from models.zoo import load_engine  # torch: only where something is computed
    from service.app import build_dispatcher
    from service.server import serve as serve_http

    dispatcher = build_dispatcher(
        settings,
        lambda: load_engine(
            settings.models,
            device=settings.device,
            router_weights=settings.router_weights,
            offload_text_encoders=settings.offload_text_encoders,
        ),
    )
    web = create(settings, dispatcher)  # first, so that settings that can't work are told at once
    dispatcher.worker.start()
    serve_http(settings, web, dispatcher)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="What the picture shows.")],
    model: Annotated[str, typer.Option(help="A model directory, or its name in checkpoints/.")] = "tiny-flux",
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help="What it should not show: with --guidance above 1 (Qwen-Image), with --true-cfg-scale above 1 (FLUX)."
        ),
    ] = None,
    true_cfg_scale: Annotated[
        float | None,
        typer.Option(help="FLUX: true classifier-free guidance besides; 1 is off, above it needs --negative-prompt."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random by default.")] = None,
    budget: Annotated[str | None, typer.Option(help="A preset, or quality=0.9, or compute_ratio=0.5.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.")] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale. FLUX: distilled. Qwen-Image: true classifier-free guidance; up to 1 is off."
        ),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write: .png, .webp or .jpeg.")] = Path("picture.png"),
    receipt: Annotated[Path | None, typer.Option(help="Also write the receipt, as JSON.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.  [default: cpu]")] = None,
    config: Config = None,
) -> None:
    """Make one picture without a server."""
    settings = load_settings(config, device=device)
    fields: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "true_cfg_scale": true_cfg_scale,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "size": size,
        "budget": None if budget is None else budget_fields(budget),
        "output_format": _format_of(out, OutputFormat),
    }
    directory, body = _model_directory(model), ImageBody.model_validate(fields)
    from service.local import generate_picture  # torch: only where something is computed

    data, done = generate_picture(directory, body, settings, random_seed=secrets.randbelow(RANDOM_SEEDS))
    _write(out, data, receipt, done)


@app.command()
def mesh(
    image: Annotated[Path, typer.Option(help="The picture of one object.")],
    model: Annotated[str, typer.Option(help="A model directory, or its name in checkpoints/.")] = "tiny-hunyuan3d",
    seed: Annotated[int | None, typer.Option(help="Random by default.")] = None,
    budget: Annotated[str | None, typer.Option(help="A preset, or quality=0.9, or compute_ratio=0.5.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoise steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    octree_resolution: Annotated[int | None, typer.Option(help="Cells of the field's grid along a side.")] = None,
    target_faces: Annotated[int | None, typer.Option(help="How many triangles the mesh may have.")] = None,
    remove_background: Annotated[str, typer.Option(help="auto, true or false.")] = "auto",
    out: Annotated[Path, typer.Option(help="The file to write: .glb, .obj, .stl or .ply.")] = Path("mesh.glb"),
    receipt: Annotated[Path | None, typer.Option(help="Also write the receipt, as JSON.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.  [default: cpu]")] = None,
    config: Config = None,
) -> None:
    """Make one mesh from a picture without a server."""
    settings = load_settings(config, device=device)
    fields: dict[str, Any] = {
        "input_image": str(image),  # what is read below; a body names its picture
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "octree_resolution": octree_resolution,
        "target_faces": target_faces,
        "remove_background": {"true": True, "false": False}.get(remove_background, remove_background),
        "budget": None if budget is None else budget_fields(budget),
        "output_format": _format_of(out, MeshFormat),
    }
    directory, body = _model_directory(model), MeshBody.model_validate(fields)
    from service.local import generate_mesh  # torch: only where something is computed

    random_seed = secrets.randbelow(RANDOM_SEEDS)
    data, done = generate_mesh(directory, body, image.read_bytes(), settings, random_seed=random_seed)
    _write(out, data, receipt, done)


def _write(out: Path, data: bytes, receipt: Path | None, done: ReceiptBody) -> None:
    out.write_bytes(data)
    if receipt is not None:
        receipt.write_text(done.model_dump_json(indent=2, exclude_unset=True) + "\n")
    print(f"{out}: {done.compute_ratio:.0%} of the dense compute, {done.seconds.total:.2f} s")


@app.command()
def calibrate(
    prompts: Annotated[Path | None, typer.Option(help="For an image model: a text file, a prompt a line.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="For a mesh model: a folder of pictures.")] = None,
    model: Annotated[str, typer.Option(help="A model directory, or its name in checkpoints/.")] = "tiny-flux",
    rule: Annotated[str, typer.Option(help="router, or residual_cache, which needs no trained weights.")] = "router",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1.  [default: cpu]")] = None,
    config: Config = None,
) -> None:
    """Measure a model's curve of compute against quality, and write it as its calibration.json."""
    settings = load_settings(config, device=device)
    samples = _samples(prompts, pictures, settings.max_image_pixels)
    directory = _model_directory(model)
    from models.calibration import calibrate_model  # torch: only where something is computed

    path = calibrate_model(
        directory,
        samples,
        rule=rule,
        device=settings.device,
        router_weights=settings.router_weights,
        offload_text_encoders=settings.offload_text_encoders,
    )
    print(f"{path} written")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Option("--src", exists=True, help="The checkpoint: a file, an index of shards, or their folder.")
    ],
    out: Annotated[Path, typer.Option(help="The model directory to write.")],
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="elastic-dit: Elastic-DiT's checkpoint; --base is Qwen-Image's directory. "
            "hunyuan3d: a .ckpt with its config.yaml beside it, or their folder; without --base.",
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A model directory that has what the checkpoint lacks."),
    ] = None,
    max_shard_gb: Annotated[
        float, typer.Option(min=0, help="The largest file of weights; hunyuan3d's is one file, as published.")
    ] = 5.0,
    config: Config = None,
) -> None:
    """Import a checkpoint of another layout, routers included if it has any."""
    settings = load_settings(config)
    from models.conversion import convert as convert_checkpoint  # torch: only where something is computed

    routers = convert_checkpoint(
        format_name, source, base, out, router_weights=settings.router_weights, max_shard_bytes=int(max_shard_gb * 1e9)
    )
    print(f"{out} and {routers} written")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Whatever goes wrong that was foreseen is one line on stderr: 2 for bad arguments, else 1."""
    try:
        code = app(args=arguments, prog_name="elastic-dit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.Abort:
        return _complain("interrupted", 130)
    except TyperException as error:
        return _complain(error.format_message(), error.exit_code)
    except ValidationError as error:
        return _complain(str(invalid_request(error.errors()[0])), 2)
    except (InvalidRequest, BadConfiguration, FileNotFoundError, tomllib.TOMLDecodeError) as error:
        return _complain(str(error), 2)
    except (GenerationError, ServiceError, OSError) as error:
        return _complain(str(error), 1)


def _complain(message: str, code: int) -> int:
    print(f"elastic-dit: {message}", file=sys.stderr)
    return code


def _samples(prompts: Path | None, pictures: Path | None, max_pixels: int) -> list[str] | list[bytes]:
    if (prompts is None) == (pictures is None):
        raise typer.BadParameter("give either --prompts or --pictures")
    if prompts is not None:
        return [line for line in prompts.read_text().splitlines() if line.strip()]
    assert pictures is not None
    checked = []
    for path in sorted(pictures.iterdir()):
        try:
            checked.append(checked_image(path.read_bytes(), max_pixels=max_pixels))
        except InvalidImage as error:
            raise typer.BadParameter(f"{path}: {error}") from error
    return checked


def _model_directory(model: str) -> Path:
    """A directory as given, or by its name among the checkpoints."""
    for directory in (Path(model), Path("checkpoints") / model):
        if directory.is_dir():
            return directory
    raise typer.BadParameter(f"there is no model directory '{model}' or 'checkpoints/{model}'")


def _format_of(out: Path, formats: type[Format]) -> Format:
    suffix = out.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
    if suffix not in list(formats):
        raise typer.BadParameter(f"--out {out} must end in {', '.join(f'.{name}' for name in formats)}")
    return formats(suffix)


if __name__ == "__main__":
    sys.exit(main())
