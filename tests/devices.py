"""Run a module in a process of its own with eight CPU devices: this one has its single device already."""

import os
import subprocess
import sys


def run_on_eight_devices(module: str, *arguments: str) -> str:
    """What `python -m module` prints; fails with its errors if it fails."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
