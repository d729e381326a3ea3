"""Errors that the user can fix: one message that names the thing and what would be valid."""


class UserError(ValueError):
    """Base of these errors; the tools show them without a traceback."""


class ConfigError(UserError):
    """The config or the command line cannot be run as it is."""


def shown(text: object, most: int = 80) -> str:
    r"""Return what a file says as it may stand in a message: on one line, escaped and not too long.

    Args:
        text (object): What ``str`` makes of it.
        most (int): Characters to keep. Defaults to 80.

    Example:
        >>> print(shown("a\x1b[31mb" + 100 * "c", 20))
        a\x1b[31mbccccccc...
    """
    text = str(text)[: most + 1]
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
