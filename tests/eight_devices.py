"""A process with eight CPU devices that runs the modules it is asked for, one after another.

Each line of its input is a JSON list, a module and its arguments; each line of its output says how that went.
"""

import contextlib
import gc
import io
import json
import os
import runpy
import sys
import time
import traceback


def run(module: str, arguments: list[str]) -> dict:
    """Run a module as `python -m` does: what it printed, and its error if it fails."""
    printed, error = io.StringIO(), None
    sys.argv = [module, *arguments]
    try:
        with contextlib.redirect_stdout(printed):
            runpy.run_module(module, run_name="__main__")
    except (Exception, SystemExit):
        error = traceback.format_exc()
    return {"printed": printed.getvalue(), "error": error}


def main() -> None:
    """Answer until the input ends; whatever else writes to the standard output writes to the errors."""
    gc.set_threshold(100_000, 50, 100)  # as in conftest.py
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    told = 0.0
    for line in sys.stdin:
        module, *arguments = json.loads(line)
        answer = run(module, arguments)
        now = time.process_time()  # the first answer's seconds have the start-up in them
        print(json.dumps(answer | {"seconds": now - told}), file=answers, flush=True)
        told = now


if __name__ == "__main__":
    main()
