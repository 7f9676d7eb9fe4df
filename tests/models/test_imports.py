import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["request", "card", "budget", "report", "errors", "families"])
def test_plain_records_and_tables_import_no_torch(module: str) -> None:
    program = f"import sys, models.{module}; print(sorted({{'torch', 'diffusers', 'numpy'}} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
