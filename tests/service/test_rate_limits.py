import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import StoreUnavailable
from service.rate_limits import RateLimits, RateLimitStatus, parse_rate_limit
from service.settings import Settings


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[str]:
    """A Redis of this test's own, on a socket in its folder."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server is installed")
    path = tmp_path / "redis.sock"
    server = subprocess.Popen(
        [program, "--port", "0", "--unixsocket", str(path), "--save", ""], stdout=subprocess.DEVNULL, cwd=tmp_path
    )
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    yield f"unix://{path}"
    server.terminate()
    server.wait(20)


async def use_up(redis_url: str | None) -> None:
    # Given a limit of two calls a minute
    limit = parse_rate_limit("2/minute")
    first, second = RateLimits(redis_url), RateLimits(redis_url)
    # When somebody calls three times, and another once
    standings = [await first.count(limit, "key", "a") for _ in range(3)]
    other = await first.count(limit, "key", "b")
    elsewhere = await second.count(limit, "key", "a")
    await first.close()
    await second.close()
    # Then the third call is one too many, the other's is not
    assert [standing.is_allowed for standing in standings] == [True, True, False]
    assert [standing.remaining for standing in standings] == [1, 0, 0]
    assert all(standing.limit == 2 and 50 <= standing.reset_s <= 61 for standing in standings)
    assert other == RateLimitStatus(is_allowed=True, limit=2, remaining=1, reset_s=other.reset_s)
    # And Redis is what servers share
    assert elsewhere.is_allowed is (redis_url is None)


def test_calls_are_counted_for_each_caller() -> None:
    asyncio.run(use_up(None))


@pytest.mark.redis
def test_servers_share_the_count_in_redis(redis_server: str) -> None:
    asyncio.run(use_up(redis_server))


@pytest.mark.redis
def test_burst_is_counted_whole(redis_server: str) -> None:
    async def burst() -> list[RateLimitStatus]:
        limits, limit = RateLimits(redis_server), parse_rate_limit("150/minute")
        standings = await asyncio.gather(*(limits.count(limit, "key", "a") for _ in range(300)))
        await limits.close()
        return standings

    assert sum(standing.is_allowed for standing in asyncio.run(burst())) == 150


def test_redis_that_is_away_is_an_error_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"redis://:s3cret@127.0.0.1:{taken.getsockname()[1]}/0"

        async def count() -> None:
            limits = RateLimits(url)
            with pytest.raises(StoreUnavailable) as raised:
                await limits.count(parse_rate_limit("1/second"), "a")
            assert raised.value.retry_after_s
            await limits.close()

        began = time.monotonic()
        asyncio.run(count())
    assert time.monotonic() - began < 5
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize("text", ["often", "", "0/minute", "1/second;60/minute", "60"])
def test_what_is_no_limit_is_no_setting(text: str) -> None:
    with pytest.raises(ValueError, match="is not a rate limit"):
        parse_rate_limit(text)
    with pytest.raises(ValidationError, match="rate_limit"):
        Settings(rate_limit=text)
