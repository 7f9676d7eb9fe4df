"""Is the engine right and fast at the sizes that people run? Ten minutes of one H200, or the same code on a CPU.

`python -m benchmarks.real_size` builds FLUX.1-dev, Qwen-Image and Hunyuan3D-2.1 at their published sizes, with random
weights, on the device. `--reduced` takes small shapes, for a CPU. Sections come in order of importance, and need no
other; each writes a file of its own after every table, so that a run that is cut keeps what was measured:

exact    exact results against the stock pipeline's, both also compiled (stock by `compile_repeated_blocks`):
         `is_bitwise_equal`, the largest `difference` of latents from those of stock, and times
savings  forecast steps, and forced plans of blocks with routers that are read, at .75, .5 and .35 of the compute, and
         fewer steps of stock: the time over stock's, also over the share of compute (`per_compute`, 1 at best)
batches  1, 2 and 4 requests at 1024 and 512: stock, exact, dense in shared calls, equal plans, mixed plans
host     operators, kernels and waits for the device in a step
memory   bytes of weights, requests, steps and decodings against the formula of `models.memory`
overlap  steps beside a decoding on a stream of its own
meshes   the stages from a picture to a mesh's file

A section starts no round after its time, and none starts after `--minutes`. One that fails says so in its file, and
the others run.
"""

import argparse
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.environment import environment
from benchmarks.real_size.device_use import host, memory
from benchmarks.real_size.meshes import meshes
from benchmarks.real_size.section import Section, Setting
from benchmarks.real_size.sections import batches, exact, overlap, savings
from benchmarks.table import TableRow, finish, show, write

SECTIONS = (
    Section("exact", 150, exact),
    Section("savings", 130, savings),
    Section("batches", 110, batches),
    Section("host", 40, host),
    Section("memory", 40, memory),
    Section("overlap", 40, overlap),
    Section("meshes", 60, meshes),
)
_REDUCED_SHARE = 0.25


def run(section: Section, setting: Setting, path: Path) -> bool:
    """Run one section, and write its file. Returns whether it ended without a fault."""
    began, tables = time.monotonic(), dict[str, Sequence[TableRow]]()
    result = {
        "benchmark": f"real_size {section.name}",
        "environment": environment(),
        "run_on": f"{setting.device} in {setting.dtype}",
        "reduced": setting.is_reduced,
        "seconds": 0.0,
        "fault": "not ended",
        "tables": tables,
    }
    try:
        for table in section.run(setting):
            show(table.title, table.rows)
            tables[table.title] = table.rows
            write({**result, "seconds": time.monotonic() - began}, path)
        fault = None
    except Exception as error:  # the other sections are worth their time
        traceback.print_exc()
        fault = repr(error)
    setting.free()
    finish({**result, "seconds": time.monotonic() - began, "fault": fault}, path)
    return fault is None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu:0")
    parser.add_argument("--reduced", action="store_true", help="small shapes, for a CPU; about five minutes")
    parser.add_argument("--sections", type=lambda text: text.split(","), default=names, help=f"of {','.join(names)}")
    parser.add_argument("--minutes", type=float, default=10.0, help="no section starts after so many; 10")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder of the files")
    arguments = parser.parse_args()
    if unknown := {*arguments.sections} - {*names}:
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(names)}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device).replace(" ", "-").lower() if device.type == "cuda" else "cpu"
    began, good = time.monotonic(), True
    chosen = [section for section in SECTIONS if section.name in arguments.sections]
    for number, section in enumerate(chosen, 1):
        passed = time.monotonic() - began
        if passed > 60 * arguments.minutes:
            raise SystemExit(f"no time is left for {', '.join(left.name for left in chosen[number - 1 :])}")
        cap_s = section.cap_s * (_REDUCED_SHARE if arguments.reduced else 1)
        print(f"\n{passed:.0f} s: {section.name}, {number} of {len(chosen)}, about {cap_s:.0f} s", flush=True)
        setting = Setting(device, torch.bfloat16, arguments.reduced, cap_s)
        reduced = "-reduced" if arguments.reduced else ""
        good &= run(section, setting, arguments.out / f"real-size{reduced}-{name}-{section.name}.json")
    if not good:
        raise SystemExit("not all sections ended without a fault")


if __name__ == "__main__":
    main()
