"""The one kind of error that a user can mend."""

from rlhf.redact import redact


class UserError(Exception):
    """Something outside the code is wrong: a file, a row, a value, a port.

    The command line prints it as one line, without a traceback, and exits with code 1.

    Args:
        what: names the thing and what is wrong with it.
        remedy: what to do about it.
    """

    def __init__(self, what: str, *, remedy: str) -> None:
        # it goes to logs, and to Prefect's database
        self.what = redact(what)
        self.remedy = redact(remedy)
        super().__init__(f"{self.what} ({self.remedy})")
