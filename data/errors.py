"""Errors in the user's data."""


class DataError(ValueError):
    """A data set that is missing, empty or malformed: where, what was expected, what was found."""
