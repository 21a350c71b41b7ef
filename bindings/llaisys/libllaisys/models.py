"""Structures and prototypes of llaisys/models/qwen2.h; the header states units and defaults."""

from ctypes import (
    CDLL,
    POINTER,
    Structure,
    c_char_p,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
    c_void_p,
)

from .errors import declare
from .llaisys_types import llaisysDataType_t, llaisysDeviceType_t
from .tensor import llaisysTensor_t

llaisysQwen2Model_t = c_void_p
"""A model's handle, ended with llaisysQwen2ModelDestroy."""


class LlaisysQwen2Meta(Structure):
    """Dimensions of a model."""

    _fields_ = [
        ("dtype", llaisysDataType_t),
        ("nlayer", c_size_t),
        ("hs", c_size_t),
        ("nh", c_size_t),
        ("nkvh", c_size_t),
        ("dh", c_size_t),
        ("di", c_size_t),
        ("maxseq", c_size_t),
        ("voc", c_size_t),
        ("epsilon", c_float),
        ("theta", c_float),
        ("end_token", c_int64),
    ]


class LlaisysQwen2Weights(Structure):
    """A model's weights as tensor handles that belong to it; arrays hold nlayer handles."""

    _fields_ = [
        ("in_embed", llaisysTensor_t),
        ("out_embed", llaisysTensor_t),
        ("out_norm_w", llaisysTensor_t),
        ("attn_norm_w", POINTER(llaisysTensor_t)),
        ("attn_q_w", POINTER(llaisysTensor_t)),
        ("attn_q_b", POINTER(llaisysTensor_t)),
        ("attn_k_w", POINTER(llaisysTensor_t)),
        ("attn_k_b", POINTER(llaisysTensor_t)),
        ("attn_v_w", POINTER(llaisysTensor_t)),
        ("attn_v_b", POINTER(llaisysTensor_t)),
        ("attn_o_w", POINTER(llaisysTensor_t)),
        ("mlp_norm_w", POINTER(llaisysTensor_t)),
        ("mlp_gate_w", POINTER(llaisysTensor_t)),
        ("mlp_up_w", POINTER(llaisysTensor_t)),
        ("mlp_down_w", POINTER(llaisysTensor_t)),
    ]


class LlaisysQwen2Options(Structure):
    """How a model folder is opened; a field left at zero means its default."""

    _fields_ = [
        ("device", llaisysDeviceType_t),
        ("device_ids", POINTER(c_int)),
        ("ndevice", c_int),
        ("dtype", llaisysDataType_t),
        ("maxseq", c_size_t),
        ("prefill_chunk", c_size_t),
        ("nthread", c_int),
        ("progress", c_int),
    ]


class LlaisysSampling(Structure):
    """How the next token is chosen."""

    _fields_ = [
        ("temperature", c_float),
        ("top_k", c_int32),
        ("top_p", c_float),
        ("seed", c_uint64),
    ]


def load_models(lib: CDLL) -> None:
    model, options = llaisysQwen2Model_t, POINTER(LlaisysQwen2Options)
    meta, weights = POINTER(LlaisysQwen2Meta), POINTER(LlaisysQwen2Weights)
    tokens, sampling = POINTER(c_int64), POINTER(LlaisysSampling)
    declare(lib, "llaisysQwen2ModelCreate", model, meta, llaisysDeviceType_t, POINTER(c_int), c_int)
    declare(lib, "llaisysQwen2ModelDestroy", None, model, fallible=False)
    declare(lib, "llaisysQwen2ModelWeights", weights, model)
    declare(lib, "llaisysQwen2ModelInfer", c_int64, model, tokens, c_size_t)
    declare(lib, "llaisysQwen2ModelOpen", model, c_char_p, options)
    declare(lib, "llaisysQwen2ModelStep", c_int64, model, tokens, c_size_t, sampling)
    declare(lib, "llaisysQwen2ModelReset", None, model, fallible=False)
    declare(lib, "llaisysQwen2ModelLength", c_size_t, model, fallible=False)
    declare(lib, "llaisysQwen2ModelLogits", c_int, model, POINTER(c_float))
    declare(lib, "llaisysQwen2ModelIsEnd", c_int, model, c_int64, fallible=False)
    declare(lib, "llaisysQwen2ModelMeta", None, model, meta, fallible=False)
    # A string to be freed with llaisysFreeString: c_char_p would lose its address.
    declare(lib, "llaisysQwen2Plan", c_void_p, c_char_p, options, c_char_p)
    declare(lib, "llaisysFreeString", None, c_void_p, fallible=False)
