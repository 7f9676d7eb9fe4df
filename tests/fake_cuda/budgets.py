"""The budgets of `test_budgets`. `python -m tests.fake_cuda.budgets --write` measures them again, all or `--only` some.

A change that saves bytes, kernels or waits comes with its new budgets; a change that raises them says why.
"""

import argparse
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fake_cuda.device import load_guard
from tests.fake_cuda.scenarios import MODELS, measure

FILE = Path(__file__).with_name("budgets.json")
COMPILER = shutil.which("c++") or shutil.which("g++")


@contextmanager
def process() -> Iterator[ProcessPoolExecutor]:
    """A process for `measure`: with the guard, PyTorch takes this machine for one with a GPU."""
    assert COMPILER
    context = multiprocessing.get_context("spawn")
    with (
        TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, context, initializer=load_guard, initargs=(Path(folder), COMPILER)) as pool,
    ):
        yield pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the budgets, else print what was measured")
    parser.add_argument("--only", choices=MODELS, nargs="+", default=list(MODELS))
    arguments = parser.parse_args()
    budgets = json.loads(FILE.read_text()) if FILE.exists() else {}
    with process() as pool:
        for name in arguments.only:
            budgets[name] = pool.submit(measure, name).result()
            del budgets[name]["compared"]
            print(name, json.dumps(budgets[name], indent=1), flush=True)
    if arguments.write:
        FILE.write_text(json.dumps(budgets, indent=2) + "\n")


if __name__ == "__main__":
    main()
