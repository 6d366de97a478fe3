"""The one error that a policy can raise: what is wrong, and where in the file."""


class PolicyError(ValueError):
    """Prints as `file:line:column: message`, one line; lines and columns count from 1, 0 means no place."""

    def __init__(self, file: str, line: int, column: int, message: str) -> None:
        self.file = file
        self.line = line
        self.column = column
        self.message = " ".join(message.split())
        super().__init__(file, line, column, self.message)

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.message}"
