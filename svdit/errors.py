"""The one exception that means "the user can mend this": a command prints it as a sentence and exits with code 2."""


class UserError(Exception):
    """What was wrong, with the value, and what to do; in one clear sentence."""
