"""The command line: `elastic-dit serve`, `worker`, `generate`, `mesh`, `calibrate`, `convert`, `new-key`."""

import secrets
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from typer.exceptions import TyperException

from models.curve import FORECAST
from models.errors import GenerationError, InvalidRequest
from models.file_formats import MeshFormat, OutputFormat
from service import keys
from service.api.input_image import checked_image
from service.api.parsing import RANDOM_SEEDS
from service.api.responses import ReceiptBody
from service.api.schemas import EditBody, ImageBody, MeshBody
from service.api.validation import invalid_request
from service.budget import budget_fields
from service.errors import BadConfiguration, InvalidImage, ServiceError
from service.installation import find_model
from service.logging import configure_logging, ignore_torchvision_fallback
from service.settings import Settings, load_settings

app = typer.Typer(help="Serve elastic diffusion transformers.", add_completion=False, rich_markup_mode=None)

Format = TypeVar("Format", OutputFormat, MeshFormat)


def _setting(name: str) -> Any:
    """The option of a setting, with the setting's description and default."""
    field = Settings.model_fields[name]
    default = field.default if isinstance(field.default, tuple) else (field.default,)
    return typer.Option(help=f"{field.description}  [default: {','.join(map(str, default))}]")


Host = Annotated[str | None, _setting("host")]
Port = Annotated[int | None, _setting("port")]
Models = Annotated[str | None, _setting("models")]
Device = Annotated[str | None, _setting("device")]
HasWorker = Annotated[
    bool | None,
    typer.Option("--worker/--no-worker", help=f"{Settings.model_fields['worker'].description}  [default: worker]"),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="Devices, separated by commas, such as cuda:0,cuda:1: one process runs on each, at ports from --port on."
    ),
]
Config = Annotated[Path | None, typer.Option(help="A TOML file of settings.")]

Model = Annotated[Path, typer.Option(help="A model directory, or a name in checkpoints/.")]
Seed = Annotated[int | None, typer.Option(help="Random by default.")]
Budget = Annotated[str | None, typer.Option(help="A preset, or quality=0.9, or compute_ratio=0.5.")]
Steps = Annotated[int | None, typer.Option(help="Denoise steps.")]
NegativePrompt = Annotated[
    str | None,
    typer.Option(
        help="What to keep out of the image. Needs --guidance above 1 (Qwen-Image) or --true-cfg-scale above 1 (FLUX)."
    ),
]
TrueCfgScale = Annotated[
    float | None,
    typer.Option(help="FLUX: the scale of true classifier-free guidance. Above 1 it needs --negative-prompt."),
]
ImageGuidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale. FLUX: distilled. Qwen-Image: true classifier-free guidance, off up to 1."),
]
PicturesToEdit = Annotated[
    list[Path] | None, typer.Option(help="A picture to edit; may be given more than once, if the model allows it.")
]
Mask = Annotated[
    Path | None,
    typer.Option(help="A picture that is transparent, or white if it has no transparency, where --image may change."),
]
Strength = Annotated[
    float | None, typer.Option(help="How far the result may be from --image, up to 1. Not for models made for editing.")
]
Background = Annotated[
    str | None, typer.Option(help="transparent cuts the object out; --out is a .png or .webp file then.")
]
ReceiptFile = Annotated[Path | None, typer.Option(help="Also write the receipt to this file, as JSON.")]


@app.command()
def serve(
    host: Host = None,
    port: Port = None,
    models: Models = None,
    device: Device = None,
    worker: HasWorker = None,
    config: Config = None,
) -> None:
    """Load the models and answer HTTP requests. Every setting can be given as an ELASTIC_… variable too."""
    settings = load_settings(config, host=host, port=port, models=models, device=device, worker=worker)
    configure_logging(settings.log_level, settings.log_format)
    from service.app import create_app
    from service.serving import run_server

    run_server(settings, create_app)


