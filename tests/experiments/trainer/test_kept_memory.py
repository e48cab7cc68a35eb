"""A program starts itself anew to keep its memory where that helps, and comes back as it was called."""

import os
import platform
import subprocess
import sys

import pytest

from experiments.trainer import kept_memory
from experiments.trainer.kept_memory import KEPT


@pytest.mark.parametrize(
    ("system", "accelerator", "before", "after"),
    [
        ("linux", False, None, KEPT),
        ("linux", False, "glibc.malloc.check=1", f"glibc.malloc.check=1:{KEPT}"),
        ("linux", False, "glibc.malloc.hugetlb=0", None),
        ("linux", True, None, None),
        ("darwin", False, None, None),
    ],
)
def test_only_where_it_helps(system, accelerator, before, after, tmp_path, monkeypatch):
    device, calls = tmp_path / "device", []
    if accelerator:
        device.touch()
    monkeypatch.setattr(kept_memory, "_ACCELERATORS", (str(device),))
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(os, "execv", lambda *call: calls.append((call, os.environ["GLIBC_TUNABLES"])))
    monkeypatch.setattr(os, "environ", {} if before is None else {"GLIBC_TUNABLES": before})
    kept_memory.keep_memory()
    assert [got for _, got in calls] == ([after] if after else [])
    assert all(call == (sys.executable, [sys.executable, *sys.orig_argv[1:]]) for call, _ in calls)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its malloc alone has these settings")
def test_the_same_call_again(tmp_path):
    """One restart, with interpreter flags and arguments kept; what was freed is there for the next to ask."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, resource, sys\n"
        "import numpy as np\n"
        "from experiments.trainer import kept_memory\n"
        "kept_memory._ACCELERATORS = ()\n"
        "print('started', flush=True)\n"
        "kept_memory.keep_memory()\n"
        "faults = []\n"
        "for _ in range(3):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    np.zeros(1 << 24, np.uint8).fill(1)\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "print(sys.argv[1:], sys.flags.utf8_mode, os.environ['GLIBC_TUNABLES'])\n"
        "print(faults[0] > 4, max(faults[1:]) < 4)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-X", "utf8", str(script), "--a=b c", "d"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    called = f"['--a=b c', 'd'] 1 {KEPT}"
    assert out.split("\n")[:-1] == ["started", "started", called, "True True"]
