"""Qwen2-architecture language models: tokens in, tokens out.

    with Qwen2("models/refrain-mini") as model:
        ids = model.generate([1, 2, 3], max_new_tokens=16)       # greedy, prompt and answer
        for token in model.stream([1, 2, 3], top_k=50, seed=7):  # sampled, the answer alone
            print(token)

Tokens are vocabulary ids. A model is an Engine for one request at a time: what it has computed of
the last texts stays, as far as there is room, and a prompt that begins like one of them (the next
turn of a chat) goes on from there. It is used by one thread at a time; different models are
independent. Engine answers many prompts at once; Sequence takes single steps and has logits.
"""

from __future__ import annotations

import operator
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .. import engine
from ..libllaisys import DataType, DeviceType, LlaisysError, LlaisysQwen2Meta

if TYPE_CHECKING:
    from typing import Self  # Python 3.11

__all__ = ["Qwen2", "plan"]

SECONDS = 1.0  # that a wait for tokens lasts before it is begun again


class Qwen2:
    """A model folder in transformers' format, opened on one device or several.

    device_ids: devices to use, more than one for tensor parallelism; None is device 0.
    max_seq: tokens of the sequence, prompt and answer together, and of the KV cache; None is the
        smaller of the model's context and 4096.
    prefill_chunk: tokens of a prompt that are computed at once; None is the engine's choice.
    threads: CPU threads; None is all cores that the process may use.
    dtype: of weights and arithmetic, F32, F16 or BF16; None is the checkpoint's.
    progress: show a progress bar on standard error while loading, where that is a terminal.

    Raises ValueError for options out of range, and LlaisysError for a folder or options that cannot
    be used, naming file and tensor.
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
        self._engine = engine.Engine(
            model_path,
            device,
            device_ids=device_ids,
            max_seq=max_seq,
            max_seqs=1,
            max_queue=8,  # the next answer's request, and room for ends that nobody has read yet
            prefill_chunk=prefill_chunk,
            max_logprobs=0,
            threads=threads,
            dtype=dtype,
            progress=progress,
        )
        self._meta = self._engine.meta
        self._number = 0  # of the last request

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

        max_new_tokens None, or more than the sequence has room for, means up to its max_seq tokens.
        top_k 1 or temperature 0 is greedy; top_k 0 or None and top_p 1 or None switch these filters
        off. Same seed and prompt, same answer.

        The answer begins at once, and is computed ahead of its reader. It is given up when the
        iterator is closed or dropped, and when the model starts another answer: the next token of
        this one then raises RuntimeError.
        Raises ValueError at once for arguments out of range, such as a prompt that leaves no room;
        an answer under way then goes on.
        """
        request = engine.Request(
            inputs, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        tokens = self._tokens(request)
        next(tokens)
        return tokens

    def _tokens(self, request: engine.Request) -> Iterator[int]:
        """Yields once when the request is submitted, then the answer's tokens."""
        answer, tokens = engine.Answer(), deque()
        number = self._engine.submit(request, lambda event: tokens.extend(answer.take(event)))
        try:
            self._number = number
            # among others, those whose submission an interrupt has cut off
            for other in self._engine.pending():
                if other != number:
                    self._engine.cancel(other)
            while any(other != number for other in self._engine.pending()):
                self._engine.poll(SECONDS)
            yield -1
            while tokens or answer.finish not in ("stop", "length"):
                if self._number != number:
                    raise RuntimeError("the model has started another answer since")
                if tokens:
                    yield tokens.popleft()
                elif answer.finish == "error":
                    raise LlaisysError(answer.message)
                elif answer.finish:
                    raise ValueError("the model is closed")
                else:
                    self._engine.poll(SECONDS)
        finally:
            self._engine.cancel(number)

    def stats(self) -> dict[str, Any]:
        """Counts and times since the model was opened, as Engine.stats gives them.

        cached_tokens: of prompt_tokens, those found in the KV cache instead of being computed.
        """
        return self._engine.stats()

    @property
    def meta(self) -> LlaisysQwen2Meta:
        """Dimensions: dtype, nlayer, hs, nh, nkvh, dh, di, maxseq (in force), voc, and others."""
        return self._meta

    def is_end(self, token: int) -> bool:
        """Whether the token is one of those that end a text."""
        return self._engine.is_end(token)

    def close(self) -> None:
        """Frees the model's memory; the model cannot be used any more. May be called again."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan(
    model_path: str | os.PathLike[str], device: DeviceType = DeviceType.CPU, **options: Any
) -> str:
    """Where every byte of a model would lie, without loading it: format "text", "json" or "svg".

    The options are format and those of Qwen2 but progress. Offsets and sizes are bytes from the base of the
    arena.
    """
    return engine.plan(model_path, device, max_seqs=1, **options)
