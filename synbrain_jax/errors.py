"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Something that the user handed in cannot be used.

    The message is complete by itself: it names the file or field, says what was given and what was
    expected, and what to do. The command line prints it alone, without a traceback.
    """
