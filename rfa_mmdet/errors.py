"""Errors that the user can fix: one message that names the thing and what would be valid."""


class UserError(ValueError):
    """Base of these errors; the tools show them without a traceback."""


class ConfigError(UserError):
    """The config or the command line cannot be run as it is."""


class DataError(UserError):
    """The data cannot be trained on, or tested on, as they are."""
