"""How a program ends: one line for each foreseen error, and an exit code."""

import contextlib
import logging
import sys
import traceback
from collections.abc import Iterator

import jax

from synbrain_jax.distributed import leave
from synbrain_jax.errors import InputError, NonFiniteLoss, NotStored, Stopped


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Ends the program with one line on stderr: exit code 2 for wrong input, 1 for a diverged loss, a full disk or
    another process that is gone, 0 for SIGTERM, 130 for Ctrl-C."""
    with _quiet_threads():
        hurry = False
        try:
            yield
        except InputError as error:
            code, message = 2, f"error: {error}"
        except (NonFiniteLoss, OSError) as error:
            code, message, hurry = 1, f"error: {error}", isinstance(error, NotStored)
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            if not isinstance(error, jax.errors.JaxRuntimeError):
                traceback.print_exc()
            first = (str(error).splitlines() or [type(error).__name__])[0]
            code = 1
            message = (
                f"error: {first}. Did another process of this run end first? The same commands go on with the run."
            )
        except Stopped as stop:
            code, message = 0, str(stop)
        except KeyboardInterrupt:
            code, message = 130, "stopped. The same command goes on from the last checkpoint."
        else:
            return
        print(message, file=sys.stderr)
        leave(code, hurry)


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Hides what the threads of Orbax and TensorStore print, at length, of errors that they raise as well."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def unraisable(error):
        if str(error.exc_value) != "Event loop is closed":
            hook(error)

    sys.unraisablehook = unraisable
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
