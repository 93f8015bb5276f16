"""What a user can mend. The command line prints these as one message, without a traceback, and exits with 2."""

from typing import Any


class UserError(Exception):
    """Says what is wrong, with the value, the rule and the cure."""


class ConfigError(UserError):
    """A config value that breaks a rule."""

    def __init__(self, field: str, value: Any, rule: str, cure: str):
        super().__init__(f"{field}={value}: {rule}. {cure}")
        self.field, self.value, self.rule, self.cure = field, value, rule, cure
