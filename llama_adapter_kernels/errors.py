"""The exception for what a user can put right: its message is all the user needs to see, without a stack trace."""


class UserError(Exception):
    """A mistake in arguments, data or files. The command line prints the message and exits with code 2."""
