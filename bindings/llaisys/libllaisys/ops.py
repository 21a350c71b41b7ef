"""Prototypes of llaisys/ops.h."""

from ctypes import CDLL, c_float

from .errors import declare
from .tensor import llaisysTensor_t


def load_ops(lib: CDLL) -> None:
    handle = llaisysTensor_t
    declare(lib, "llaisysAdd", None, handle, handle, handle)
    declare(lib, "llaisysArgmax", None, handle, handle, handle)
    declare(lib, "llaisysEmbedding", None, handle, handle, handle)
    declare(lib, "llaisysLinear", None, handle, handle, handle, handle)
    declare(lib, "llaisysRearrange", None, handle, handle)
    declare(lib, "llaisysRmsNorm", None, handle, handle, handle, c_float)
    declare(lib, "llaisysROPE", None, handle, handle, handle, c_float)
    declare(lib, "llaisysSelfAttention", None, handle, handle, handle, handle, c_float)
    declare(lib, "llaisysSwiGLU", None, handle, handle, handle)
