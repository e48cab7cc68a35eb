"""Huge pages for what a program allocates: on CPU each step takes new memory, slow in small pages."""

import os
import sys
from pathlib import Path

_LINUX = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Start this program anew with malloc asking for huge pages, where Linux leaves it to the program.

    XLA's CPU backend takes memory for each step and gives it back, so that the kernel clears it again page by
    page. glibc (2.35 or newer; others ignore it) reads the setting where a process starts. What stands in
    GLIBC_TUNABLES already is left alone: GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns this off.
    """
    left_to_us = _LINUX.exists() and "[madvise]" in _LINUX.read_text()
    if left_to_us and "glibc.malloc.hugetlb" not in os.environ.get("GLIBC_TUNABLES", ""):
        chosen = [os.environ.get("GLIBC_TUNABLES", ""), "glibc.malloc.hugetlb=1"]
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, chosen))
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
