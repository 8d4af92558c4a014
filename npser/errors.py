"""The two ways in which a command ends early, and the exit statuses that go with them."""


class UserError(Exception):
    """Wrong use or bad input: one line that names the file or option and says what to do (exit status 2)."""


class RunFailed(Exception):
    """The run itself failed, by divergence or a full disk: one line (exit status 1)."""
