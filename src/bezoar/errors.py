"""The exception for mistakes in the user's input."""


class UserError(Exception):
    """The user's input is at fault, not the program.

    The message is one line that names what was expected and what exists. The command line prints it and exits with 2.
    """
