"""Runs a module of this tree, wherever one stands: `python -m` would take what lies in the working directory first.

    python launch/pocl.py MODULE ARGUMENT...
"""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
