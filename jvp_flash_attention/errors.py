"""What a call with wrong arguments raises: Python's kind of error, and PyTorch's, whose own
attention raises `RuntimeError`. `NotImplementedError` is one already.
"""


class ArgumentValueError(ValueError, RuntimeError):
    """An argument has a shape, device or number that does not fit."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument is of the wrong kind or dtype."""
