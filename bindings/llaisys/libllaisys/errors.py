"""The library's errors as Python exceptions."""

from ctypes import CDLL, c_char_p
from typing import Any


class LlaisysError(RuntimeError):
    """A call of the library failed; the text says what was expected and what was found."""


def load_errors(lib: CDLL) -> None:
    lib.llaisysGetLastError.argtypes = []
    lib.llaisysGetLastError.restype = c_char_p


def check_error(lib: CDLL) -> None:
    """Raises the calling thread's last failure, if its last fallible call failed."""
    message = lib.llaisysGetLastError()
    if message is not None:
        raise LlaisysError(message.decode("utf-8", "replace"))


def declare(lib: CDLL, name: str, restype: Any, *argtypes: Any, fallible: bool = True) -> None:
    """Gives a function of the library its prototype.

    A fallible function clears the thread's error on entry, so that what is set afterwards is its
    own; its calls raise. Others leave an older error standing and must not be checked.
    """
    function = getattr(lib, name)
    function.argtypes = argtypes
    function.restype = restype

    def raise_error(result: Any, _function: Any, _arguments: tuple[Any, ...]) -> Any:
        check_error(lib)
        return result

    if fallible:
        function.errcheck = raise_error
