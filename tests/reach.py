"""`python -m tests.reach [BASE]`: the test files that can notice what differs from a commit, one a line.

All of them, `tests`, where that can't be told. BASE is the commit in tests/full_passed_at unless given.
Imports are followed, and names: `frugax.kernels.ssd(x)` reaches the file that defines `ssd`, not all that its
package gathers. A string that names a module, a file or a folder is an import too, as in `python -m`.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"frugax": "lib", "experiments": "experiments", "tests": "tests"}
# What any test may notice, and what no test of the full tier reads.
EVERYTHING = {f"tests/{name}.py" for name in ("conftest", "costs", "devices", "eight_devices", "reach")}
EVERYTHING |= {"pyproject.toml", "setup.py", ".ci/run"}
NOTHING = ("docs/", "colab/", "lib/papers/", "LICENSE", ".github/", ".gitignore", "tests/full_passed_at")
NOTHING_BY_SUFFIX = (".md", ".json", ".cff", ".png", ".svg", "tests/costs.toml")


def modules() -> dict[str, str]:
    """Return module name -> file, for the Python in all packages."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = str(path.relative_to(ROOT))
    return found


MODULES = modules()
NAMES = {file: name for name, file in MODULES.items()}


def is_package(module: str) -> bool:
    return MODULES[module].endswith("__init__.py")


@functools.cache
def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def absolute(file: str, level: int, name: str) -> str:
    """Return a relative import's module without the dots in front."""
    parts = NAMES[file].split(".")
    kept = parts[: len(parts) - level + is_package(NAMES[file])] if level else []
    return ".".join([*kept, name]).strip(".")


def dotted(node: ast.AST) -> str | None:
    """Return `a.b.c` of such an expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (rest := dotted(node.value)):
        return f"{rest}.{node.attr}"
    return None


@functools.cache
def imported(file: str) -> dict[str, str]:
    """Return the names that a file's imports bind -> what they stand for."""
    bound = {}
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound |= {alias.asname: alias.name} if alias.asname else {alias.name.split(".")[0]: ""}
                bound[alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom):
            module = absolute(file, node.level, node.module or "")
            bound |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
    return bound


def resolved(name: str, seen: tuple[str, ...] = ()) -> Iterator[str]:
    """Files that define a dotted name: a package's own where the name is not imported into it."""
    parts = name.split(".")
    known = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in MODULES), 0)
    if not known or name in seen:
        return
    module = ".".join(parts[:known])
    if known < len(parts) and is_package(module):
        inside = imported(MODULES[module])
        if inside.get(parts[known], "").split(".")[0] in FOLDERS:
            yield from resolved(".".join([inside[parts[known]], *parts[known + 1 :]]), (*seen, name))
            return
    yield MODULES[module]


def strings(file: str, text: str) -> Iterator[str]:
    """Files that a string names: as a module, with dots in front or not, as a file or as a folder."""
    level = len(text) - len(text.lstrip("."))
    if text.strip(".").replace(".", "").replace("_", "").isalnum():
        name = absolute(file, level, text.lstrip("."))
        if name in MODULES and "." in text:
            yield MODULES[name]
    if "/" in text and "\n" not in text and text.split("/")[0] in FOLDERS.values():
        yield from (f for f in NAMES if f == text or f.startswith(text.rstrip("/") + "/"))


@functools.cache
def direct(file: str) -> set[str]:
    """Files that a file names."""
    tree = parse(file)
    bound, found = imported(file), set()
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = absolute(file, node.level, node.module or "")
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                if whole not in MODULES or not is_package(whole):  # of a package, what is used of it counts
                    found.update(resolved(whole))
        elif isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner:
            name = dotted(node)
            root = name.split(".")[0] if name else None
            if root in bound:
                found.update(resolved((bound[root] or root) + name[len(root) :]))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(strings(file, node.value))
    folder = file.rsplit("/", 1)[0]
    if file.startswith("lib/kernels/") and folder.count("/") > 1:  # an operation takes its backends by name
        found.update(f for f in NAMES if f.startswith(f"{folder}/"))
    if file.startswith("tests/"):
        found.update(f"{p}/conftest.py" for p in Path(file).parents if f"{p}/conftest.py" in NAMES)
    return found - {file}


def reaching(changed: set[str]) -> set[str]:
    """Return all files that reach one of those, themselves among them."""
    users: dict[str, set[str]] = {}
    for file in NAMES:
        for used in direct(file):
            users.setdefault(used, set()).add(file)
    found, fresh = set(changed), set(changed)
    while fresh:
        fresh = set().union(*(users.get(file, set()) for file in fresh)) - found
        found |= fresh
    return found


def differing(base: str) -> set[str] | None:
    """Return the files that HEAD changes from a commit; None where that commit is not here."""
    command = ["git", "diff", "--name-only", "--no-renames", base, "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return set(done.stdout.splitlines()) if done.returncode == 0 else None


def tests_for(changed: set[str] | None) -> list[str]:
    """Return the test files that can notice changed files, or `tests`."""
    if changed is None or changed & EVERYTHING:
        return ["tests"]
    left = {f for f in changed if not f.startswith(NOTHING) and not f.endswith(NOTHING_BY_SUFFIX)}
    if any(f not in NAMES and (ROOT / f).exists() for f in left):
        return ["tests"]
    return sorted(f for f in reaching(left & set(NAMES)) if f.rsplit("/", 1)[-1].startswith("test_"))


if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else (ROOT / "tests/full_passed_at").read_text().split()[0]
    print(*tests_for(differing(given)), sep="\n")
