"""Runs a script as a user without this package would: a fresh process in which it cannot be imported.

Its only code is what comes with the checkpoint. The script prints one line of JSON, its last, which is returned.
"""

import json
import os
import subprocess
import sys

PREAMBLE = """
import importlib.abc, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vjepa_qwen":
            raise ImportError("the package is not installed here")

sys.meta_path.insert(0, Blocker())
"""


def run_fresh(script, folder, *arguments, **environment):
    """In `folder`, which gets the caches. Arguments that are no strings arrive as JSON."""
    arguments = [argument if isinstance(argument, str) else json.dumps(argument) for argument in arguments]
    environment = {
        "PATH": "",
        "HOME": str(folder),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        **environment,
    }
    process = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return json.loads(process.stdout.splitlines()[-1])