@app.command()
def worker(
    host: Host = None,
    port: Port = None,
    models: Models = None,
    device: Device = None,
    devices: Devices = None,
    config: Config = None,
) -> None:
    """Run jobs that servers have queued in the same Redis. Answers /healthz, /readyz, /metrics and /admin/models."""
    settings = load_settings(config, host=host, port=port, models=models, device=device, worker=True)
    configure_logging(settings.log_level, settings.log_format)
    if settings.redis_url is None:
        raise typer.BadParameter("a worker shares a queue with servers: set ELASTIC_REDIS_URL")
    if devices is not None:
        if device is not None:
            raise typer.BadParameter("give --device or --devices, not both")
        from service.supervisor import run_workers, worker_commands

        run_workers(worker_commands(settings, devices, models=models, config=config))
        return
    from service.app import create_worker_app
    from service.serving import run_server

    run_server(settings, create_worker_app)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option(help="The image's description.")],
    model: Model = Path("tiny-flux"),
    negative_prompt: NegativePrompt = None,
    true_cfg_scale: TrueCfgScale = None,
    seed: Seed = None,
    budget: Budget = None,
    steps: Steps = None,
    guidance: ImageGuidance = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT.")] = None,
    image: PicturesToEdit = None,
    mask: Mask = None,
    strength: Strength = None,
    background: Background = None,
    out: Annotated[Path, typer.Option(help="The file to write: .png, .webp or .jpeg.")] = Path("image.png"),
    receipt: ReceiptFile = None,
    device: Device = None,
    config: Config = None,
) -> None:
    """Generate one image, or edit one, without a server."""
    settings = load_settings(config, device=device)
    _check_folders(out, receipt)
    fields = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "true_cfg_scale": true_cfg_scale,
        "size": size,
        "background": background,
        "output_format": _format_of(out, OutputFormat),
        **_shared_fields(seed, budget, steps, guidance),
    }
    directory, random_seed = find_model(model, settings.loras), secrets.randbelow(RANDOM_SEEDS)
    if image:
        data, done = _edit(directory, {**fields, "strength": strength}, image, mask, settings, random_seed)
    elif mask is not None or strength is not None:
        raise typer.BadParameter("--mask and --strength need --image")
    else:
        data, done = _generate(directory, fields, settings, random_seed)
    _write(out, data, receipt, done)


def _generate(directory: Path, fields: dict[str, Any], settings: Settings, seed: int) -> tuple[bytes, ReceiptBody]:
    body = ImageBody.model_validate(fields)
    from service.local import generate_image  # imports torch, so only where something is computed

    return generate_image(directory, body, settings, random_seed=seed)


def _edit(
    directory: Path, fields: dict[str, Any], images: Sequence[Path], mask: Path | None, settings: Settings, seed: int
) -> tuple[bytes, ReceiptBody]:
    # A body needs texts of pictures; the files themselves are read below.
    names = {"image": [str(path) for path in images], "mask": None if mask is None else str(mask)}
    body = EditBody.model_validate({**fields, **names})
    files = {str(path): path.read_bytes() for path in images}
    mask_file = None if mask is None else mask.read_bytes()
    from service.local import edit_image  # imports torch, so only where something is computed

    return edit_image(directory, body, files, mask_file, settings, seed=seed)


@app.command()
def mesh(
    image: Annotated[Path, typer.Option(help="An image of one object.")],
    model: Model = Path("tiny-hunyuan3d"),
    seed: Seed = None,
    budget: Budget = None,
    steps: Steps = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off.")] = None,
    octree_resolution: Annotated[int | None, typer.Option(help="Grid cells along a side.")] = None,
    target_faces: Annotated[int | None, typer.Option(help="The most triangles in the mesh.")] = None,
    remove_background: Annotated[str, typer.Option(help="auto, true or false.")] = "auto",
    out: Annotated[Path, typer.Option(help="The file to write: .glb, .obj, .stl or .ply.")] = Path("mesh.glb"),
    receipt: ReceiptFile = None,
    device: Device = None,
    config: Config = None,
) -> None:
    """Generate one mesh from an image without a server."""
    settings = load_settings(config, device=device)
    _check_folders(out, receipt)
    body = MeshBody.model_validate(
        {
            "input_image": str(image),  # a body needs one; the file itself is read below
            "octree_resolution": octree_resolution,
            "target_faces": target_faces,
            "remove_background": {"true": True, "false": False}.get(remove_background, remove_background),
            "output_format": _format_of(out, MeshFormat),
            **_shared_fields(seed, budget, steps, guidance),
        }
    )
    directory, file = find_model(model, settings.loras), image.read_bytes()
    from service.local import generate_mesh  # imports torch, so only where something is computed

    data, done = generate_mesh(directory, body, file, settings, random_seed=secrets.randbelow(RANDOM_SEEDS))
    _write(out, data, receipt, done)


def _shared_fields(seed: int | None, budget: str | None, steps: int | None, guidance: float | None) -> dict[str, Any]:
    return {
        "seed": seed,
        "budget": None if budget is None else budget_fields(budget),
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }


def _check_folders(out: Path, receipt: Path | None) -> None:
    """Before anything is loaded: a missing folder must not cost a finished result."""
    for option, path in (("--out", out), ("--receipt", receipt)):
        if path is not None and not path.parent.is_dir():
            raise typer.BadParameter(f"{option} {path}: there is no folder {path.parent}; create it, or choose another")


