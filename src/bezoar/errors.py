"""The one exception that means: the user's input, not the program, is at fault."""


class UserError(Exception):
    """One line that names what was expected and what exists. The command line prints it and exits with 2."""
