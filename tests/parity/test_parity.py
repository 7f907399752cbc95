"""Every recorded run of the original code, each checked by the checker of its longest matching prefix (DESIGN: parity is driven by the files)."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
from parity.not_yet import NOT_YET
from parity.registry import CHECKERS, find_checker, load_fixture

HERE = Path(__file__).parent
SHARED = HERE.parents[1].parent / "shared" / "parity"
FOLDER = Path(os.environ.get("VGEN_PARITY_DIR") or (SHARED if SHARED.is_dir() else HERE / "fixtures"))
FILES = sorted(FOLDER.glob("*.safetensors"))

for module in sorted((HERE / "checkers").glob("*.py")):
    importlib.import_module(f"parity.checkers.{module.stem}")


def _covers(entry: str, name: str) -> bool:
    """Whether a listed family or case stands for `name`: equal, or a prefix that ends at `_` or `.` (as checkers match)."""
    return name == entry or (name.startswith(entry) and name[len(entry)] in "_.")


def test_fixtures_present():
    assert FILES, f"no fixtures in {FOLDER}; set VGEN_PARITY_DIR to a folder of <family>.<case>.safetensors files"


def test_not_yet_holds_nothing_that_has_a_checker():
    stale = [entry for entry in NOT_YET if any(_covers(entry, name) for name in CHECKERS)]
    assert not stale, f"remove {stale} from tests/parity/not_yet.py"


@pytest.mark.parametrize("path", FILES, ids=[file.stem.replace(".", "-", 1) for file in FILES])
def test_parity(path: Path):
    family, case = path.stem.split(".", 1)
    check = find_checker(f"{family}.{case}")
    if check is None:
        if any(_covers(entry, f"{family}.{case}") for entry in NOT_YET):
            pytest.skip(f"{family}.{case} is on the not-yet list")
        pytest.fail(f"no checker for {family}.{case}; write one in tests/parity/checkers/{family}.py")
    check(load_fixture(path))
