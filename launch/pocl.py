"""Run a module of pocl_ds from any working directory.

`python -m` would import a file of the working directory first.

    python launch/pocl.py MODULE ARGUMENT...
"""

import os
import signal
import sys

# Until the module installs its own handler, Ctrl-C ends this process at once: a traceback from the
# middle of an import does not help the user. A pipeline starts this script with SIGINT blocked,
# because Python's default handler would print that traceback and exit with its own code.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

from pathlib import Path  # noqa: E402

repository = Path(__file__).resolve().parents[1]
if (repository / "pocl_ds").is_dir():
    sys.path[0] = str(repository)
else:  # part of an installed package: imports must not search this folder
    del sys.path[0]

from pocl_ds.resources import cache_folder  # noqa: E402
from pocl_ds.runtime.parent_death import bind_forked_children  # noqa: E402
from pocl_ds.runtime.run_module import run_module  # noqa: E402

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder() / "torch_extensions"))
bind_forked_children()
run_module(sys.argv[1], sys.argv[2:])
