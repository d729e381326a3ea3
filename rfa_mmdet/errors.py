"""Errors that the user can fix; each message names the argument, its value and valid values."""


class UserError(ValueError):
    """Base class; the tools print these errors without a traceback."""


class ConfigError(UserError):
    """The config or the command line is invalid."""


class DataError(UserError):
    """The data is invalid."""
