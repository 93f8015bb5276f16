"""What a user can mend. The command line prints these as one message, without a traceback, and exits with 2."""

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """Says what is wrong, with the value, the rule and the cure."""


class SharedError(UserError):
    """Raised on every rank alike, so that one of them need print it."""


class ConfigError(SharedError):
    """A config value that breaks a rule; every rank reads the same config."""

    def __init__(self, field: str, value: Any, rule: str, cure: str):
        super().__init__(f"{field}={value}: {rule}. {cure}")
        self.field, self.value, self.rule, self.cure = field, value, rule, cure


class PeerError(UserError):
    """Another rank did not answer, one of `suspects`; only this rank knows what it was waiting for."""

    def __init__(self, message: str, suspects: Sequence[int] = ()):
        super().__init__(message)
        self.suspects = tuple(suspects)
