from dataclasses import replace
from typing import Any

import pytest

from models.card import PictureSizes
from models.curve import EXACT, CurvePoint, Preset
from models.memory import MIN_RESERVE, ImageMemory, MeshMemory, Values
from models.mesh.size import grid_bytes
from models.request import ImageEdit, ImageRequest, MeshRequest, PresetBudget, head_of_png
from models.rules.router import RouterPolicy

# FLUX.1-dev in bfloat16.
FLUX = ImageMemory(
    weights=33 * 2**30,
    num_blocks=57,
    token_bytes=2 * 3072,
    latent_bytes=2 * 64,
    step_values=(Values(17.0, 17.0),),
    position_bytes=1024,
    pixels_per_token=16,
    max_text_tokens=512,
    pads_prompts=True,
    encode_token_bytes=2 * 143_360,
    encode_pixel_bytes=2 * 640,
    decode_pixel_bytes=2 * 768,
)


def image(side: int = 1024, **fields: object) -> ImageRequest:
    usual = {
        "model": "flux",
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "seed": 0,
        "budget": PresetBudget(Preset.EXACT),
        "point": EXACT,
        "is_guided": False,
        "prompt": "a red circle",
        "height": side,
        "width": side,
    }
    return ImageRequest(**{**usual, **fields})  # type: ignore[arg-type]


# Megabytes that fake tensors of the device took at published size: between steps, in a step on top, in a decoding.
@pytest.mark.parametrize(
    ("side", "running", "step", "decode"),
    [(512, 5.0, 160.5, 402.8), (1024, 8.9, 481.3, 1611.1), (1536, 15.5, 1016.1, None)],
)
def test_formula_agrees_with_what_was_counted(side: int, running: float, step: float, decode: float | None) -> None:
    memory = FLUX.of(image(side), reuses_blocks=False, forecasts_steps=False)
    assert (memory.running / 1e6, (memory.step + memory.apart) / 1e6) == pytest.approx((running, step), rel=0.03)
    if decode:
        assert memory.decode / 1e6 == pytest.approx(decode, rel=0.03)


def test_large_pictures_pass_the_autoencoder_in_tiles() -> None:
    whole, tiled = (FLUX.of(image(side), reuses_blocks=False, forecasts_steps=False) for side in (1024, 2048))
    assert whole.decode < tiled.decode < 1.1 * whole.decode
    edit = ImageEdit((head_of_png(2048, 2048),), strength=0.5)
    assert (
        FLUX.of(image(2048, edit=edit), reuses_blocks=False, forecasts_steps=False).start
        == 2**20 * FLUX.encode_pixel_bytes
    )


def test_residuals_are_counted_for_each_block_and_branch() -> None:
    alone = FLUX.of(image(), reuses_blocks=True, forecasts_steps=False)
    guided = FLUX.of(image(is_guided=True, true_cfg_scale=2.0), reuses_blocks=True, forecasts_steps=False)
    bank = 57 * (4096 + 512) * 3072 * 2
    assert alone.running - FLUX.of(image(), reuses_blocks=False, forecasts_steps=False).running == bank
    assert guided.running == pytest.approx(2 * alone.running, rel=0.01)


def test_forecast_steps_keep_velocities() -> None:
    without, keeping = (FLUX.of(image(), reuses_blocks=False, forecasts_steps=forecasts) for forecasts in (False, True))
    assert keeping.running - without.running == 3 * 4096 * 128


def test_branches_of_exact_requests_do_not_add_up_where_each_has_its_own_call() -> None:
    fields: dict[str, Any] = {"is_guided": True, "true_cfg_scale": 2.0}
    apart, joined = (
        replace(FLUX, joins_branches=joins).of(image(**fields), reuses_blocks=False, forecasts_steps=False)
        for joins in (False, True)
    )
    one = FLUX.of(image(), reuses_blocks=False, forecasts_steps=False)
    assert apart.apart == one.apart == joined.apart / 2
    elastic = CurvePoint(RouterPolicy(), 0.5, 0.5, 0.9, 0.9)
    shared = FLUX.of(image(**fields, point=elastic), reuses_blocks=False, forecasts_steps=False)
    assert (shared.step, shared.apart) == (joined.apart, 0)
    assert apart.step == 2 * one.step == 2 * 4096 * 128  # the velocities


def test_prompts_count_by_their_bytes_where_they_are_not_padded() -> None:
    qwen = replace(FLUX, pads_prompts=False, template_tokens=5, max_text_tokens=1024)
    tokens = [
        qwen.of(image(prompt=prompt), reuses_blocks=False, forecasts_steps=False).apart // (17 * 6144) - 4096
        for prompt in ("", "é", 5000 * "x")
    ]
    assert tokens == [5, 7, 1024]


def test_pictures_beside_the_noise_count_as_image_tokens() -> None:
    kontext = replace(FLUX, picture_sizes=PictureSizes(area=1024 * 1024))
    edit = ImageEdit((head_of_png(640, 640),))
    with_picture, without = (
        kontext.of(image(edit=given), reuses_blocks=False, forecasts_steps=False) for given in (edit, None)
    )
    assert with_picture.apart - without.apart == 17 * 4096 * 6144
    assert with_picture.start == 1024 * 1024 * FLUX.encode_pixel_bytes


def test_measured_peaks_replace_those_of_the_formula() -> None:
    formula = FLUX.of(image(), reuses_blocks=False, forecasts_steps=False)
    # 100 MB for a call of any size, and 1.1 times the formula for each request
    row = round(1.1 * formula.apart)
    measured = FLUX.measured(image(), alone=10**8 + row, pair=10**8 + 2 * row, decode=2 * formula.decode)
    large = measured.of(image(2048), reuses_blocks=False, forecasts_steps=False)
    assert large.call == 10**8
    assert large.apart == pytest.approx(1.1 * FLUX.of(image(2048), reuses_blocks=False, forecasts_steps=False).apart)
    small = measured.of(image(512), reuses_blocks=False, forecasts_steps=False)
    assert small.decode == pytest.approx(2 * formula.decode / 4)


def test_a_share_of_the_device_is_kept_free() -> None:
    for limit, reserve in ((80 * 2**30, 4 * 2**30), (8 * 2**30, MIN_RESERVE), (8 * 2**20, 2**20)):
        memory = replace(FLUX, limit=limit, all_weights=1000)
        assert (memory.reserve, memory.room) == (reserve, limit - reserve - 1000)


def test_fewer_points_of_a_field_are_read_at_once_where_memory_is_short() -> None:
    memory = MeshMemory(
        weights=6 * 2**30,
        all_weights=6 * 2**30,
        num_blocks=21,
        token_bytes=4096,
        latent_bytes=256,
        step_values=(Values(27.0, 0.0),),
        num_latents=4096,
        num_text_tokens=1,
        encode_bytes=0,
        context_bytes=2_800_000,
        field_bytes=16_000_000,
        field_peak_bytes=100_000_000,
        points_per_call=2**17,
        point_bytes=23_000,
    )
    request = MeshRequest(
        model="ball",
        num_inference_steps=50,
        guidance_scale=5.0,
        seed=0,
        budget=PresetBudget(Preset.EXACT),
        point=EXACT,
        is_guided=True,
        input_image=b"",
        octree_resolution=384,
    )
    for limit, decode in ((80 * 2**30, 2**17 * 23_000), (8 * 2**30, 0.25 * 1.5 * 2**30)):
        limited = replace(memory, limit=limit).of(request, reuses_blocks=False, forecasts_steps=False)
        assert limited.decode == pytest.approx(decode, rel=0.001)
        assert limited.grid == grid_bytes(384) + 16_000_000
