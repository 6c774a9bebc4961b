"""The exception for errors that a user can fix. Commands print its message and exit with code 2."""


class UserError(Exception):
    """The message is one sentence: what was wrong, the value, and what to do."""
