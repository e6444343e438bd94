"""The one exception that is meant for the user."""


class UserError(Exception):
    """A wrong input. The message is one line that names the file or option and says what would be right."""
