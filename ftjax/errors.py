"""The error a user can act on."""


class UserError(ValueError):
    """What was given, where, and what would be right; the command line prints it without a traceback."""
