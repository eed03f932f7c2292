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

import runpy  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

repository = Path(__file__).resolve().parents[1]
if (repository / "pocl_ds").is_dir():
    sys.path[0] = str(repository)
else:  # part of an installed package: imports must not search this folder
    del sys.path[0]

from pocl_ds.resources import cache_folder  # noqa: E402
from pocl_ds.runtime.credentials import redact  # noqa: E402
from pocl_ds.runtime.process_exit import exit_process, print_error  # noqa: E402

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder() / "torch_extensions"))
sys.argv = sys.argv[1:]
code = 0
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as error:  # its code is an int, None, or a message
    code = error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error.code, str):
        print_error(error.code)
except KeyboardInterrupt:  # before or after the module's own handling, which prints a message
    code = 130
except BaseException:
    print_error(redact(traceback.format_exc()).rstrip())
    code = 1

exit_process(code)
