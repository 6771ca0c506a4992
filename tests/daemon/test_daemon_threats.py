"""SECURITY.md names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.quick
def test_every_line_of_the_threat_model_has_its_test() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "threat |" not in line]
    assert len(lines) > 20
    for line in lines:
        named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", line)
        assert named, line
        for file, function in named:
            (path,) = (ROOT / "tests").rglob(file)
            assert not function or f"def {function}(" in path.read_text(), (file, function)
