"""Generate several images at once with the async client, and watch their progress.

Start a server (`make serve`), then run `python -m examples.async_streams --url http://127.0.0.1:8000`.
"""

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

from elastic_dit_client import AsyncClient

PROMPTS = {
    "circle": "a large red circle in the centre",
    "square": "a small blue square at the top left",
    "ring": "a large white ring in the centre",
}


async def generate(client: AsyncClient, name: str, prompt: str, folder: Path) -> None:
    """Stream one image: print its progress, and write its file when it is done."""
    async with aclosing(client.stream_image(prompt, seed=7)) as events:
        async for event in events:
            if event.name == "job.progress":
                print(f"{name}: step {event.data['step']} of {event.data['num_computed_steps']}")
            elif event.result is not None:
                path = folder / f"{name}.{event.result.output_format}"
                path.write_bytes(event.result.files[0])
                print(f"{name}: {path}")


async def generate_all(url: str, folder: Path) -> None:
    async with AsyncClient(url) as client, asyncio.TaskGroup() as tasks:
        for name, prompt in PROMPTS.items():
            tasks.create_task(generate(client, name, prompt, folder))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.async_streams", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server's address")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder for the files")
    options = parser.parse_args(arguments)
    asyncio.run(generate_all(options.url, options.out))


if __name__ == "__main__":
    main()
