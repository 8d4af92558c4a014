"""The two ways in which a command ends early, and the exit statuses that go with them."""


def printable(text: str) -> str:
    """One line that a terminal shows and does not obey: control characters and stray bytes of file names escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _OneLine(Exception):
    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UserError(_OneLine):
    """Wrong use or bad input: one line that names the file or option and says what to do (exit status 2)."""


class RunFailed(_OneLine):
    """The run itself failed, by divergence or a full disk: one line (exit status 1)."""
