"""Qwen2-architecture language models: tokens in, tokens out.

    with Qwen2("models/refrain-mini") as model:
        ids = model.generate([1, 2, 3], max_new_tokens=16)       # greedy, prompt and answer
        for token in model.stream([1, 2, 3], top_k=50, seed=7):  # sampled, the answer alone
            print(token)

Tokens are vocabulary ids. A model holds one sequence, whose memory is taken when it is opened; it
is used by one thread at a time, and different models are independent.
"""

from __future__ import annotations

import ctypes
import operator
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..libllaisys import (
    LIB_LLAISYS,
    DataType,
    DeviceType,
    LlaisysQwen2Meta,
    LlaisysSampling,
)
from ..options import model_options, sampling_options

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

__all__ = ["Qwen2", "plan"]


class Qwen2:
    """A model folder in transformers' format, opened on one device or several.

    device_ids: devices to use, more than one for tensor parallelism; None is device 0.
    max_seq: tokens of the sequence, prompt and answer together; None is the smaller of the model's
        context and 4096.
    prefill_chunk: tokens of a prompt that are computed at once; None is the engine's choice.
    threads: CPU threads; None is all cores that the process may use.
    dtype: of weights and arithmetic, F32, F16 or BF16; None is the checkpoint's.
    progress: show a progress bar on standard error while loading, where that is a terminal.

    Raises LlaisysError for a folder or options that cannot be used, naming file and tensor.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        device: DeviceType = DeviceType.CPU,
        *,
        device_ids: Sequence[int] | None = None,
        max_seq: int | None = None,
        prefill_chunk: int | None = None,
        threads: int | None = None,
        dtype: DataType | None = None,
        progress: bool | None = None,
    ) -> None:
        self._model = None
        self._run = 0  # counts calls that take the sequence, so that a stale stream notices
        options = model_options(
            device, device_ids, max_seq, prefill_chunk, threads, dtype, progress
        )
        self._model = LIB_LLAISYS.llaisysQwen2ModelOpen(
            os.fsencode(model_path), ctypes.byref(options)
        )
        self._meta = LlaisysQwen2Meta()
        LIB_LLAISYS.llaisysQwen2ModelMeta(self._model, ctypes.byref(self._meta))

    # ---- answers ----

    def generate(
        self,
        inputs: Sequence[int],
        max_new_tokens: int | None = None,
        top_k: int | None = 1,
        top_p: float | None = 0.8,
        temperature: float | None = 0.8,
        *,
        seed: int = 0,
        on_token: Callable[[int], object] | None = None,
    ) -> list[int]:
        """The ids of the prompt and of the answer with its end token, as transformers' generate.

        Takes the same arguments as stream; on_token is called with each new id as it comes.
        """
        ids = [operator.index(token) for token in inputs]
        for token in self.stream(ids, max_new_tokens, top_k, top_p, temperature, seed=seed):
            ids.append(token)
            if on_token is not None:
                on_token(token)
        return ids

    def stream(
        self,
        inputs: Sequence[int],
        max_new_tokens: int | None = None,
        top_k: int | None = 1,
        top_p: float | None = 0.8,
        temperature: float | None = 0.8,
        *,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yields the ids of the answer as they come, up to an end token (yielded too) or the limit.

        Starts a new sequence. max_new_tokens None, or more than the sequence has room for, means up
        to its max_seq tokens. top_k 1 or temperature 0 is greedy; top_k 0 or None and top_p 1 or
        None switch these filters off. Same seed and prompt, same answer.
        Raises ValueError at once for arguments out of range, such as a prompt that leaves no room.
        """
        self._handle()
        ids = [operator.index(token) for token in inputs]
        sampling = sampling_options(top_k, top_p, temperature, seed)
        return self._stream(ids, self._room(ids, max_new_tokens), sampling)

    def _stream(self, ids: list[int], room: int, sampling: LlaisysSampling) -> Iterator[int]:
        self.reset()
        run = self._run
        token = self._step(ids, sampling)
        for _ in range(room - 1):
            yield token
            if self.is_end(token):
                return
            if self._run != run:
                raise RuntimeError("the model has started another sequence since")
            token = self._step([token], sampling)
        yield token

    def _room(self, ids: list[int], max_new_tokens: int | None) -> int:
        """How many tokens the answer may have, for a prompt that is checked here."""
        capacity = self._meta.maxseq
        if not ids:
            raise ValueError("the prompt is empty: expected at least one token")
        if len(ids) >= capacity:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but the sequence holds {capacity}, "
                "the answer included"
            )
        self._check_ids(ids)
        if max_new_tokens is None:
            return capacity - len(ids)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
        return min(max_new_tokens, capacity - len(ids))

    def _check_ids(self, ids: list[int]) -> None:
        for i, token in enumerate(ids):
            if not 0 <= token < self._meta.voc:
                raise ValueError(
                    f"token {i} of {len(ids)}: expected an id of 0 to {self._meta.voc - 1}, "
                    f"found {token}"
                )

    # ---- one step at a time ----

    def step(
        self,
        tokens: Sequence[int],
        top_k: int | None = 1,
        top_p: float | None = 1.0,
        temperature: float | None = 1.0,
        *,
        seed: int = 0,
    ) -> int:
        """Appends tokens to the sequence and returns the next one, which is not appended."""
        ids = [operator.index(token) for token in tokens]
        self._check_ids(ids)
        self._run += 1
        return self._step(ids, sampling_options(top_k, top_p, temperature, seed))

    def _step(self, ids: list[int], sampling: LlaisysSampling) -> int:
        return LIB_LLAISYS.llaisysQwen2ModelStep(
            self._handle(), (ctypes.c_int64 * len(ids))(*ids), len(ids), ctypes.byref(sampling)
        )

    def reset(self) -> None:
        """Empties the sequence, keeping the weights."""
        self._run += 1
        LIB_LLAISYS.llaisysQwen2ModelReset(self._handle())

    def logits(self) -> array[float]:
        """f32 [voc]: logits after the last token of the last step.

        A copy with the buffer protocol: numpy.asarray and memoryview take it as it is.
        """
        values = array("f", bytes(4 * self._meta.voc))
        address, _ = values.buffer_info()
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
        LIB_LLAISYS.llaisysQwen2ModelLogits(self._handle(), pointer)
        return values

    @property
    def length(self) -> int:
        """Tokens in the sequence now."""
        return LIB_LLAISYS.llaisysQwen2ModelLength(self._handle())

    # ---- what it is ----

    @property
    def meta(self) -> LlaisysQwen2Meta:
        """Dimensions: dtype, nlayer, hs, nh, nkvh, dh, di, maxseq (in force), voc, and others."""
        return self._meta

    def is_end(self, token: int) -> bool:
        """Whether the token is one of those that end a text."""
        return bool(LIB_LLAISYS.llaisysQwen2ModelIsEnd(self._handle(), token))

    def close(self) -> None:
        """Frees the model's memory; the model cannot be used any more. May be called again."""
        model, self._model = self._model, None
        if model:
            LIB_LLAISYS.llaisysQwen2ModelDestroy(model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self.close()

    def _handle(self) -> ctypes.c_void_p:
        if not self._model:
            raise ValueError("the model is closed")
        return self._model


def plan(
    model_path: str | os.PathLike[str],
    device: DeviceType = DeviceType.CPU,
    *,
    format: str = "text",
    device_ids: Sequence[int] | None = None,
    max_seq: int | None = None,
    prefill_chunk: int | None = None,
    threads: int | None = None,
    dtype: DataType | None = None,
) -> str:
    """Where every byte of a model would lie, without loading it: "text", "json" or "svg".

    The options are those of Qwen2. Offsets and sizes are bytes from the base of the arena.
    """
    options = model_options(device, device_ids, max_seq, prefill_chunk, threads, dtype)
    text = LIB_LLAISYS.llaisysQwen2Plan(
        os.fsencode(model_path), ctypes.byref(options), format.encode()
    )
    try:
        return ctypes.string_at(text).decode()
    finally:
        LIB_LLAISYS.llaisysFreeString(text)
