"""Memory that a program keeps: on CPU each step takes it anew, and the kernel is slow to give it."""

import os
import sys
from pathlib import Path

# One heap of huge pages that grows and never shrinks. By default glibc gives back at each step what threads'
# heaps held and what was mapped by itself.
KEPT = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "arena_max": 1, "mmap_max": 0, "trim_threshold": 2**40}.items()
)
_ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0")


def keep_memory() -> None:
    """Start this program anew with a malloc that keeps its memory, on a Linux machine of CPUs alone.

    XLA's CPU backend takes memory for each step and gives it back, so that the kernel clears it again page by
    page; on a virtual machine the host does too. What is kept makes the peak 1.2 to 1.6 times as high. glibc
    (2.35 or newer; others ignore it) reads the setting where a process starts. What stands in GLIBC_TUNABLES
    already is left alone: GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns this off.
    """
    of_cpus = sys.platform == "linux" and not any(Path(path).exists() for path in _ACCELERATORS)
    if of_cpus and "glibc.malloc.hugetlb" not in os.environ.get("GLIBC_TUNABLES", ""):
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [os.environ.get("GLIBC_TUNABLES", ""), KEPT]))
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
