"""What the README shows is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_python_examples_run_as_written(tmp_path):
    """Those marked `python`; those marked `py` name repositories that are not at hand."""
    script = "\n".join(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    from_pipeline, text, *events = result.stdout.splitlines()
    assert "video" in text and from_pipeline == text
    assert all(re.fullmatch(r" *[\d.]+ - +[\d.]+ s   score [\d.]+", line) for line in events) and events


def test_every_file_in_the_file_map_exists():
    table = README.split("## Files, in reading order")[1].split("\n\n")[1]
    paths = re.findall(r"`([\w./]+(?:\.\w+|/|run))`", table)
    assert len(paths) > 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_python_file_is_in_the_file_map():
    files = [path.name for path in ROOT.glob("*.py")] + [f"toy/{path.name}" for path in ROOT.glob("toy/[a-z]*.py")]
    assert [file for file in files if f"`{file}`" not in README] == []
