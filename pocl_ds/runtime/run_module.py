"""Running a module of this package as a program, to the end of the process."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from pocl_ds.runtime.credentials import redact
from pocl_ds.runtime.process_exit import exit_process, explain_lost_rank, print_error


def run_module(module: str, arguments: Sequence[str]) -> NoReturn:
    """Run `python -m MODULE ARGUMENT...` in this process and exit with its code: 1 for a defect,
    130 for Ctrl-C.
    """
    sys.argv = [module, *arguments]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:  # its code is an int, None, or a message
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print_error(error.code)
    except KeyboardInterrupt:  # before or after the module's own handling, which prints a message
        code = 130
    except BaseException as error:
        print_error(explain_lost_rank(error) or redact(traceback.format_exc()).rstrip())
        code = 1
    exit_process(code)
