"""The command `pocl`: parse the command line, run a command, and turn faults into one sentence and
an exit code.

Commands are in one file per panel of `pocl --help`. Heavy imports happen inside the commands.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer
import typer.main

from pocl_ds import __version__
from pocl_ds.cli import cluster, inspection, pipeline, planning, tools
from pocl_ds.workflow.steps import STEP

COMPLETION = "_POCL_COMPLETE"  # set by the shell's completion script

app = typer.Typer(
    name="pocl",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: pocl run quickstart --run-dir runs/quickstart",
    pretty_exceptions_enable=False,
)


def _show_version(requested: bool) -> None:
    if requested:
        print(f"pocl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Distil a large language model into a small one by a curriculum."""


for panel in (pipeline, inspection, cluster, planning, tools):
    panel.add_commands(app)


def main(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 2 for an error that the user can fix, 130 for
    Ctrl-C, EXIT_RESUME if the same command continues the work.

    arguments: the words after `pocl`; None: those of this process.
    """
    from pocl_ds.runtime.credentials import redact
    from pocl_ds.runtime.parent_death import bind_forked_children
    from pocl_ds.runtime.process_exit import (
        install_signal_handlers,
        print_error,
        record_exit,
        was_interrupted,
    )

    install_signal_handlers()
    bind_forked_children()
    error = ""
    try:
        code, error = _main(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as request:  # a signal, or an option that shows something and ends
        code = request.code if isinstance(request.code, int) else 1
    except (Exception, KeyboardInterrupt) as defect:
        if was_interrupted():
            code, error = _interrupted("pocl")
        else:
            print_error(redact(traceback.format_exc()).rstrip())
            code, error = 1, redact(f"{type(defect).__name__}: {defect}")
    record_exit(code, error)
    return code


def _main(arguments: list[str]) -> tuple[int, str]:
    """Exit code, and the sentence that explains a code other than 0."""
    from pocl_ds.errors import PoclError, compile_fault, did_you_mean, memory_fault
    from pocl_ds.runtime.process_exit import explain_lost_rank, was_interrupted

    # Complete words for the shell, or find the command.
    group = _command_group()
    if COMPLETION in os.environ:
        group.main(arguments, prog_name="pocl")  # prints completions and exits
    arguments = arguments or ["--help"]
    command = next((name for name in arguments if not name.startswith("-")), "")
    program = f"pocl {command}".rstrip()
    # Run it, and turn each kind of error into an exit code and a sentence.
    try:
        if command and command not in group.commands:
            suggestion = did_you_mean(command, group.commands)
            return 2, _explain(
                "pocl", f"there is no command {command!r}: {suggestion} (pocl --help)"
            )
        code = _invoke(group, arguments)
        sys.stdout.flush()  # so that a full disk is reported like other faults
        return code, ""
    except typer.TyperException as error:
        return 2, _explain(program, _usage_fault(error, program))
    except PoclError as error:
        if was_interrupted():
            return _interrupted(program)
        return error.exit_code, _explain(program, str(error))
    except (RuntimeError, MemoryError) as error:
        if (fault := compile_fault(error)) is not None:
            return 2, _explain(program, f"torch.compile failed ({fault}): set train.compile=none")
        if (sentence := explain_lost_rank(error)) is not None:
            return 1, _explain(program, sentence)
        if (fault := memory_fault(error)) is None:
            raise
        step = STEP.get(command)
        hint = step.out_of_memory_hint if step else "use a machine with more memory"
        return 2, _explain(program, f"memory ran out ({fault}): finished work is saved; {hint}")
    except OSError as error:
        return _file_fault(error, program)
    except KeyboardInterrupt:
        return _interrupted(program)


def _command_group() -> Any:
    """The tree of commands, as docs/generate_reference.py reads it."""
    return typer.main.get_command(app)


def _invoke(group: Any, arguments: list[str]) -> int:
    """Parse the arguments and call their command. Unlike typer's own `main`, this leaves exceptions
    and Ctrl-C to the caller.
    """
    try:
        with group.make_context("pocl", list(arguments)) as context:
            return int(group.invoke(context) or 0)
    except typer.Exit as request:  # after --help or --version
        return request.exit_code


def _usage_fault(error: typer.TyperException, program: str) -> str:
    """A fault of the command line as one sentence."""
    option = getattr(error, "option_name", None)
    similar = getattr(error, "possibilities", None)
    text = error.format_message().rstrip(".").replace("Value error, ", "")
    if option and not error.message.startswith("Option"):
        text = f"there is no option {option}"
        text += f": did you mean {similar[0]}?" if similar else ""
    return f"{text[:1].lower()}{text[1:]} ({program} --help)"


def _file_fault(error: OSError, program: str) -> tuple[int, str]:
    """Exit code and sentence for a file that cannot be read or written, or for a closed
    output pipe. Raises any other OSError.
    """
    from pocl_ds.workflow.files import describe_file_error

    fault = describe_file_error(error)
    if fault is None and not isinstance(error, BrokenPipeError):
        raise error
    _discard_output()
    return (0, "") if isinstance(error, BrokenPipeError) else (2, _explain(program, fault or ""))


def _discard_output() -> None:
    """Drop what standard output could not write: Python would try again, and complain, at exit."""
    import contextlib

    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted(program: str) -> tuple[int, str]:
    from pocl_ds.runtime.process_exit import print_error

    print_error(
        f"{program}: interrupted; finished work is saved; run the same command again to continue"
    )
    return 130, "interrupted"


def _explain(program: str, sentence: str) -> str:
    """Print a sentence as one line on standard error and return it.

    Texts of a user's files may hold control characters and secrets: both are replaced.
    """
    from pocl_ds.runtime.credentials import redact
    from pocl_ds.runtime.process_exit import print_error

    text = redact(sentence)
    printable = "".join(
        c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in text
    )
    print_error(f"{program}: {printable}")
    return text


if __name__ == "__main__":
    sys.exit(main())
