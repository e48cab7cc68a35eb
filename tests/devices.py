"""XLA's options in tests; and modules in a process of their own, as users run them or on eight devices."""

import json
import os
import subprocess
import sys
import tempfile
import threading

import jaxlib.version

# Most of a test's time goes into compiling small programs once: leave LLVM's optimizer out, don't split a
# program into 32 modules, and leave out the emitters that make several times the code, where that can be
# chosen (0.11.2 ends the process at that flag).
_emitters = tuple(map(int, jaxlib.version.__version__.split(".")[:2])) < (0, 11)
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
QUICK += " --xla_cpu_use_fusion_emitters=false" * _emitters


def _environment(flags: str) -> dict[str, str]:
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run_alone(module: str, *arguments: str, flags: str = "") -> str:
    """Return the output of `python -m module` in a process of its own on CPU; fail with its errors."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=_environment(flags), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


class _EightDevices:
    """The process of tests/eight_devices.py: starts at the first request, again if it ended, and is shared.

    `seconds` is the CPU time it has told of: a child that still runs is in no count of the system's.
    """

    def __init__(self):
        self.process, self.errors, self.seconds = None, None, 0.0

    def ask(self, *request: str) -> dict:
        if self.process is None or self.process.poll() is not None:
            self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.eight_devices"],
                env=_environment(f"--xla_force_host_platform_device_count=8 {QUICK}"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        limit = threading.Timer(600, self.process.kill)
        limit.start()
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        limit.cancel()
        if not line:  # it crashed, or took too long
            status = self.process.wait()
            self.errors.seek(0)
            raise AssertionError(f"{request}: the process ended with {status}\n{self.errors.read()[-8000:]}")
        answer = json.loads(line)
        self.seconds += answer["seconds"]
        return answer


EIGHT = _EightDevices()


def run_on_eight_devices(module: str, *arguments: str) -> str:
    """Return the output of `python -m module` with eight CPU devices, in the process shared by all tests."""
    answer = EIGHT.ask(module, *arguments)
    assert answer["error"] is None, f"{answer['printed']}\n{answer['error']}"
    return answer["printed"]
