"""The exceptions whose text is all that a command prints."""


class UserError(Exception):
    """Wrong input or usage: commands print the message, without a traceback, and exit with status 2."""


class RunError(Exception):
    """A run that cannot go on, through no mistake in its usage: the message, and exit status 1."""


def describe(error: OSError) -> str:
    """What is wrong with which file, in a few words."""
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"
