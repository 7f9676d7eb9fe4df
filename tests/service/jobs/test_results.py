from pathlib import Path
from threading import Event
from typing import Any

import pytest

from service.errors import ResultExpired, StoreUnavailable
from service.jobs import results
from service.jobs.results import VolumeResults

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


@pytest.fixture
def clock() -> Any:
    return Clock()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def volume(tmp_path: Path, clock: Clock) -> VolumeResults:
    return VolumeResults(f"file://{tmp_path}", ttl_s=10.0, max_bytes=100, on_error=pytest.fail, clock=clock)


BROKEN_ENTRIES = [b"", b'{"put_at": 1000.0, "num_fi', b"[]", b'{"put_at": 1000.0, "num_files": "x", "size_bytes": 1}']


@pytest.mark.parametrize("entry", BROKEN_ENTRIES)
async def test_result_with_a_broken_entry_has_expired(entry: bytes, volume: VolumeResults, tmp_path: Path) -> None:
    for key in ("a/1", "b/1"):
        await volume.put(key, (b"one",))
    (tmp_path / "a/1/entry.json").write_bytes(entry)
    with pytest.raises(ResultExpired, match="job a"):
        await volume.get("a/1")
    await volume.put("c/1", (bytes(90),))  # looks at all results, to drop the oldest
    assert await volume.get("c/1") == (bytes(90),)


@pytest.mark.parametrize("content", [b"on", None])
async def test_damaged_result_has_expired(content: bytes | None, volume: VolumeResults, tmp_path: Path) -> None:
    await volume.put("a/1", (b"one",))
    (tmp_path / "a/1/0").unlink()
    if content is not None:
        (tmp_path / "a/1/0").write_bytes(content)
    with pytest.raises(ResultExpired, match="job a"):
        await volume.get("a/1")


async def test_only_what_writers_left_incomplete_is_removed_in_time(
    volume: VolumeResults, tmp_path: Path, clock: Clock
) -> None:
    incomplete, foreign = tmp_path / f"job_{'a' * 32}" / ("b" * 32), tmp_path / "photos" / "2026"
    for folder in (incomplete, foreign):
        folder.mkdir(parents=True)
        (folder / "0").write_bytes(b"half")
    for seconds in (0.0, 2.0, 9.0):  # each time, it looks for old results
        assert incomplete.exists()
        clock.now += seconds
        await volume.put("a/1", (bytes(20),))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "photos"}
    assert (foreign / "0").exists()


async def test_folder_of_a_job_goes_with_its_results(volume: VolumeResults, tmp_path: Path, clock: Clock) -> None:
    for key in ("a/1", "a/2", "b/1"):
        await volume.put(key, (bytes(20),))
    clock.now += 20.0
    await volume.put("c/1", (bytes(20),))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


async def test_volume_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, errors = Event(), list[str]()
    for name in ("CHECK_LIMIT_S", "RESULTS_LIMIT_S"):
        monkeypatch.setattr(results, name, 0.01)
    volume = VolumeResults(f"file://{tmp_path}", ttl_s=10.0, max_bytes=100, on_error=errors.append, clock=Clock())
    with monkeypatch.context() as patched:
        patched.setattr(volume._files, "makedirs", lambda path, exist_ok: answers.wait(60))
        for call in (volume.check(), volume.put("a/1", (b"one",))):
            with pytest.raises(StoreUnavailable, match="does not answer"):
                await call
    answers.set()
    assert errors == ["check", "put_results"]
