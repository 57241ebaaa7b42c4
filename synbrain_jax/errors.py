"""The exceptions whose messages are meant for users, as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Something that the user handed in cannot be used.

    The message is complete by itself: it names the file or field, says what was given and what was
    expected, and what to do. The command line prints it alone, without a traceback.
    """


class NonFiniteLoss(RuntimeError):
    """Training met a loss that is NaN or infinite; the message says at which step and which terms."""


class NotStored(OSError):
    """A checkpoint could not be written; the message says where, and why."""


class Stopped(KeyboardInterrupt):
    """The run was asked to stop, and all that it needs to go on is on the disk."""
