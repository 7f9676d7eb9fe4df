import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.curve import EXACT
from models.families.image import Branch
from models.load_options import LoadOptions
from models.prompt_cache import PromptCache
from models.request import ImageRequest
from models.state import BranchInputs
from models.zoo import load_engine


def embedded(num_floats: int) -> BranchInputs:
    return BranchInputs(torch.zeros(1, num_floats, 1), torch.zeros(1, 2))


def test_prompts_used_last_are_kept_within_the_bytes() -> None:
    cache = PromptCache(max_bytes=100)

    def look_up(prompt: str, num_floats: int = 8, model: str = "a") -> bool:
        _, was_cached = cache.look_up(model, prompt, lambda: embedded(num_floats))
        return was_cached

    # Each takes 40 bytes
    assert [look_up(prompt) for prompt in ("red", "blue", "red", "green")] == [False, False, True, False]
    # Then the one that was not used for longest is gone
    assert [look_up(prompt) for prompt in ("red", "green", "blue")] == [True, True, False]
    # And models do not share
    assert not look_up("blue", model="b")
    # And what is larger than all bytes is not kept, nor does the empty prompt ever go
    assert not look_up("", 1000)
    assert not look_up("large", 1000)
    assert not look_up("large", 1000)
    assert look_up("", 1000)


def test_nothing_but_the_empty_prompt_is_kept_in_no_bytes() -> None:
    cache = PromptCache(max_bytes=0)
    found = [cache.look_up("a", prompt, lambda: embedded(1))[1] for prompt in ("red", "red", "", "")]
    assert found == [False, False, False, True]


def test_what_cannot_be_encoded_is_not_kept() -> None:
    cache = PromptCache(max_bytes=100)

    def fail() -> BranchInputs:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.look_up("a", "red", fail)
    assert cache.look_up("a", "red", lambda: embedded(1))[1] is False


class Counted:
    """An engine for one tiny model, and the prompts that its text encoders have encoded."""

    def __init__(
        self, directory: Path, prompt_cache_bytes: int, router_weights: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = router_weights / directory.name
        folder.mkdir(exist_ok=True)
        defaults = {"num_inference_steps": 4, "guidance_scale": 2.5, "height": 64, "width": 64}
        (folder / "manifest.json").write_text(json.dumps({"license": "mit", "defaults": defaults}))
        options = LoadOptions(prompt_cache_bytes=prompt_cache_bytes)
        self.engine = load_engine([directory], device="cpu", router_weights=router_weights, options=options)
        self.prompts: list[str] = []
        family: Any = self.engine._families[directory.name]
        encode = family._encode

        def noted(branch: Branch, pictures: Any) -> BranchInputs:
            self.prompts.append(branch.prompt)
            result: BranchInputs = encode(branch, pictures)
            return result

        monkeypatch.setattr(family, "_encode", noted)
        example = family.example_request(self.engine.cards[directory.name])
        self.request = replace(example, prompt="a red circle", is_guided=True, true_cfg_scale=2.0)

    def latents(self, request: ImageRequest, branches: Any = None) -> torch.Tensor:
        """After one step."""
        state = self.engine.start(request, EXACT, encoded=self.engine.encode(request, branches))
        self.engine.step([state])
        return state.latents


def test_equal_prompts_are_encoded_once_and_images_stay_the_same(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, fresh = (Counted(tiny_flux, size, tmp_path, monkeypatch) for size in (10**9, 0))
    request = replace(kept.request, seed=1, guidance_scale=7.0)
    first, again = kept.engine.encode(kept.request), kept.engine.encode(request)
    assert [branch.was_cached for branch in first.branches] == [False, False]
    assert [branch.was_cached for branch in again.branches] == [True, True]
    # The text is shared, and neither the noise nor the guidance scale is
    assert kept.latents(request).equal(fresh.latents(request))
    assert kept.prompts == ["a red circle", ""]
    # Without bytes, only the empty prompt is kept
    fresh.engine.encode(request)
    assert fresh.prompts == ["a red circle", "", "a red circle"]


def test_requests_that_differ_in_their_seed_share_what_is_encoded(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(tiny_flux, 0, tmp_path, monkeypatch)
    other = replace(counted.request, seed=1)
    alone = counted.latents(other)
    branches = counted.engine.encode(counted.request).branches
    counted.prompts.clear()
    assert counted.latents(other, branches).equal(alone)
    assert counted.prompts == []


@pytest.mark.usefixtures("small_pictures")
def test_prompts_that_are_seen_with_pictures_are_not_kept(
    tiny_qwen_image_edit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(tiny_qwen_image_edit, 10**9, tmp_path, monkeypatch)
    for _ in range(2):
        assert {branch.was_cached for branch in counted.engine.encode(counted.request).branches} == {None}
    assert len(counted.prompts) == 4
