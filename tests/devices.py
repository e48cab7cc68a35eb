"""How XLA compiles in tests; and modules in a process of their own, as users run them or on eight devices."""

import os
import subprocess
import sys

import jaxlib.version

# Most of a test's time goes into compiling small programs once: leave LLVM's optimizer out, and the emitters
# that feed it several times the code, where that can be chosen (0.12 ends the process at that flag).
_emitters = tuple(map(int, jaxlib.version.__version__.split(".")[:2])) < (0, 12)
QUICK = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * _emitters


def run_alone(module: str, *arguments: str, flags: str = "") -> str:
    """What `python -m module` prints in a process of its own on CPU; fails with its errors if it fails."""
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def run_on_eight_devices(module: str, *arguments: str) -> str:
    """What `python -m module` prints with eight CPU devices."""
    return run_alone(module, *arguments, flags=f"--xla_force_host_platform_device_count=8 {QUICK}")
