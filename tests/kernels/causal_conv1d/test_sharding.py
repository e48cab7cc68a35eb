"""Batch and channels split over a mesh: no gathering, the same numbers."""

import os
import subprocess
import sys


def test_eight_virtual_devices():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    command = [sys.executable, "-m", "tests.kernels.causal_conv1d.sharded"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
