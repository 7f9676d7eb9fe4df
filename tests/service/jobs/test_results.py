from typing import Any

import pytest

from service.errors import ResultExpired

pytestmark = pytest.mark.anyio


async def test_result_is_kept_until_its_time_is_over(bench: Any) -> None:
    await bench.results.put("a/1", (b"one", b"\0two"))
    assert await bench.results.get("a/1") == (b"one", b"\0two")
    await bench.elapse(0.6)
    with pytest.raises(ResultExpired, match=r"job a .* 0.5 s at most"):
        await bench.results.get("a/1")
    await bench.results.put("b/1", (bytes(90),))
    assert await bench.results.get("b/1") == (bytes(90),)


async def test_oldest_result_goes_first_when_there_is_too_much(bench: Any) -> None:
    for name in ("a/1", "b/1", "c/1"):
        await bench.results.put(name, (bytes(40),))
        await bench.elapse(0.01)
    with pytest.raises(ResultExpired):
        await bench.results.get("a/1")
    assert await bench.results.get("b/1") == await bench.results.get("c/1") == (bytes(40),)


async def test_newest_result_is_kept_however_large(bench: Any) -> None:
    await bench.results.put("a/1", (bytes(40),))
    await bench.elapse(0.01)
    await bench.results.put("b/1", (bytes(1000),))
    assert await bench.results.get("b/1") == (bytes(1000),)
    with pytest.raises(ResultExpired):
        await bench.results.get("a/1")


async def test_same_result_put_again_counts_once(bench: Any) -> None:
    await bench.results.put("a/1", (bytes(40),))
    await bench.elapse(0.01)
    for _ in range(3):
        await bench.results.put("b/1", (bytes(50),))
    assert await bench.results.get("a/1") == (bytes(40),)
    assert await bench.results.get("b/1") == (bytes(50),)
