"""The command: parse and call (`foretune.cli`), and turn whatever comes back into an exit code and a message.

    0 done   1 our bug (traceback)   2 the user's fault   3 no plan fits   4 training stopped   75 interrupted, saved

Errors go to stderr; with ``--json`` they also go to stdout, as ``{"error": {"field", "value", "problem", "mend", …}}``.
"""

from __future__ import annotations

import atexit
import difflib
import gc
import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from foretune.errors import ConfigError, ExitCode, ForetuneError, NoPlanFits, Preempted, TrainingStopped, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code and raises nothing."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _interruptible():
            execute(words)
        sys.stdout.flush()
        code = ExitCode.DONE
    except ForetuneError as error:
        code = _report(error, words)
    except KeyboardInterrupt:
        _forget_interruption()
        code = _report(Interrupted(), words)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.DONE
    except Exception as error:
        code = _report_bug(error, words)
    return int(code)


def execute(words: Sequence[str]) -> None:
    """Parse one command line and run its verb.

    Raises:
        UserError: the command line can't be read; the nearest verb or option is suggested.
        ForetuneError: whatever the verb raises.
    """
    # Importing makes half a million objects that stay; to search them for garbage again and again takes a fifth of the
    # time to a plan's answer, and once more at the end a sixth. (Ranks are processes of their own and keep Python's
    # default.)
    gc.set_threshold(200_000)
    atexit.register(gc.freeze)
    import typer

    from foretune.cli import app
    from foretune.logger import configure

    configure()
    words = list(words) or ["-h"]
    command = typer.main.get_command(app)
    # What typer raises for a command line it can't read: the parent of the one usage error that it makes public.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    # Not typer's own main(): it would turn an interruption and a closed pipe into exit codes of its own.
    try:
        with command.make_context("foretune", list(words)) as context:
            command.invoke(context)
    except typer.Exit:  # -h was shown
        return
    except usage_error as error:
        raise _usage_fault(error, words, list(command.commands)) from None  # type: ignore[attr-defined]


class Interrupted(ForetuneError):
    """Ctrl-C or SIGTERM outside of training. Stages leave whole artifacts or none, so nothing is lost but time."""

    exit_code = ExitCode.PREEMPTED

    def __init__(self) -> None:
        super().__init__("stopped as asked; the stages that were complete are kept")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within this a scheduler's SIGTERM interrupts as Ctrl-C does, and neither is lost; threads can't be interrupted.

    Python drops what is raised while it runs a callback of its own (of a weak reference, as imports have, or a
    ``__del__``), so it is raised again a moment later. (Within training the launcher takes both signals over.)
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    report = sys.unraisablehook

    def again_if_lost(lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            report(lost)

    signal.signal(signal.SIGTERM, _interrupt)
    alarm = signal.signal(signal.SIGALRM, _interrupt)
    sys.unraisablehook = again_if_lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = report
        signal.signal(signal.SIGALRM, alarm)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _forget_interruption() -> None:
    """Let the exit code stand. An interruption inside ``exec("…")`` (as dataclasses use it) is remembered by Python.

    Caught or not, ``python -m`` then ends itself with SIGINT instead of the code. The next ``exec`` forgets it.
    """
    exec("")


def _report(error: ForetuneError, words: Sequence[str]) -> ExitCode:
    match error:
        case Preempted() | Interrupted():
            _say(f"{error}\n  to go on, run the same command again: {shlex.join(['foretune', *words])}")
        case ConfigError():
            for fault in error.faults:
                _say(f"error: {fault}")
        case _:
            _say(f"failed: {error}" if error.exit_code == ExitCode.OUR_BUG else f"error: {error}")
    _tell_json(_as_json(error), error.exit_code, words)
    return error.exit_code


def _report_bug(error: Exception, words: Sequence[str]) -> ExitCode:
    from importlib.metadata import version

    traceback.print_exception(error)
    _say(
        f"This is a fault of foretune {version('foretune')}, not yours. Please report it with the lines above and the "
        f"command: {shlex.join(['foretune', *words])}"
    )
    _tell_json({"problem": f"{type(error).__name__}: {error}"}, ExitCode.OUR_BUG, words)
    return ExitCode.OUR_BUG


def _usage_fault(error: Exception, words: Sequence[str], verbs: Sequence[str]) -> UserError:
    """What typer could not read, in the form of every other mistake."""
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", None) or " ".join(
        ["foretune", *(word for word in words[:1] if word in verbs)]
    )
    message = _in_a_sentence(str(getattr(error, "message", error)))
    if message.startswith("no such command"):
        verb = next((word for word in words if not word.startswith("-")), "")
        near = difflib.get_close_matches(verb, verbs, n=1)
        return UserError("verb", verb, "there is no such verb", _suggest(near, f"the verbs are {', '.join(verbs)}"))
    option = getattr(error, "option_name", None)
    if option is not None and message.startswith("no such option"):
        near = list(getattr(error, "possibilities", None) or [])[:1]
        return UserError(option, None, "there is no such option", _suggest(near, f"`{path} -h` names the options"))
    if option is not None:
        return UserError(
            option, None, "needs a value" if "argument" in message else message, f"`{path} -h` tells which"
        )
    parameter = getattr(error, "param", None)
    if parameter is None:
        return UserError("command line", shlex.join(words), message, f"see `{path} -h`")
    field = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar or parameter.name
    return UserError(field, _value_after(field, words), message or "is required", f"see `{path} -h`")


def _in_a_sentence(message: str) -> str:
    """``Input should be a valid number, unable to …`` as the end of a sentence that names the field."""
    message = message.rstrip(".").partition(", unable to")[0].removeprefix("Input ")
    return message[:1].lower() + message[1:]


def _value_after(option: str, words: Sequence[str]) -> str | None:
    """What the command line gives an option."""
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def _suggest(near: Sequence[str], otherwise: str) -> str:
    return f"did you mean {near[0]}?" if near else otherwise


def _as_json(error: ForetuneError) -> dict[str, Any]:
    match error:
        case ConfigError():
            faults = [_as_json(fault) for fault in error.faults]
            return {**faults[0], "faults": faults}
        case UserError():
            return {"field": error.field, "value": error.value, "problem": error.problem, "mend": error.mend}
        case NoPlanFits():
            problem = "no plan fits this hardware"
            return {"field": "plan", "value": None, "problem": problem, "mend": error.mend, "needed": error.needed}
        case TrainingStopped():
            where = {"rank": error.rank, "step": error.step, "last_checkpoint": error.last_checkpoint}
            return {"problem": error.cause, **where}
        case Preempted():
            return {"problem": str(error), "step": error.step, "mend": "run the same command again"}
        case _:
            return {"problem": str(error)}


def _tell_json(values: dict[str, Any], code: ExitCode, words: Sequence[str]) -> None:
    if "--json" in words:
        print(json.dumps({"error": {**values, "exit_code": int(code)}}, ensure_ascii=False, default=str))


def _say(text: str) -> None:
    """To stderr, harmless (a value may come from a data file), the first line standing out on a terminal."""
    from rich.console import Console
    from rich.text import Text

    from foretune.reporting.units import printable

    head, separator, rest = printable(text).partition("\n")
    # The terminal wraps: a command copied from here must be one line.
    Console(stderr=True, highlight=False).print(Text.assemble((head, "bold red"), separator, rest), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
