"""Errors that carry their facts: what was named, what it was, what was expected.

All are picklable (Ray and torch send them between processes) because every fact is a positional argument.
"""


class ContRecError(Exception):
    """Base of every error that this project raises on purpose."""


class StageStopped(ContRecError):
    """A stage was asked to stop and did; the same command goes on. The command ends with exit_code."""

    def __init__(self, message: str, exit_code: int = 0):
        super().__init__(message, exit_code)
        self.message, self.exit_code = message, exit_code

    def __str__(self) -> str:
        return self.message


class ConfigError(ContRecError):
    """A configuration value that cannot be used."""

    def __init__(self, key: str, got: object, expected: str):
        super().__init__(key, got, expected)
        self.key, self.got, self.expected = key, got, expected

    def __str__(self) -> str:
        return f"config key '{self.key}': got {self.got}, expected {self.expected}"


class DataError(ContRecError):
    """Input data that cannot be used; `where` names the file, and the line or column where there is one."""

    def __init__(self, where: str, got: object, expected: str):
        super().__init__(where, got, expected)
        self.where, self.got, self.expected = where, got, expected

    def __str__(self) -> str:
        return f"{self.where}: got {self.got}, expected {self.expected}"


class ArtifactError(ContRecError):
    """A file or folder of a run that is missing, incomplete, or does not belong to the others."""

    def __init__(self, path: object, got: object, expected: str):
        super().__init__(str(path), got, expected)
        self.path, self.got, self.expected = str(path), got, expected

    def __str__(self) -> str:
        return f"{self.path}: got {self.got}, expected {self.expected}"