def _write(out: Path, data: bytes, receipt: Path | None, done: ReceiptBody) -> None:
    out.write_bytes(data)
    if receipt is not None:
        receipt.write_text(done.model_dump_json(indent=2, exclude_unset=True) + "\n")
    print(f"{out}: {done.compute_ratio:.0%} of the dense compute, {done.seconds.total:.2f} s")


@app.command()
def calibrate(
    prompts: Annotated[
        Path | None,
        typer.Option(help="For an image model: a text file, one prompt a line. There are built-in prompts."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="For a mesh model: a folder of images. There are built-in ones of solids.")
    ] = None,
    model: Model = Path("tiny-flux"),
    rules: Annotated[
        list[str] | None,
        typer.Option(
            "--rule",
            help="forecast leaves out whole steps. router decides for blocks, and needs trained "
            "routers. May be given more than once: the curve keeps the best of all.  [default: forecast]",
        ),
    ] = None,
    device: Device = None,
    config: Config = None,
) -> None:
    """Learn to forecast a model's steps, and measure its curve of compute against quality.

    Writes forecast.safetensors and calibration.json beside the model's routers. Interrupted, it goes on where it was.
    """
    settings = load_settings(config, device=device)
    samples = _samples(prompts, images, settings.max_image_pixels)
    directory = find_model(model, settings.loras)
    from models.calibration import calibrate_model  # imports torch, so only where something is computed

    path = calibrate_model(
        directory,
        samples,
        rules=rules or [FORECAST],
        device=settings.device,
        router_weights=settings.router_weights,
        background_remover=settings.background_remover,
        options=settings.load_options,
    )
    print(f"{path} written")


def _samples(prompts: Path | None, images: Path | None, max_pixels: int) -> list[str] | list[bytes] | None:
    if prompts is not None and images is not None:
        raise typer.BadParameter("give --prompts or --images, not both")
    if prompts is not None:
        return [line for line in prompts.read_text().splitlines() if line.strip()]
    if images is None:
        return None
    checked = []
    for path in sorted(images.iterdir()):
        try:
            checked.append(checked_image(path.read_bytes(), max_pixels=max_pixels))
        except InvalidImage as error:
            raise typer.BadParameter(f"{path}: {error}") from error
    return checked


@app.command()
def convert(
    source: Annotated[
        Path, typer.Option("--src", exists=True, help="The checkpoint: a file, an index of shards, or a folder.")
    ],
    out: Annotated[Path, typer.Option(help="The model directory to write.")],
    format_name: Annotated[
        str,
        typer.Option(
            "--format",
            help="elastic-dit: the Elastic-DiT checkpoint of Qwen-Image; --base is a directory of Qwen-Image. "
            "hunyuan3d: a .ckpt beside its config.yaml, or their folder; without --base. reorder: a model "
            "directory whose routers, of an earlier version, ask for another order of its neurons.",
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="A model directory with the parts that the checkpoint lacks."),
    ] = None,
    max_shard_gb: Annotated[
        float,
        typer.Option(min=0, help="The largest file of weights. The weights of hunyuan3d stay one file, as published."),
    ] = 5.0,
    config: Config = None,
) -> None:
    """Write a model directory from a checkpoint of another layout, with its routers if it has any."""
    settings = load_settings(config)
    from models.conversion import convert as convert_checkpoint  # imports torch, so only where something is computed

    routers = convert_checkpoint(
        format_name, source, base, out, router_weights=settings.router_weights, max_shard_bytes=int(max_shard_gb * 1e9)
    )
    print(f"{out} and {routers} written")


@app.command()
def new_key(
    key_id: Annotated[str, typer.Option("--id", help="The key's name in logs, and the owner of its jobs.")],
    scopes: Annotated[
        list[keys.Scope] | None,
        typer.Option(
            "--scope", help=f"What the key allows; may be given more than once.  [default: {keys.Scope.GENERATE}]"
        ),
    ] = None,
) -> None:
    """Make an API key. It is shown once; the server's file of keys holds only its hash."""
    secret, entry = keys.new_key(key_id, scopes or [keys.Scope.GENERATE])
    print(
        f"The key, shown only this once:\n\n{secret}\n\nIts entry, for the file that the setting api_keys_file names:\n"
    )
    print(entry.to_toml())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. An expected error is one line on stderr; the exit code is 2 for bad input, else 1."""
    ignore_torchvision_fallback()
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


def _format_of(out: Path, formats: type[Format]) -> Format:
    suffix = out.suffix.lower().removeprefix(".").replace("jpg", "jpeg")
    if suffix not in list(formats):
        raise typer.BadParameter(f"--out {out} must end in {', '.join(f'.{name}' for name in formats)}")
    return formats(suffix)


if __name__ == "__main__":
    sys.exit(main())
