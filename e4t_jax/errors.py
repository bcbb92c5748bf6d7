"""What a user can mend: one line, no traceback."""


class UserError(Exception):
    """A mistake the user can mend; the message names the file or flag and the mend, in one line."""
