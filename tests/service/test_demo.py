"""The demo's drawing and its table, from answers made up here; the whole demo runs in `make demo`."""

import base64
import io
import json
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from models.request import Preset
from service import demo
from service.demo import Drawn, contact_sheet, figures, running_server, table

COLOURS = {preset: (40 * i, 255 - 40 * i, 90) for i, preset in enumerate(Preset)}


def drawn(prompt: str, preset: Preset, compute_ratio: float = 0.5) -> Drawn:
    receipt = {
        "seconds": {"total": 1.234},
        "compute_ratio": compute_ratio,
        "blocks": {"run": 60, "skipped": 30, "reused": 10},
    }
    return Drawn(prompt, preset, Image.new("RGB", (128, 128), COLOURS[preset]), receipt)


@pytest.fixture
def two_rows() -> list[Drawn]:
    return [drawn(prompt, preset) for prompt in ("a red circle", "a scene " * 20) for preset in Preset]


def test_sheet_shows_every_picture_in_its_row_and_column(two_rows: list[Drawn]) -> None:
    sheet = np.asarray(contact_sheet(two_rows))
    for preset in Preset:
        # Two rows of 256 x 256 pixels; text is drawn in other colours.
        assert (sheet == COLOURS[preset]).all(-1).sum() == 2 * 256 * 256


def test_sheet_has_text_above_and_under_each_picture_and_none_is_cut_off(two_rows: list[Drawn]) -> None:
    sheet = np.asarray(contact_sheet(two_rows))
    is_paper = (sheet == 255).all(-1)
    is_picture_row = (sheet[:, 12 + 128] == COLOURS[Preset.EXACT]).all(-1)
    starts = np.flatnonzero(np.diff(is_picture_row.astype(int)) == 1) + 1
    assert len(starts) == 2
    for start in starts:
        assert not is_paper[start - 24 : start].all()
        for left in range(12, sheet.shape[1] - 12, 256 + 12):
            assert not is_paper[start + 256 : start + 256 + 48, left : left + 256].all()
    assert is_paper[:, -6:].all()
    assert is_paper[-6:].all()


def test_figures_are_time_compute_ratio_skip_rate_and_reuse_rate() -> None:
    assert figures(drawn("a red circle", Preset.FAST)) == ("1.23 s, compute 50%", "skipped 30%, reused 10%")


def test_table_has_a_line_for_each_picture_and_ends_in_the_means() -> None:
    lines = table([drawn("one", Preset.FAST, 0.4), drawn("two", Preset.FAST, 0.6)]).splitlines()
    assert [line.split() for line in lines if line.startswith("fast")] == [
        ["fast", "1.23", ratio, "30.0%", "10.0%"] for ratio in ("40.0%", "60.0%", "50.0%")
    ]


def test_refused_request_ends_the_demo_with_the_servers_message() -> None:
    def refuse(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(422, json={"error": {"message": "preset 'fast' is not calibrated"}})

    with (
        httpx2.Client(transport=httpx2.MockTransport(refuse), base_url="http://server") as client,
        pytest.raises(SystemExit, match=r"422.*preset 'fast' is not calibrated"),
    ):
        demo.draw(client, "a red circle", Preset.FAST)


def test_picture_and_receipt_are_taken_from_the_answer() -> None:
    png = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(png, "PNG")

    def answer(request: httpx2.Request) -> httpx2.Response:
        assert json.loads(request.content)["budget"] == {"preset": "high"}
        picture = base64.b64encode(png.getvalue()).decode()
        return httpx2.Response(200, json={"data": [{"b64_json": picture}], "receipt": {"compute_ratio": 0.7}})

    with httpx2.Client(transport=httpx2.MockTransport(answer), base_url="http://server") as client:
        result = demo.draw(client, "a red circle", Preset.HIGH)
    assert result.picture.getpixel((0, 0)) == (1, 2, 3)
    assert result.compute_ratio == 0.7


def test_server_that_cannot_start_ends_the_demo_with_its_log(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-model")
    with pytest.raises(SystemExit, match=r"(?s)The server ended with status [1-9].*no-such-model"):
        running_server(missing, tmp_path / "server.log").__enter__()
