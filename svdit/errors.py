"""The exception for errors a user can fix: a command prints its message on one line and exits with code 2."""


class UserError(Exception):
    """What was wrong, the value, and what to do, in one sentence."""
