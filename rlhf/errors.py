"""The one kind of error that a user can mend."""


class UserError(Exception):
    """Something outside the code is wrong: a file, a row, a value, a port.

    The command line prints it as one line, without a traceback, and exits with code 1.

    Args:
        what: names the thing and what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, remedy: str) -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what} ({remedy})")
