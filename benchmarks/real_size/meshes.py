"""The section about meshes: the seconds of each stage from a picture to a mesh's file."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from benchmarks.meshes import held_out_solids
from benchmarks.real_size.section import Setting, Table
from benchmarks.real_size.steps import synchronize
from benchmarks.real_size.subjects import RandomHunyuan3D, random_hunyuan3d
from benchmarks.table import TableRow
from models.curve import EXACT, Preset
from models.engine import Engine
from models.file_formats import MeshFormat
from models.mesh.file import make_mesh_file
from models.mesh.volume import finished
from models.request import MeshRequest, PresetBudget
from training.solids.images import image_file

T = TypeVar("T")


def meshes(setting: Setting) -> Iterator[Table]:
    """How long does Hunyuan3D-2.1 take from a picture to a file? The first mesh, of few steps, warms up."""
    family = random_hunyuan3d(setting.device, setting.dtype, is_reduced=setting.is_reduced)
    resolution, num_steps = (64, 10) if setting.is_reduced else (384, family.default_num_inference_steps)
    request = MeshRequest(
        model=family.model_id,
        num_inference_steps=num_steps,
        guidance_scale=family.default_guidance_scale,
        seed=0,
        budget=PresetBudget(Preset.EXACT),
        point=EXACT,
        is_guided=True,
        input_image=image_file(held_out_solids(1)[0], 0),
        octree_resolution=resolution,
    )
    _stages(family, replace(request, num_inference_steps=2))
    yield Table(f"hunyuan3d, {num_steps} steps, resolution {resolution}", _stages(family, request))


def _stages(family: RandomHunyuan3D, request: MeshRequest) -> list[TableRow]:
    rows: list[TableRow] = []

    def timed(stage: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        result = work()
        synchronize(family.device)
        rows.append({"stage": stage, "seconds": time.perf_counter() - began})
        return result

    engine = Engine({family.model_id: family}, {})
    prepared = timed("prepare the picture", family.preparation(request))
    state = timed("encode it", lambda: family.start(prepared, (EXACT,), EXACT))

    def denoise() -> None:
        while not state.is_done:
            engine.step([state])

    timed("denoise", denoise)
    decoding = engine.decode_in_turns(state)
    assert decoding is not None
    samples = timed("decode the field", lambda: finished(decoding))
    timed("extract the surface, write the file", lambda: make_mesh_file(samples, None, MeshFormat.GLB))
    return rows
