"""The time that a word takes from one core to another: they may share a cache, or not.

A virtual machine's cores move between its host's. On AMD's servers the cores of one chiplet share their last
cache: a word takes some 30 ns between them, and 180 ns to another chiplet. Work that cores hand each other
takes longer there, and a benchmark that does not know where it ran measures the host's choice.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

APART = 100.0  # ns: cores that share a cache answer faster

_SOURCE = """
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

static _Alignas(64) atomic_int word;
static int turns, cores[2];
static double nanoseconds;

static void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  sched_setaffinity(0, sizeof set, &set);
}

static void *answer(void *unused) {
  pin(cores[1]);
  for (int i = 0; i < turns; i++) {
    while (atomic_load(&word) != 2 * i + 1);
    atomic_store(&word, 2 * i + 2);
  }
  return 0;
}

static void *ask(void *unused) {
  struct timespec start, end;
  pin(cores[0]);
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int i = 0; i < turns; i++) {
    atomic_store(&word, 2 * i + 1);
    while (atomic_load(&word) != 2 * i + 2);
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  nanoseconds = ((end.tv_sec - start.tv_sec) * 1e9 + end.tv_nsec - start.tv_nsec) / 2 / turns;
  return 0;
}

double latency(int first, int second, int count) {
  pthread_t threads[2];
  cores[0] = first, cores[1] = second, turns = count, word = 0;
  pthread_create(&threads[0], 0, answer, 0);
  pthread_create(&threads[1], 0, ask, 0);
  for (int i = 0; i < 2; i++) pthread_join(threads[i], 0);
  return nanoseconds;
}
"""


def latency(turns: int = 3000) -> float | None:
    """Nanoseconds from one core's store to another core's load, of the first two that this process may use.

    None where it can't be measured: without a C compiler, a second core, or Linux's way of choosing cores.
    """
    probe = _probe()
    if probe is None:
        return None
    first, second, *_ = sorted(os.sched_getaffinity(0))
    return float(probe(first, second, turns))


def apart() -> bool | None:
    """True while the cores share no cache; None where that can't be told."""
    found = latency()
    return None if found is None else found > APART


@cache
def _probe() -> ctypes._CFuncPtr | None:
    compiler = shutil.which("cc")
    if compiler is None or not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        command = [compiler, "-O2", "-shared", "-fPIC", "-pthread", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=_SOURCE, text=True, check=True)
        probe = ctypes.CDLL(str(library)).latency
    probe.argtypes, probe.restype = [ctypes.c_int] * 3, ctypes.c_double
    return probe
