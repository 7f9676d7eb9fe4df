"""The demo's contact sheet and table, from scripted answers. `make demo` runs the whole demo."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from elastic_dit_client import Client
from examples import demo
from examples.demo import (
    ImageAnswer,
    Row,
    contact_sheet,
    figures,
    generate_images,
    rows_of,
    running_server,
    save,
    table,
)
from models.curve import Preset

COLOURS = {preset: (40 * i, 255 - 40 * i, 90) for i, preset in enumerate(Preset)}


def drawn(prompt: str, preset: Preset, compute_ratio: float = 0.5) -> ImageAnswer:
    receipt = {
        "seconds": {"total": 1.234},
        "compute_ratio": compute_ratio,
        "blocks": {"run": 30, "skipped": 15, "reused": 5, "forecast": 50},
        "steps": {"computed": 10, "forecast": 10},
        "num_inference_steps": 20,
    }
    return ImageAnswer(Row("tiny", prompt), preset, receipt, Image.new("RGB", (128, 128), COLOURS[preset]))


def listed(model: str, guidance: str, presets: list[str | None]) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {"id": model, "modality": "image", "guidance": guidance, "curve": [{"preset": preset} for preset in presets]}


def answer_of(**receipt: object) -> httpx2.Response:
    """An answer to POST /v1/images with an image of one colour."""
    png = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(png, "PNG")
    image = base64.b64encode(png.getvalue()).decode()
    body = {"id": "job_1", "model": "tiny", "data": [{"b64_json": image, "seed": demo.SEED}], "output_format": "png"}
    return httpx2.Response(200, json={**body, "receipt": receipt})


def client_of(answer: Callable[[httpx2.Request], httpx2.Response]) -> Client:
    return Client("http://server", http=httpx2.Client(transport=httpx2.MockTransport(answer)))


@pytest.fixture
def two_rows() -> list[ImageAnswer]:
    return [drawn(prompt, preset) for prompt in ("a red circle", "a scene " * 20) for preset in Preset]


def test_sheet_shows_every_image_in_its_row_and_column(two_rows: list[ImageAnswer]) -> None:
    sheet = np.asarray(contact_sheet(two_rows))
    for preset in Preset:
        # Two rows of 256 x 256 pixels; text is drawn in other colours.
        assert (sheet == COLOURS[preset]).all(-1).sum() == 2 * 256 * 256


def test_sheet_has_text_above_and_under_each_image_and_none_is_cut_off(two_rows: list[ImageAnswer]) -> None:
    sheet = np.asarray(contact_sheet(two_rows))
    is_paper = (sheet == 255).all(-1)
    is_image_row = (sheet[:, 12 + 128] == COLOURS[Preset.EXACT]).all(-1)
    starts = np.flatnonzero(np.diff(is_image_row.astype(int)) == 1) + 1
    assert len(starts) == 2
    for start in starts:
        assert not is_paper[start - 24 : start].all()
        for left in range(12, sheet.shape[1] - 12, 256 + 12):
            assert not is_paper[start + 256 : start + 256 + 48, left : left + 256].all()
    assert is_paper[:, -6:].all()
    assert is_paper[-6:].all()


def test_budget_that_a_model_does_not_offer_leaves_its_place_on_the_sheet_empty(two_rows: list[ImageAnswer]) -> None:
    sheet = np.asarray(
        contact_sheet([*two_rows, drawn("a blue ring", Preset.EXACT), drawn("a blue ring", Preset.FAST)])
    )
    for preset in Preset:
        num_images = 3 if preset in (Preset.EXACT, Preset.FAST) else 2
        assert (sheet == COLOURS[preset]).all(-1).sum() == num_images * 256 * 256
    last = sheet[-200]
    for column, preset in enumerate(Preset):
        colour = COLOURS[preset] if preset in (Preset.EXACT, Preset.FAST) else (255, 255, 255)
        assert tuple(last[12 + 268 * column + 128]) == colour


def test_figures_are_time_compute_ratio_computed_steps_and_skip_rate() -> None:
    assert figures(drawn("a red circle", Preset.FAST)) == ("1.23 s, compute 50%", "10 of 20 steps, skipped 15%")


def test_table_has_a_line_for_each_image_and_ends_in_the_means() -> None:
    lines = table([drawn("one", Preset.FAST, 0.4), drawn("two", Preset.FAST, 0.6)]).splitlines()
    assert [line.split() for line in lines if line.startswith("fast")] == [
        ["fast", "1.23", ratio, "10.0", "15.0%", "5.0%"] for ratio in ("40.0%", "60.0%", "50.0%")
    ]


def test_table_has_the_means_of_each_model_alone() -> None:
    other = replace(drawn("two", Preset.FAST, 0.6), row=Row("other", "two"))
    lines = table([drawn("one", Preset.FAST, 0.4), other]).splitlines()
    means = {line: lines[i + 1].split()[2] for i, line in enumerate(lines) if "mean" in line}
    assert means == {"tiny: mean of 1 rows": "40.0%", "other: mean of 1 rows": "60.0%"}


def test_model_with_true_guidance_gets_its_prompt_without_and_with_a_negative_one() -> None:
    without, guided = rows_of(listed("qwen", "true", ["exact"]))
    assert without.negative_prompt is None
    assert guided == replace(without, negative_prompt=demo.NEGATIVE_PROMPT)
    assert guided.title == f"qwen: {demo.GUIDED_PROMPT} (negative prompt: {demo.NEGATIVE_PROMPT})"


@pytest.mark.parametrize("guidance", ["distilled", "none"])
def test_other_models_get_all_prompts_and_no_negative_one(guidance: str) -> None:
    rows = rows_of(listed("flux", guidance, ["exact"]))
    assert rows == [Row("flux", prompt) for prompt in demo.PROMPTS]


def test_every_model_generates_its_rows_at_every_budget_it_offers_after_a_row_that_is_dropped(tmp_path: Path) -> None:
    models = [listed("flux", "distilled", ["exact", None, "high", "fast"]), listed("qwen", "true", ["exact", "draft"])]
    bodies = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/v1/models":
            return httpx2.Response(200, json={"object": "list", "data": models})
        bodies.append(json.loads(request.content))
        return answer_of(
            seconds={"total": 1},
            compute_ratio=1,
            steps={"computed": 4, "forecast": 0},
            blocks={"run": 1, "skipped": 0, "reused": 0, "forecast": 0},
            num_inference_steps=4,
            number=len(bodies),
        )

    images = generate_images(client_of(answer))
    asked = [(body["model"], body["prompt"], body["negative_prompt"], body["budget"]["preset"]) for body in bodies]
    flux = [("flux", prompt, None, preset) for prompt in demo.PROMPTS for preset in ("exact", "high", "fast")]
    negative_prompts = (None, demo.NEGATIVE_PROMPT)
    qwen = [("qwen", demo.GUIDED_PROMPT, words, preset) for words in negative_prompts for preset in ("exact", "draft")]
    assert asked == [*flux[:3], *flux, *qwen[:2], *qwen]
    assert {body["seed"] for body in bodies} == {demo.SEED}
    assert [image.receipt["number"] for image in images] == [*range(4, 16), *range(18, 22)]

    save(images, tmp_path)
    records = json.loads((tmp_path / "receipts.json").read_text())
    assert len({record["image"] for record in records}) == len(images)
    assert all((tmp_path / record["image"]).is_file() for record in records)
    assert [(r["model"], r["prompt"], r["negative_prompt"], r["budget"]) for r in records] == [*flux, *qwen]


def test_refused_request_ends_the_demo_with_the_servers_message() -> None:
    def refuse(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(422, json={"error": {"message": "preset 'fast' is not calibrated"}})

    with pytest.raises(SystemExit, match=r"tiny at budget fast answered 422.*preset 'fast' is not calibrated"):
        demo.generate_image(client_of(refuse), Row("tiny", "a red circle"), Preset.FAST)


def test_image_and_receipt_are_taken_from_the_answer() -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        assert json.loads(request.content)["budget"] == {"preset": "high"}
        return answer_of(compute_ratio=0.7)

    result = demo.generate_image(client_of(answer), Row("tiny", "a red circle"), Preset.HIGH)
    assert result.image.getpixel((0, 0)) == (1, 2, 3)
    assert result.compute_ratio == 0.7


@pytest.mark.server
def test_server_that_cannot_start_ends_the_demo_with_its_log(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-model")
    with pytest.raises(SystemExit, match=r"(?s)The server ended with status [1-9].*no-such-model"):
        running_server(missing, tmp_path / "server.log").__enter__()
