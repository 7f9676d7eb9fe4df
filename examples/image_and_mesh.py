"""Generate an image, and a mesh from an image file, with the Python client.

Start a server (`make serve`), then run `python -m examples.image_and_mesh --url http://127.0.0.1:8000`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from elastic_dit_client import Client

SOLID = Path(__file__).resolve().parents[1] / "docs" / "images" / "solid.png"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.image_and_mesh", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder for the files")
    options = parser.parse_args(arguments)
    with Client(options.url) as client:
        image = client.generate_image("a large red circle in the centre", seed=7, budget={"preset": "fast"})
        mesh = client.generate_mesh(SOLID, seed=7, budget={"quality": 0.9})
    for name, result in (("image", image), ("mesh", mesh)):
        path = options.out / f"{name}.{result.output_format}"
        path.write_bytes(result.files[0])
        print(f"{path}: {result.receipt['compute_ratio']:.0%} of the dense compute of {result.model}")


if __name__ == "__main__":
    main()
