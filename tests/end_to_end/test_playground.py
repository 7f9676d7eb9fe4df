"""The playground in Chromium, with a real server."""

import base64
import json
import re
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
import trimesh
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Route, expect, sync_playwright

from tests.fixtures.forked_server import ForkedElasticDit
from tests.fixtures.reverse_proxy import ReverseProxy

ROOT = Path(__file__).parents[2]
GENERATION_MS = 120_000
ARGUMENTS = [
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A new page. The test fails if the page reports an error in its console or sends a request to another host."""
    page = browser.new_page()
    hosts, complaints = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if is_complaint(message) else None)
    yield page
    page.close()
    assert hosts <= {"127.0.0.1", None}  # blobs have no host
    assert not complaints


def is_complaint(message: ConsoleMessage) -> bool:
    """Chromium also logs every answer with an error status. The page shows those, so they do not count."""
    return message.type == "error" and "Failed to load" not in message.text


def opened(page: Page, url: str, model: str) -> None:
    page.goto(url)
    page.get_by_label("Model").select_option(model)


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()


def run_of(page: Page, budget: str) -> Locator:
    return page.locator("article", has=page.locator("h2", has_text=re.compile(rf", {budget}$")))


def receipt_of(run: Locator) -> dict[str, str]:
    expect(run.locator(".status")).to_have_text(re.compile("^job_"), timeout=GENERATION_MS)
    return dict(zip(run.locator("dt").all_text_contents(), run.locator("dd").all_text_contents(), strict=True))


def file_of(page: Page, run: Locator, folder: Path) -> bytes:
    with page.expect_download() as download:
        run.get_by_role("link", name="Download").click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path.read_bytes()


def test_image_at_a_budget_is_shown_beside_the_exact_one(server: str, page: Page, tmp_path: Path) -> None:
    opened(page, server, "tiny-flux")
    page.locator("#prompt").fill("a green triangle below a red circle")
    page.locator("#preset").select_option("fast")
    expect(page.locator("#expected")).to_contain_text("SSIM to the exact result")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Seed").fill("3")
    generate(page)
    fast, exact = run_of(page, "fast"), run_of(page, "exact")
    receipts = receipt_of(fast), receipt_of(exact)
    assert receipts[1]["Compute"] == "100 %"
    assert int(receipts[0]["Compute"].removesuffix(" %")) < 70
    assert receipts[0]["Seed"] == receipts[1]["Seed"] == "3"
    for run in (fast, exact):
        image = run.locator("img.result")
        expect(image).to_have_js_property("naturalWidth", 128)
    # A direct call of the API gives the same image and decisions.
    body = {"model": "tiny-flux", "prompt": "a green triangle below a red circle", "seed": 3}
    answer = httpx2.post(f"{server}/v1/images", json={**body, "budget": {"preset": "fast"}}, timeout=120).json()
    images = file_of(page, fast, tmp_path), base64.b64decode(answer["data"][0]["b64_json"])
    seen, given = (np.asarray(Image.open(BytesIO(data)), int) for data in images)
    assert np.abs(seen - given).max() <= 1
    blocks = answer["receipt"]["blocks"]
    names = {"run": "run", "reused": "re-used", "skipped": "skipped", "forecast": "forecast"}
    assert receipts[0]["Blocks"] == ", ".join(f"{blocks[decision]} {name}" for decision, name in names.items())
    steps = answer["receipt"]["steps"]
    num_steps = answer["receipt"]["num_inference_steps"]
    assert [receipt["Steps"] for receipt in receipts] == [
        f"{computed} of {num_steps} computed" for computed in (steps["computed"], num_steps)
    ]
    assert [receipt["Calibrated"] for receipt in receipts] == ["yes", "yes"]
    counts = [decisions_shown(run) for run in (fast, exact)]
    assert counts[0] == dict(zip(("run", "reuse", "skip", "forecast"), map(blocks.get, names), strict=True))
    assert counts[0]["forecast"] > 0
    assert counts[1]["run"] == sum(counts[0].values())


def test_picture_is_edited_where_a_mask_is_painted(server: str, page: Page, tmp_path: Path) -> None:
    # Given a picture whose left half is painted over
    pixels = np.full((128, 128, 3), (40, 90, 200), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "blue.png")
    opened(page, server, "tiny-flux")
    page.locator("#prompt").fill("a large red circle in the centre")
    page.get_by_label("Picture to edit").set_input_files(tmp_path / "blue.png")
    expect(page.locator("#strength")).to_have_value("0.8")
    page.locator("#brush").fill("40")
    paint_left_half(page)
    expect(page.locator("#strength")).to_have_value("1")
    page.get_by_label("Also generate the exact result").uncheck()
    # When it is edited
    with page.expect_request("**/v1/images/edits") as sent:
        generate(page)
    receipt_of(page.locator("article"))
    # Then the mask is transparent where it was painted, and the rest is as before
    body = sent.value.post_data_json
    assert body is not None
    assert body["strength"] == 1
    with Image.open(BytesIO(base64.b64decode(body["mask"].split(",")[1]))) as mask:
        changes = np.asarray(mask)[..., 3] < 128
    assert changes.shape == (128, 128)
    assert changes[:, :48].mean() > 0.9
    assert not changes[:, 100:].any()
    made = np.asarray(Image.open(BytesIO(file_of(page, page.locator("article"), tmp_path))), int)
    assert np.array_equal(made[~changes], pixels[~changes])
    assert np.abs(made - pixels)[changes].mean() > 5
    # And the slider shows the picture before
    before = page.locator("article img.before")
    assert before.evaluate("image => image.style.clipPath") == "inset(0px 100% 0px 0px)"
    page.get_by_label("Show the picture before").fill("50")
    assert before.evaluate("image => image.style.clipPath") == "inset(0px 50% 0px 0px)"


def paint_left_half(page: Page) -> None:
    canvas = page.locator("#mask")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    for share in (0.1, 0.25):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 1)
        page.mouse.down()
        page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] - 1, steps=3)
        page.mouse.up()


def test_mask_can_be_cleared_and_the_picture_removed(server: str, page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    opened(page, server, "tiny-flux")
    page.get_by_label("Also generate the exact result").uncheck()
    page.get_by_label("Picture to edit").set_input_files(tmp_path / "red.png")
    paint_left_half(page)
    page.get_by_role("button", name="Clear the mask").click()
    page.locator("#strength").fill("0.3")
    with page.expect_request("**/v1/images/edits") as sent:
        generate(page)
    body = sent.value.post_data_json
    assert body is not None
    assert "mask" not in body
    assert body["strength"] == 0.3
    receipt_of(page.locator("article"))
    page.get_by_role("button", name="Remove").click()
    expect(page.locator("#pictures")).to_be_hidden()
    with page.expect_request("**/v1/images") as sent:
        generate(page)
    assert "image" not in (sent.value.post_data_json or {"image"})


def test_model_made_for_editing_asks_for_a_picture_and_offers_no_mask(server: str, page: Page, tmp_path: Path) -> None:
    def make_for_editing(route: Route) -> None:
        answer = route.fetch()
        models = answer.json()
        models["data"][0] |= {"edits": "reference", "needs_input_image": True, "max_input_images": 3}
        route.fulfill(response=answer, json=models)

    page.route("**/v1/models", make_for_editing)
    opened(page, server, "tiny-flux")
    generate(page)
    expect(page.locator("#notice")).to_have_text("Choose a picture first.")
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / f"{name}.png")
    page.get_by_label("Picture to edit").set_input_files([tmp_path / "red.png", tmp_path / "blue.png"])
    expect(page.locator("#input_preview")).to_be_visible()
    for name in ("#mask", "#strength", "#clear_mask"):
        expect(page.locator(name)).to_be_hidden()
    page.get_by_label("Also generate the exact result").uncheck()
    with page.expect_request("**/v1/images/edits") as sent:
        generate(page)
    body = sent.value.post_data_json
    assert body is not None
    assert len(body["image"]) == 2
    assert not {"mask", "strength"} & body.keys()


def test_transparent_background_is_offered_and_shown_before_a_checkerboard(server: str, page: Page) -> None:
    opened(page, server, "tiny-flux")
    page.locator("#prompt").fill("a large red circle in the centre")
    page.get_by_label("Also generate the exact result").uncheck()
    page.get_by_label("Transparent background").check()
    with page.expect_request("**/v1/images") as sent:
        generate(page)
    assert (sent.value.post_data_json or {})["background"] == "transparent"
    receipt_of(page.locator("article"))
    image = page.locator("article .artifact.transparent img.result")
    corner = """image => {
        const canvas = new OffscreenCanvas(128, 128), context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return context.getImageData(0, 0, 1, 1).data[3];
    }"""
    assert image.evaluate(corner) == 0
    page.get_by_label("Model").select_option("tiny-hunyuan3d")
    expect(page.get_by_label("Transparent background")).to_be_hidden()


def decisions_shown(run: Locator) -> dict[str, int]:
    """The cells of a run's chart by decision, from the legend's colours. `run` has many shades, so it is the rest."""
    data = run.locator("canvas").evaluate("canvas => canvas.toDataURL()")
    with Image.open(BytesIO(base64.b64decode(data.split(",")[1]))) as file:
        pixels = np.asarray(file.convert("RGBA"))[::6, ::8].reshape(-1, 4)
    counts = {}
    for decision in ("reuse", "skip", "forecast"):
        colour = run.locator(f"i.{decision}").evaluate("mark => getComputedStyle(mark).backgroundColor")
        rgba = [*map(int, re.findall(r"\d+", colour)), 255]
        counts[decision] = int((pixels == rgba).all(1).sum())
    return {"run": len(pixels) - sum(counts.values()), **counts}


def test_previews_and_progress_come_before_the_result(server: str, page: Page) -> None:
    opened(page, server, "tiny-flux")
    page.evaluate(
        """() => {
            window.seen = [];
            const note = () => {
                for (const media of document.querySelectorAll(".artifact > *")) window.seen.push(media.className);
                for (const status of document.querySelectorAll(".status")) window.seen.push(status.textContent);
            };
            new MutationObserver(note).observe(document.getElementById("runs"), { childList: true, subtree: true });
        }"""
    )
    page.get_by_label("Also generate the exact result").uncheck()
    generate(page)
    receipt_of(page.locator("article"))
    seen = page.evaluate("() => window.seen")
    assert seen.index("preview") < seen.index("result")
    assert any(re.match(r"computed step \d+ of \d+, \d+ % of the full compute", text) for text in seen)


def test_mesh_is_shown_in_a_viewer(server: str, page: Page, tmp_path: Path) -> None:
    opened(page, server, "tiny-hunyuan3d")
    page.get_by_label("Image of one object").set_input_files(ROOT / "docs/images/solid.png")
    page.get_by_label("Also generate the exact result").uncheck()
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Grid cells").fill("64")
    generate(page)
    run = page.locator("article")
    receipt = receipt_of(run)
    viewer = run.locator("model-viewer.result")
    expect(viewer).to_have_js_property("loaded", True, timeout=GENERATION_MS)
    with Image.open(BytesIO(viewer.screenshot())) as image:
        width, height = image.size
        middle = image.convert("L").crop((width // 4, height // 4, 3 * width // 4, 3 * height // 4))
    assert np.asarray(middle, int).std() > 5  # the background is of one colour
    mesh = trimesh.load(BytesIO(file_of(page, run, tmp_path)), file_type="glb", force="mesh")
    assert isinstance(mesh, trimesh.Trimesh)
    assert receipt["Mesh"] == f"{len(mesh.faces)} faces, watertight"


@pytest.mark.parametrize(
    ("kind", "value", "line", "expected"),
    [
        ("quality", "1", "Compute", r"100 %"),
        ("compute_ratio", "0.5", "Compute", r"([1-4]?\d|50) %"),
        ("latency_ms", "60000", "Deadline", r"met"),
    ],
)
def test_every_kind_of_budget_reaches_the_server(
    server: str, page: Page, kind: str, value: str, line: str, expected: str
) -> None:
    opened(page, server, "tiny-flux")
    page.locator("#budget").select_option(kind)
    page.locator(f"#{kind}").fill(value)
    page.get_by_label("Also generate the exact result").uncheck()
    generate(page)
    receipt = receipt_of(run_of(page, f"{kind} {value}"))
    assert re.fullmatch(expected, receipt[line])


def test_errors_are_shown_at_the_form_or_at_the_run(server: str, page: Page) -> None:
    opened(page, server, "tiny-flux")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Size").fill("13x128")
    page.get_by_label("Also generate the exact result").uncheck()
    generate(page)
    expect(page.locator("article .error")).to_contain_text("width 13 is not within", timeout=GENERATION_MS)
    page.get_by_label("Seed").fill("9007199254740993")  # which a browser would round
    generate(page)
    expect(page.locator("#notice")).to_contain_text("seeds up to 2^53 - 1")
    opened(page, server, "tiny-hunyuan3d")
    generate(page)
    expect(page.locator("#notice")).to_have_text("Choose an image first.")


def test_default_without_a_field_of_its_own_gets_a_plain_one(server: str, page: Page) -> None:
    def add_unknown_defaults(route: Route) -> None:
        answer = route.fetch()
        models = answer.json()
        models["data"][0]["defaults"] |= {"shift": 3.0, "sampler": "euler", "preset": "an id of the page itself"}
        route.fulfill(response=answer, json=models)

    page.route("**/v1/models", add_unknown_defaults)
    opened(page, server, "tiny-flux")
    page.get_by_text("More", exact=True).click()
    expect(page.get_by_label("sampler")).to_have_attribute("placeholder", "euler")
    expect(page.get_by_label("Steps")).to_have_attribute("placeholder", re.compile(r"\d+"))
    page.get_by_label("Also generate the exact result").uncheck()
    page.get_by_label("shift").fill("two")
    generate(page)
    expect(page.locator("#notice")).to_have_text("shift must look like its default, 3.")
    page.get_by_label("shift").fill("2.5")
    with page.expect_request("**/v1/images") as sent:
        generate(page)
    body = sent.value.post_data_json
    assert body is not None
    assert body["shift"] == 2.5
    assert "sampler" not in body
    expect(page.locator("article .error")).to_contain_text("shift")
    page.get_by_label("Model").select_option("tiny-qwen-image")
    expect(page.get_by_label("sampler")).to_have_count(0)


def test_cancelling_stops_the_job(server: str, page: Page) -> None:
    def num_cancelled() -> float:
        metrics = httpx2.get(f"{server}/metrics").text
        line = re.search(
            r'^elastic_requests_total\{model="tiny-flux",status="cancelled"\} (.+)$', metrics, re.MULTILINE
        )
        return float(line[1]) if line else 0

    before = num_cancelled()
    opened(page, server, "tiny-flux")
    page.locator("#preset").select_option("exact")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Steps").fill("100")
    page.get_by_label("Size").fill("256x256")
    generate(page)
    expect(page.locator(".status")).to_have_text(re.compile("^computed step "), timeout=GENERATION_MS)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".status")).to_have_text("cancelled")
    for _ in range(100):
        if num_cancelled() > before:
            break
        page.wait_for_timeout(100)
    assert num_cancelled() == before + 1


def test_server_with_keys_asks_for_one(own_server: Callable[..., ForkedElasticDit], page: Page) -> None:
    entry = {"id": "test", "sha256": sha256(b"a-key-of-the-test").hexdigest(), "scopes": ["generate"]}
    url = own_server(ELASTIC_API_KEYS=json.dumps([entry]), ELASTIC_MODELS="tiny-flux").url
    page.goto(url)
    expect(page.locator("#notice")).to_contain_text("API key")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("API key").fill("a-key-of-the-test")
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#notice")).to_be_empty()
    page.get_by_label("Also generate the exact result").uncheck()
    generate(page)
    receipt_of(page.locator("article"))


def test_page_works_below_a_path(own_server: Callable[..., ForkedElasticDit], page: Page) -> None:
    with ReverseProxy("/tools/images", strips=True) as proxy:
        server = own_server(ELASTIC_PUBLIC_URL=proxy.url, ELASTIC_MODELS="tiny-flux,tiny-hunyuan3d")
        proxy.upstream = urlsplit(server.url).netloc
        asked: list[str] = []
        page.on("request", lambda request: asked.append(urlsplit(request.url).path))
        with page.expect_response("**/model-viewer.min.js") as viewer:
            opened(page, proxy.url, "tiny-hunyuan3d")
        assert viewer.value.ok
        page.get_by_label("Model").select_option("tiny-flux")
        page.locator("#preset").select_option("draft")
        page.get_by_label("Also generate the exact result").uncheck()
        generate(page)
        receipt_of(page.locator("article"))
        assert all(path.startswith("/tools/images") for path in asked if path.startswith("/"))
        page.get_by_role("link", name="API").click()
        expect(page.get_by_text("/v1/images/generations")).to_be_visible(timeout=GENERATION_MS)
