"""The exceptions that mean: the input is wrong, the program is not; and the one line that a user gets of any error."""


class UserError(ValueError):
    """Wrong input, told in one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2. Every other exception is a bug and keeps
    its traceback.
    """


class Diverged(UserError):
    """A loss or gradient that is not finite: bad for a single run, a result like others for a sweep of rates."""


def user_line(error: BaseException) -> str | None:
    """The line to print for wrong input or an environment that refuses; None for a bug."""
    cause: BaseException | None = error
    while cause is not None:  # the configuration parser wraps what a constructor raises
        if isinstance(cause, UserError):
            return " ".join(str(cause).split())
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    module, name = type(error).__module__, type(error).__name__
    if module.startswith("lightning") and name == "MisconfigurationException":
        return " ".join(str(error).split())
    if name == "OutOfMemoryError":
        return "the device's memory does not suffice: lower data.batch_size or set model.gradient_checkpointing"
    # what gloo and NCCL say
    if isinstance(error, RuntimeError) and any(x in str(error) for x in (" by peer", "remote process exiting")):
        return "another process of this run has ended, and says why if it could: resume from the last checkpoint"
    if isinstance(error, ValueError) and "loaded state dict" in str(error):
        return "the checkpoint was made with another optimizer or adapter: resume with the run's own configuration"
    return None
