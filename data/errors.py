"""Errors in the user's data."""


class DataError(ValueError):
    """A data set that is missing, empty or malformed: where, what was expected, what was found, and the remedy, in one
    line."""

    def __init__(self, where: object, *, expected: object, found: object, remedy: str) -> None:
        super().__init__(f"{where}: expected {expected}, found {found}. {remedy}")
