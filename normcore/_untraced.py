"""Functions that torch.compile does not trace: kernels take addresses, and its graphs free what lies there."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def untraced(function: Function) -> Function:
    """The same function, which ends a graph that torch.compile traces, and runs between two of them."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(function)(*arguments, **named)  # type: ignore[no-untyped-call]
        return function(*arguments, **named)

    found: Any = call
    return found  # type: ignore[no-any-return]
