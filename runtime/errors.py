"""The exceptions whose text is all that a command prints."""

import errno


class UserError(Exception):
    """Wrong input or usage: commands print the message, without a traceback, and exit with status 2."""


class RunError(Exception):
    """A run that cannot go on, through no mistake in its usage: the message, and exit status 1."""


def of_the_system(error: BaseException) -> bool:
    """Whether reading failed for a missing file, a permission or a disk, and not for what the file holds.

    Damaged archives lead their readers to OSErrors without a number, and to seek places that no file has.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def describe(error: OSError) -> str:
    """What is wrong with which file, in a few words."""
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"
