"""The one error of the command line's own; every other error comes from the room that found it."""


class UsageError(Exception):
    """The words on the command line make no sense: exit code 2."""
