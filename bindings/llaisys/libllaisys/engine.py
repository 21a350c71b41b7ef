"""Structures and prototypes of llaisys/engine.h; the header states units, defaults and rules."""

from ctypes import (
    CDLL,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
    c_void_p,
)
from enum import IntEnum
from typing import Any

from .errors import LlaisysError, declare
from .models import LlaisysQwen2Meta, LlaisysQwen2Options, LlaisysSampling


class Status(IntEnum):
    """What a call of the engine returns."""

    OK = 0
    INVALID = 1
    NO_MEMORY = 2
    IO = 3
    FORMAT = 4
    LIMIT = 5
    DEVICE = 6
    BUSY = 7
    CLOSED = 8


class Finish(IntEnum):
    """Why a request has ended."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 4
    CLOSED = 5
    MASKED = 6


class Constraint(IntEnum):
    """Whether a request's tokens wait for masks."""

    NEVER = 0
    ALWAYS = 1
    AFTER = 2


class RequestError(LlaisysError, ValueError):
    """A request that the engine cannot answer: wrong arguments, or a prompt that is too long."""


class EngineBusy(LlaisysError):
    """The queue is full, or the time is up: try again later."""


class EngineClosed(LlaisysError):
    """The engine is draining or stopped and takes no more requests."""


class LlaisysEngineOptions(Structure):
    """How an engine is opened; a field left at zero means its default."""

    _fields_ = [
        ("model", LlaisysQwen2Options),
        ("max_seqs", c_size_t),
        ("kv_tokens", c_size_t),
        ("kv_block", c_size_t),
        ("max_queue", c_size_t),
        ("mixed_rows", c_size_t),
        ("max_logprobs", c_int),
    ]


class LlaisysLogitBias(Structure):
    """What is added to a token's logit."""

    _fields_ = [("token", c_int64), ("bias", c_float)]


class LlaisysLogprob(Structure):
    """How likely the model found a token."""

    _fields_ = [("logprob", c_float), ("token", c_int32)]


class LlaisysRequest(Structure):
    """A prompt and how to go on."""

    _fields_ = [
        ("prompt", POINTER(c_int64)),
        ("nprompt", c_size_t),
        ("max_tokens", c_size_t),
        ("stop", POINTER(c_int64)),
        ("nstop", c_size_t),
        ("ignore_eos", c_int),
        ("sampling", LlaisysSampling),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("logit_bias", POINTER(LlaisysLogitBias)),
        ("nlogit_bias", c_size_t),
        ("logprobs", c_int),
        ("top_logprobs", c_int),
        ("constrained", c_int),
        ("constrain_after", c_int64),
        ("tag", c_uint64),
        ("priority", c_int),
        ("no_cache", c_int),
        ("cache_salt", c_uint64),
    ]


class LlaisysEvent(Structure):
    """News of one request."""

    _fields_ = [
        ("request", c_uint64),
        ("tag", c_uint64),
        ("tokens", POINTER(c_int64)),
        ("ntoken", c_size_t),
        ("logprobs", POINTER(LlaisysLogprob)),
        ("nlogprob", c_size_t),
        ("finish", c_int),
        ("message", c_char_p),
        ("prompt_tokens", c_size_t),
        ("completion_tokens", c_size_t),
        ("cached_tokens", c_size_t),
        ("preemptions", c_size_t),
        ("queued_s", c_double),
        ("first_token_s", c_double),
        ("finished_s", c_double),
    ]


class LlaisysEngineStats(Structure):
    """Counts of an engine, now and since it was opened."""

    _fields_ = [
        ("waiting", c_size_t),
        ("running", c_size_t),
        ("unread", c_size_t),
        ("max_seqs", c_size_t),
        ("max_queue", c_size_t),
        ("maxseq", c_size_t),
        ("kv_block", c_size_t),
        ("kv_blocks", c_size_t),
        ("kv_free", c_size_t),
        ("kv_cached", c_size_t),
        ("kv_active", c_size_t),
        ("submitted", c_uint64),
        ("refused", c_uint64),
        ("finished", c_uint64 * len(Finish)),
        ("prompt_tokens", c_uint64),
        ("cached_tokens", c_uint64),
        ("generated_tokens", c_uint64),
        ("preemptions", c_uint64),
        ("evictions", c_uint64),
        ("steps", c_uint64),
        ("rows", c_uint64),
        ("step_s", c_double),
        ("host_s", c_double),
        ("host_cpu_s", c_double),
        ("device_s", c_double),
    ]


def load_engine(lib: CDLL) -> None:
    engine = c_void_p

    def check(status: int, _function: Any, _arguments: tuple[Any, ...]) -> int:
        if status == Status.OK:
            return status
        message = (lib.llaisysGetLastError() or b"unknown error").decode("utf-8", "replace")
        raise {
            Status.INVALID: RequestError,
            Status.LIMIT: RequestError,
            Status.BUSY: EngineBusy,
            Status.CLOSED: EngineClosed,
        }.get(Status(status), LlaisysError)(message)

    declare(lib, "llaisysEngineOpen", engine, c_char_p, POINTER(LlaisysEngineOptions))
    # As llaisysQwen2Plan, a string to be freed.
    options = POINTER(LlaisysEngineOptions)
    declare(lib, "llaisysEnginePlan", c_void_p, c_char_p, options, c_char_p)
    for name, *argtypes in (
        ("Submit", POINTER(LlaisysRequest), POINTER(c_uint64)),
        ("Cancel", c_uint64),
        ("SetMask", c_uint64, c_size_t, c_char_p, c_size_t),  # 32-bit words, as bytes
        ("Poll", POINTER(LlaisysEvent), c_size_t, c_int, POINTER(c_size_t)),
        ("Drain", c_int),
        ("Stop",),
    ):
        declare(lib, f"llaisysEngine{name}", c_int, engine, *argtypes, fallible=False)
        getattr(lib, f"llaisysEngine{name}").errcheck = check
    declare(lib, "llaisysEngineClose", None, engine, fallible=False)
    declare(lib, "llaisysEngineFd", c_int, engine, fallible=False)
    stats, meta = POINTER(LlaisysEngineStats), POINTER(LlaisysQwen2Meta)
    declare(lib, "llaisysEngineStats", None, engine, stats, fallible=False)
    declare(lib, "llaisysEngineMeta", None, engine, meta, fallible=False)
    declare(lib, "llaisysEngineIsEnd", c_int, engine, c_int64, fallible=False)
