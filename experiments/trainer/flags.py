"""The flags of every runner of configs, defined once: a process may import several runners."""

import ast
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of experiments/configs; FILE:smoke is the same run in seconds."
)
RUN = flags.DEFINE_string(
    "run", None, "The run's folder; by default config.run_dir, or runs/<name of the config>."
)
_OPTION = "--config.optimizer.options."  # what an optimizer takes is not known until it is looked up


def run_dir() -> str:
    """The folder of this command's run."""
    file, _, variant = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    named = Path(file).stem + (f"-{variant}" if variant else "")
    return RUN.value or CONFIG.value.get("run_dir") or f"runs/{named}"


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> None:
    """Run a `main` of absl's with flags as `parse` reads them."""
    app.run(main, argv=argv, flags_parser=parse)


def parse(argv: list[str]) -> list[str]:
    """Parse flags; an option of the optimizer need not be in the config, any other field must.

    Returns:
      The program's name and what is no flag. A field that the config lacks ends the program in one sentence.
    """
    options = [x.removeprefix(_OPTION).partition("=") for x in argv if x.startswith(_OPTION) and "=" in x]
    rest = [x for x in argv if not (x.startswith(_OPTION) and "=" in x)]
    given, sys.argv = sys.argv, rest  # config_flags looks for fields there
    try:
        left = app.parse_flags_with_usage(rest)
    except (AttributeError, KeyError) as error:
        unknown = re.search(r"\w+", str(error))
        near = re.search(r'Did you mean "(\w+)"', str(error))
        sys.exit(
            f"--config: got {(unknown.group() if unknown else str(error))!r}; expected a field of the config"
            + (f" (is it {near.group(1)}?)" if near else "")
        )
    finally:
        sys.argv = given
    if options and CONFIG.value is not None:
        with CONFIG.value.unlocked():
            for name, _, text in options:
                _put(CONFIG.value.optimizer.options, name.split("."), _literal(text))
    return left


def _put(node: ConfigDict, path: list[str], value: Any) -> None:
    """Set a field below `node`, such as moments.group_size, with the dicts on the way to it."""
    *above, last = path
    for key in above:
        if key not in node:
            node[key] = ConfigDict()
        node = node[key]
    if last in node:
        del node[last]  # with its type
    node[last] = value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
