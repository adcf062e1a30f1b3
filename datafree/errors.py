"""What ends a script in one line: mistakes that the user can mend, and a time limit."""


class UsageError(Exception):
    """Something that the user can mend: one line that names the cure. Exit code 2."""


class TimeLimit(Exception):
    """`--time_limit` is near; everything is saved. Exit code 75 (EX_TEMPFAIL): run again, with --resume."""
