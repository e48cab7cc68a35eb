"""A program starts itself anew for huge pages where they help, and comes back as it was called."""

import os
import subprocess
import sys

import pytest

from experiments.trainer import huge_pages


@pytest.mark.parametrize(
    ("kernel", "before", "after"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_only_where_it_helps(kernel, before, after, tmp_path, monkeypatch):
    setting, calls = tmp_path / "enabled", []
    if kernel:
        setting.write_text(kernel + "\n")
    monkeypatch.setattr(huge_pages, "_LINUX", setting)
    monkeypatch.setattr(os, "execv", lambda *call: calls.append((call, os.environ["GLIBC_TUNABLES"])))
    monkeypatch.setattr(os, "environ", {} if before is None else {"GLIBC_TUNABLES": before})
    huge_pages.use_huge_pages()
    assert [got for _, got in calls] == ([after] if after else [])
    assert all(call == (sys.executable, [sys.executable, *sys.orig_argv[1:]]) for call, _ in calls)


def test_the_same_call_again(tmp_path):
    """One restart, with interpreter flags and arguments kept."""
    (tmp_path / "enabled").write_text("always [madvise] never")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "from experiments.trainer import huge_pages\n"
        f"huge_pages._LINUX = pathlib.Path({str(tmp_path / 'enabled')!r})\n"
        "print('started', flush=True)\n"
        "huge_pages.use_huge_pages()\n"
        "print(sys.argv[1:], sys.flags.utf8_mode, os.environ['GLIBC_TUNABLES'])\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-X", "utf8", str(script), "--a=b c", "d"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert out.split("\n")[:-1] == ["started", "started", "['--a=b c', 'd'] 1 glibc.malloc.hugetlb=1"]
