"""`perceiver` and `python -m perceiver`: signals, the command line, and the exit code of each end."""

import contextlib
import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Run the command line; a `UserError` becomes one line on stderr and exit code 2."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores it
                signal.signal(number, interrupt)
        import click

        from perceiver.cli import cli, leave
        from perceiver.config import UserError
        from perceiver.environment import bypass_proxies, use_utf8
        from perceiver.tracking.printable import say

        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # tracebacks of a driver's tasks that nobody awaits
        use_utf8()
        bypass_proxies()
    except KeyboardInterrupt:
        stopped()
    except ModuleNotFoundError as error:
        from perceiver_train.extras import lacks

        sys.exit(f"error: {lacks('this command', error) or error}")
    try:
        code = cli(standalone_mode=False)
    except (KeyboardInterrupt, click.Abort):
        stopped()
    except UserError as error:
        say(f"error: {error}", err=True)
        leave(2)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f": see {context.command_path} --help" if context else ""
        say(f"error: {' '.join(error.format_message().split()).rstrip('.')}{hint}", err=True)
        code = error.exit_code
    except Exception as error:  # noqa: BLE001  a bug of ours: the traceback is shown on request only
        if os.environ.get("PERCEIVER_TRACEBACK"):
            raise
        from perceiver.storage import first_line, unusable_file
        from perceiver_train.extras import lacks

        missing = lacks("this command", error) if isinstance(error, ModuleNotFoundError) else ""
        bug = f"unexpected {type(error).__name__}: {first_line(error)} (PERCEIVER_TRACEBACK=1 shows where)"
        say(f"error: {missing or unusable_file(error) or bug}", err=True)
        code = 1
    if code:
        leave(code)


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C, SIGTERM and SIGHUP: raise KeyboardInterrupt, or end the process at once during an import.

    Libraries turn a KeyboardInterrupt in their imports into other errors, and nothing needs to be cleaned up there:
    commands that start processes or take a lease set their own handlers first.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            stopped()
        frame = frame.f_back
    raise KeyboardInterrupt


def stopped() -> NoReturn:
    """Print that the command was stopped, and exit without waiting for threads, in which Ray may still be starting."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, b"stopped\n")
    os._exit(130)


if __name__ == "__main__":
    main()
