import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from service.logging import JsonFormatter, TextFormatter, add_request_id, current_request_id


def make_record(message: str, **fields: Any) -> logging.LogRecord:
    return logging.getLogger("service.test").makeRecord(
        "service.test", logging.INFO, __file__, 1, message, ("x",), None, extra=fields
    )


def test_json_line_has_the_fields_that_are_there() -> None:
    line = json.loads(JsonFormatter().format(make_record("done\n%s", job_id="job_1", status=200, other="no")))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "service.test",
        "message": "done\nx",
        "job_id": "job_1",
        "status": 200,
    }


def test_json_stays_one_line_with_an_exception() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        record = make_record("failed %s")
        record.exc_info = sys.exc_info()
    text = JsonFormatter().format(record)
    assert "\n" not in text
    assert "ValueError: broken" in json.loads(text)["exception"]


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_lines_while_a_request_is_handled_have_its_id(formatter: logging.Formatter) -> None:
    outside, inside, named = make_record("a %s"), make_record("a %s"), make_record("a %s", request_id="other")
    add_request_id(outside)
    token = current_request_id.set("request-1")
    add_request_id(inside)
    add_request_id(named)
    current_request_id.reset(token)
    assert "request_id" not in formatter.format(outside)
    assert "request-1" in formatter.format(inside)
    assert "other" in formatter.format(named)
    assert "request-1" not in formatter.format(named)


@pytest.mark.slow
def test_only_the_warning_about_torchvision_is_dropped() -> None:
    """In a fresh interpreter, since transformers logs it once in a process."""
    code = (
        "from service.logging import ignore_torchvision_fallback; ignore_torchvision_fallback(); "
        "from transformers import CLIPImageProcessor; from transformers.utils import import_utils; "
        "import_utils.logger.warning('another')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines() == ["[transformers] another"]
