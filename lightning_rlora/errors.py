"""The one exception that means: the input is wrong, the program is not."""


class UserError(ValueError):
    """Wrong input, told in one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2. Every other exception is a bug and keeps
    its traceback.
    """
