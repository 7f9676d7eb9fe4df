"""Adding models to an engine that is in use, and removing them."""

import shutil
from dataclasses import replace
from pathlib import Path
from weakref import ref

import pytest

from models.engine import Engine
from models.errors import UnknownModel, WeightsError
from models.families.image import ImageFamily
from models.load_options import LoadOptions
from models.zoo import load_engine, load_model, model_directories


def test_removed_model_is_freed_and_others_go_on(tiny_flux: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_flux, tmp_path / "other")
    engine = load_engine([tiny_flux], device="cpu", router_weights=tmp_path)
    alone = engine.cards["tiny-flux"].memory
    load_model(other, device="cpu", router_weights=tmp_path)(engine)
    assert [*engine.cards] == ["tiny-flux", "other"]
    assert engine.cards["tiny-flux"].memory.all_weights == 2 * alone.all_weights
    # Its prompts are cached, as those of the first model are.
    family = engine._family("other")
    assert isinstance(family, ImageFamily)
    request = family.example_request(engine.cards["other"])
    state = engine.start(request)
    assert engine.encode(request).branches[0].was_cached
    freed = ref(family)
    del family, state
    engine.remove("other")
    assert freed() is None
    assert engine.cards["tiny-flux"].memory == alone
    with pytest.raises(UnknownModel):
        engine.start(request)
    mine = replace(request, model="tiny-flux")
    assert not engine.encode(mine).branches[0].was_cached  # all prompts are encoded anew
    engine.step([engine.start(mine)])


def test_model_without_room_is_refused_and_changes_nothing(tiny_flux: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_flux, tmp_path / "other")
    weights = load_engine([tiny_flux], device="cpu", router_weights=tmp_path).cards["tiny-flux"].memory.weights
    options = LoadOptions(device_memory=int(weights * 1.9))
    engine: Engine = load_engine([tiny_flux], device="cpu", router_weights=tmp_path, options=options)
    card = engine.cards["tiny-flux"]
    add = load_model(other, device="cpu", router_weights=tmp_path, options=options)
    with pytest.raises(WeightsError, match=r"the weights of tiny-flux, other take .* serve fewer models"):
        add(engine)
    assert engine.cards == {"tiny-flux": card}


def test_folders_without_a_model_are_left_out(tiny_flux: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_flux, tmp_path / "b")
    shutil.copytree(tiny_flux, tmp_path / "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    assert [path.name for path in model_directories(tmp_path)] == ["a", "b"]
    assert model_directories(tmp_path / "none") == []
