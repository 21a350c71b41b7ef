"""Options of models, engines and requests: checked, and as the C structures that take them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from .libllaisys import DataType, DeviceType, LlaisysQwen2Options, LlaisysSampling


def check_sizes(**sizes: int | None) -> dict[str, int]:
    """The sizes, with 0 for None: the library's choice."""
    for name, value in sizes.items():
        if value is not None and not 0 < value < 2**31:  # ctypes would wrap it around
            raise ValueError(f"{name}: expected 1 to 2**31 - 1, found {value}")
    return {name: value or 0 for name, value in sizes.items()}


def model_options(
    device: DeviceType = DeviceType.CPU,
    device_ids: Sequence[int] | None = None,
    max_seq: int | None = None,
    prefill_chunk: int | None = None,
    threads: int | None = None,
    dtype: DataType | None = None,
    progress: bool | None = None,
) -> LlaisysQwen2Options:
    """The C structure; ctypes keeps the array of ids alive with it."""
    sizes = check_sizes(max_seq=max_seq, prefill_chunk=prefill_chunk, threads=threads)
    if device_ids is not None and not device_ids:
        raise ValueError("device_ids: expected at least one device, found none")
    ids = (ctypes.c_int * len(device_ids))(*device_ids) if device_ids else None
    return LlaisysQwen2Options(
        device=device,
        device_ids=ids,
        ndevice=len(device_ids) if device_ids else 0,
        dtype=dtype if dtype is not None else DataType.INVALID,
        maxseq=sizes["max_seq"],
        prefill_chunk=sizes["prefill_chunk"],
        nthread=sizes["threads"],
        progress=bool(progress),
    )


def sampling_options(
    top_k: int | None, top_p: float | None, temperature: float | None, seed: int
) -> LlaisysSampling:
    """The C structure, for arguments that are checked here; None is the neutral value."""
    top_k = 0 if top_k is None else top_k
    top_p = 1.0 if top_p is None else top_p
    temperature = 1.0 if temperature is None else temperature
    if not 0 <= top_k < 2**31:
        raise ValueError(f"top_k: expected 0 (off) or more, found {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected more than 0 and at most 1, found {top_p}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected 0 (greedy) or more, found {temperature}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 to 2**64 - 1, found {seed}")
    top_p = max(top_p, 2.0**-126)  # stays above 0 as f32
    return LlaisysSampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
