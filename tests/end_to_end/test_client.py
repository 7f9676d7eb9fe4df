"""The Python client with a real server process."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO

import httpx2
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from elastic_dit_client import ApiError, Client
from training.solids.images import image_file
from training.solids.sampling import sample_solids

PROMPT = "a red circle above a blue square"


@pytest.fixture
def client(server: str) -> Iterator[Client]:
    with Client(server, timeout_s=300) as client:
        yield client


def test_image_of_a_seed_is_the_same_from_generate_stream_and_submit(client: Client) -> None:
    fields = {"seed": 7, "budget": {"preset": "fast"}}
    result = client.generate_image(PROMPT, **fields)
    events = list(client.stream_image(PROMPT, partial_images=2, **fields))
    waited = client.wait(client.submit_image(PROMPT, **fields).id, timeout_s=300)
    streamed = events[-1].result
    assert streamed is not None
    images = [np.asarray(Image.open(BytesIO(answer.files[0]))).astype(int) for answer in (result, streamed, waited)]
    # In any batch, an image differs by rounding at most.
    assert all(np.abs(image - images[0]).max() <= 1 for image in images)
    assert images[0].std() > 0
    previews = [Image.open(BytesIO(event.file)) for event in events if "partial" in event.name and event.file]
    assert len(previews) == 2
    assert [event.data["step"] for event in events if event.name == "job.progress"][-1] > 0
    assert client.content(waited.job_id) == waited.files[0]
    assert client.job(waited.job_id).receipt == waited.receipt


def test_mesh_is_watertight(client: Client) -> None:
    torch.set_num_threads(1)
    result = client.generate_mesh(image_file(sample_solids([3])[0], 1), seed=7, octree_resolution=64)
    mesh = trimesh.load(BytesIO(result.files[0]), file_type=result.output_format, force="mesh")
    assert isinstance(mesh, trimesh.Trimesh)
    assert mesh.is_watertight
    assert result.model == "tiny-hunyuan3d"


def test_cancelled_job_and_abandoned_stream_end(client: Client) -> None:
    fields = {"num_inference_steps": 100, "n": 8, "budget": {"preset": "exact"}}
    job = client.submit_image(PROMPT, **fields)
    with pytest.raises(TimeoutError):
        client.wait(job.id, timeout_s=0.2)
    assert not client.job(job.id).is_terminal
    assert client.cancel(job.id).status == "cancelled"
    with pytest.raises(ApiError, match="job_cancelled"):
        client.wait(job.id)
    with closing(client.stream_image(PROMPT, **fields)) as events:
        job_id = next(events).data["id"]
    assert client.job(job_id).status == "cancelled"


def test_call_that_is_interrupted_by_ctrl_c_cancels_its_job(client: Client, server: str) -> None:
    """The client is interrupted before the answer begins, so it does not know the id of its job yet."""
    code = (
        # Processes that a shell starts in the background ignore Ctrl-C, and so do their children.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import sys; from elastic_dit_client import Client; "
        f"Client(sys.argv[1]).generate_image({PROMPT!r}, num_inference_steps=100, n=8, budget={{'preset': 'exact'}})"
    )
    num_cancelled = metric(server, "elastic_requests_total", 'status="cancelled"')
    process = subprocess.Popen([sys.executable, "-c", code, server], stderr=subprocess.PIPE, text=True)
    while metric(server, "elastic_requests_running") == 0:  # each request takes a millisecond or more
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=120)[1]
    assert metric(server, "elastic_requests_total", 'status="cancelled"') == num_cancelled + 1


def metric(server: str, name: str, label: str = "") -> float:
    """The metric's sum over all series with the label."""
    lines = [line for line in httpx2.get(f"{server}/metrics").text.splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.split()[-1]) for line in lines if label in line)
