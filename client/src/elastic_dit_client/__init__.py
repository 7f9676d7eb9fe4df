"""A Python client of Elastic DiT Serve, sync and async.

    with Client("http://127.0.0.1:8000") as client:
        result = client.generate_image("a red circle", budget={"preset": "fast"})
        Path("circle.png").write_bytes(result.files[0])

The client knows the HTTP contract and nothing else of the server. `Client` and `AsyncClient` have the same methods.

The client gives every POST an `Idempotency-Key`, so a POST that is sent twice makes one job. The server does not cancel
a job with a key when its connection closes, so the client cancels it: when a `generate_`, `edit_` or `stream_` call is
interrupted, runs out of time or loses the server, and when a stream is closed before its end. Cancelling is best
effort: a client that is killed leaves its job running.
"""

from elastic_dit_client.asynchronous import AsyncClient
from elastic_dit_client.protocol import ApiError, Job, Result, StreamEvent
from elastic_dit_client.sync import Client

__all__ = ["ApiError", "AsyncClient", "Client", "Job", "Result", "StreamEvent"]
