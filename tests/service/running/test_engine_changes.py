"""Changes of an engine's models that other threads ask for."""

from typing import Any

from service.errors import Draining
from service.running.device_use import DeviceUse
from service.running.engine_changes import EngineChanges


def test_change_that_nobody_waits_for_is_not_made() -> None:
    changes, made = EngineChanges(), list[str]()
    gone = changes.ask(lambda engine: made.append("first"))
    kept = changes.ask(lambda engine: made.append("second"))
    assert gone.cancel()
    engine: Any = None
    changes.make(engine, DeviceUse(), on_change=lambda engine: None)
    assert (made, kept.result(0)) == (["second"], None)


def test_changes_of_a_worker_that_has_ended_are_refused() -> None:
    changes = EngineChanges()
    changes.ask(lambda engine: None).cancel()
    left = changes.ask(lambda engine: None)
    changes.refuse()
    late = changes.ask(lambda engine: None)  # the thread may still be alive
    assert [type(change.exception(0)) for change in (left, late)] == [Draining, Draining]
