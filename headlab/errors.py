"""The one error that headlab raises on purpose."""


class HeadlabError(ValueError):
    """What was given, what was expected and what to do, in one line; the command line prints it as it is."""
