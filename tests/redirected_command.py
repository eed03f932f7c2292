"""One `pocl` command in a forked process (`command_line.pocl`): its output goes to files.

The argument is JSON: `words` of the command, its `environment`, files for `stdout` and `stderr`.
"""

from __future__ import annotations

import json
import os
import sys

from command_line import ROOT

from pocl_ds.runtime.run_module import run_module

if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(ROOT)
    os.umask(0o022)
    run_module("pocl_ds.cli.main", request["words"])
