"""Runs a module of pocl_ds, wherever one stands: `python -m` would take what lies in the working
directory first.

    python launch/pocl.py MODULE ARGUMENT...
"""

import os
import signal
import sys

# Until the module catches Ctrl-C it ends this process at once: the traceback of an import helps
# nobody. A pipeline starts us with it held back, as Python itself would die of it with a traceback
# and a code of its own.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

import runpy  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402

tree = Path(__file__).resolve().parents[1]
if (tree / "pocl_ds").is_dir():
    sys.path[0] = str(tree)
else:  # inside an installed package, which is found by itself; this folder must not be a place to import from
    del sys.path[0]

from pocl_ds.resources import cache_folder  # noqa: E402
from pocl_ds.runtime.credentials import hide  # noqa: E402
from pocl_ds.runtime.process_exit import last_word, leave  # noqa: E402

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache_folder() / "torch_extensions"))
sys.argv = sys.argv[1:]
code = 0
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as leaving:
    code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    if isinstance(leaving.code, str):
        last_word(leaving.code)
except KeyboardInterrupt:  # on its way in or out; at work it has been answered with a sentence
    code = 130
except BaseException:
    last_word(hide(traceback.format_exc()).rstrip())
    code = 1

leave(code)
