"""A model as one sequence, step by step: what an answer is made of, with its logits.

    with Sequence("models/refrain-mini") as sequence:
        token = sequence.step([1, 2, 3])  # the likeliest next token, which is not appended yet
        logits = sequence.logits()  # behind 3
        token = sequence.step([token])

Tokens are vocabulary ids. The memory of the sequence is taken when it is opened; it is used by one
thread at a time, and different sequences are independent. For answers there are Qwen2 and Engine.
"""

from __future__ import annotations

import ctypes
import operator
import os
from array import array
from collections import abc
from typing import TYPE_CHECKING, Any

from ..libllaisys import LIB_LLAISYS, DeviceType, LlaisysQwen2Meta
from ..options import model_options, sampling_options

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

__all__ = ["Sequence"]


class Sequence:
    """A model folder in transformers' format, opened for one sequence; options and errors as Qwen2."""

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        device: DeviceType = DeviceType.CPU,
        **options: Any,
    ) -> None:
        self._model = None
        self._model = LIB_LLAISYS.llaisysQwen2ModelOpen(
            os.fsencode(model_path), ctypes.byref(model_options(device, **options))
        )
        self._meta = LlaisysQwen2Meta()
        LIB_LLAISYS.llaisysQwen2ModelMeta(self._model, ctypes.byref(self._meta))

    def step(
        self,
        tokens: abc.Sequence[int],
        top_k: int | None = 1,
        top_p: float | None = 1.0,
        temperature: float | None = 1.0,
        *,
        seed: int = 0,
    ) -> int:
        """Appends tokens to the sequence and returns the next one, which is not appended.

        The choice is that of Qwen2.stream. Raises ValueError for a token or an option out of range,
        and LlaisysError for no tokens or more than there is room for; the sequence is then as it was.
        """
        ids = [operator.index(token) for token in tokens]
        for i, token in enumerate(ids):  # ctypes would wrap it around
            if not 0 <= token < self._meta.voc:
                raise ValueError(
                    f"token {i} of {len(ids)}: expected an id of 0 to {self._meta.voc - 1}, "
                    f"found {token}"
                )
        sampling = sampling_options(top_k, top_p, temperature, seed)
        return LIB_LLAISYS.llaisysQwen2ModelStep(
            self._handle(), (ctypes.c_int64 * len(ids))(*ids), len(ids), ctypes.byref(sampling)
        )

    def reset(self) -> None:
        """Empties the sequence, keeping the weights."""
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

    @property
    def meta(self) -> LlaisysQwen2Meta:
        """Dimensions: dtype, nlayer, hs, nh, nkvh, dh, di, maxseq (in force), voc, and others."""
        return self._meta

    def is_end(self, token: int) -> bool:
        """Whether the token is one of those that end a text."""
        return bool(LIB_LLAISYS.llaisysQwen2ModelIsEnd(self._handle(), token))

    def close(self) -> None:
        """Frees all memory; the sequence cannot be used any more. May be called again."""
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
            raise ValueError("the sequence is closed")
        return self._model
