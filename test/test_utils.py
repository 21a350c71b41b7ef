"""What the tests share. They need torch; pytest and hypothesis only where pytest runs them.

Every test file is a script (``python test/ops/add.py --device nvidia --profile``) and a pytest
module: its ``test_*`` functions take a device name, and script_main() calls them as pytest does.
"""

import argparse
import inspect
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bindings"))

import llaisys
import torch

try:
    import hypothesis
    from hypothesis import strategies
except ImportError:  # scripts run without it
    hypothesis = None

_DTYPES = {
    "bool": (torch.bool, llaisys.DataType.BOOL),
    "i8": (torch.int8, llaisys.DataType.I8),
    "i16": (torch.int16, llaisys.DataType.I16),
    "i32": (torch.int32, llaisys.DataType.I32),
    "i64": (torch.int64, llaisys.DataType.I64),
    "u8": (torch.uint8, llaisys.DataType.U8),
    "u16": (torch.uint16, llaisys.DataType.U16),
    "u32": (torch.uint32, llaisys.DataType.U32),
    "u64": (torch.uint64, llaisys.DataType.U64),
    "f16": (torch.float16, llaisys.DataType.F16),
    "f32": (torch.float32, llaisys.DataType.F32),
    "f64": (torch.float64, llaisys.DataType.F64),
    "bf16": (torch.bfloat16, llaisys.DataType.BF16),
}
_DEVICES = {"cpu": llaisys.DeviceType.CPU, "nvidia": llaisys.DeviceType.NVIDIA}

FLOATS = ("f32", "f16", "bf16")
# (atol, rtol) of one rounding to the dtype
PRECISION = {"f32": (1e-5, 1e-5), "f16": (1e-3, 1e-3), "bf16": (1e-2, 1e-2)}
LAYOUTS = ("dense", "permuted", "sliced")

SKIPPED = 77  # exit code of a script that could not run


# ---- names ----


def torch_dtype(dtype_name: str) -> torch.dtype:
    return _DTYPES[dtype_name][0]


def llaisys_dtype(dtype_name: str) -> llaisys.DataType:
    return _DTYPES[dtype_name][1]


def dtype_name(dtype: llaisys.DataType | torch.dtype) -> str:
    return next(name for name, both in _DTYPES.items() if dtype in both)


def llaisys_device(device_name: str) -> llaisys.DeviceType:
    return _DEVICES[device_name]


def device_name(device: llaisys.DeviceType) -> str:
    return next(name for name, value in _DEVICES.items() if value == device)


def torch_device(device_name: str, device_id: int = 0) -> torch.device:
    """Where the reference is computed: beside the library's tensors if this PyTorch can."""
    if device_name == "nvidia" and torch.cuda.is_available():
        return torch.device(f"cuda:{device_id}")
    return torch.device("cpu")


# ---- moving data ----


def to_llaisys(values: torch.Tensor, device_name: str, device_id: int = 0) -> llaisys.Tensor:
    """A dense copy."""
    host = values.detach().cpu().contiguous()
    tensor = llaisys.Tensor(
        tuple(host.shape),
        dtype=llaisys_dtype(dtype_name(host.dtype)),
        device=llaisys_device(device_name),
        device_id=device_id,
    )
    tensor.load(host.data_ptr())
    return tensor


def to_torch(tensor: llaisys.Tensor) -> torch.Tensor:
    """The values on the host, with the strides of the tensor."""
    shape, strides = tensor.shape(), tensor.strides()
    extent = 0
    if 0 not in shape:
        extent = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    memory = torch.empty((extent,), dtype=torch_dtype(dtype_name(tensor.dtype())))
    llaisys.RuntimeAPI(tensor.device_type()).memcpy_sync(
        memory.data_ptr(),
        tensor.data_ptr(),
        extent * memory.element_size(),
        llaisys.MemcpyKind.D2H,
    )
    return memory.reshape(shape) if extent == 0 else memory.as_strided(shape, strides)


def bits(values: torch.Tensor) -> torch.Tensor:
    """The bytes of the elements in order: what equal copies have in common, NaN or not."""
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def poison(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Values that spoil every result that they enter."""
    if dtype.is_floating_point:
        return torch.full(tuple(shape), float("nan"), dtype=dtype)
    if dtype == torch.int64:  # as an index, far outside of any table
        return torch.full(tuple(shape), -(2**40), dtype=dtype)
    return torch.ones(tuple(shape), dtype=dtype)


class Placed:
    """Values in device memory under a layout: dense; with dimensions stored in reverse order; or
    inside a larger poisoned tensor."""

    def __init__(self, values: torch.Tensor, device_name: str, layout: str = "dense") -> None:
        values = values.detach().cpu()
        self._ndim = values.dim()
        self._margin = 0
        memory = values
        if layout == "permuted":
            memory = values.permute(tuple(reversed(range(self._ndim)))).contiguous()
        elif layout == "sliced":
            self._margin = 1
            memory = poison([n + 2 for n in values.shape], values.dtype)
            self._view_of(memory, layout, values.shape).copy_(values)
        self._layout = layout
        self._memory = to_llaisys(memory, device_name)
        self.tensor = self._memory
        if layout == "permuted":
            self.tensor = self._memory.permute(*reversed(range(self._ndim)))
        elif layout == "sliced":
            for dim, size in enumerate(values.shape):
                self.tensor = self.tensor.slice(dim, 1, 1 + size)
        self._before = memory.clone()

    @staticmethod
    def _view_of(memory: torch.Tensor, layout: str, shape: Sequence[int]) -> torch.Tensor:
        if layout == "permuted":
            return memory.permute(tuple(reversed(range(memory.dim()))))
        if layout == "sliced":
            for dim, size in enumerate(shape):
                memory = memory.narrow(dim, 1, size)
        return memory

    def read(self) -> torch.Tensor:
        """The values now, on the host; checks that nothing around them was written."""
        values = to_torch(self.tensor)
        expected = self._before.clone()
        self._view_of(expected, self._layout, values.shape).copy_(values)
        assert torch.equal(bits(to_torch(self._memory)), bits(expected)), "wrote beyond the tensor"
        return values

    def is_unchanged(self) -> bool:
        return torch.equal(bits(to_torch(self._memory)), bits(self._before))


def _pair(values: torch.Tensor, device: str, device_id: int) -> tuple[torch.Tensor, llaisys.Tensor]:
    return values.to(torch_device(device, device_id)), to_llaisys(values, device, device_id)


def random_values(
    shape: Sequence[int], dtype_name: str, low: float = -1.0, high: float = 1.0
) -> torch.Tensor:
    """Uniform in [low, high)."""
    return (torch.rand(tuple(shape)) * (high - low) + low).to(torch_dtype(dtype_name))


def random_tensor(
    shape: Sequence[int],
    dtype_name: str,
    device_name: str,
    device_id: int = 0,
    scale: float | None = None,
    bias: float | None = None,
) -> tuple[torch.Tensor, llaisys.Tensor]:
    """The same values, uniform in [0, 1), then scaled and shifted, for torch and the library."""
    values = torch.rand(tuple(shape), dtype=torch_dtype(dtype_name))
    values = values * (1 if scale is None else scale) + (0 if bias is None else bias)
    return _pair(values, device_name, device_id)


def random_int_tensor(
    shape: Sequence[int],
    device_name: str,
    dtype_name: str = "i64",
    device_id: int = 0,
    low: int = 0,
    high: int = 2,
) -> tuple[torch.Tensor, llaisys.Tensor]:
    values = torch.randint(low, high, tuple(shape), dtype=torch_dtype(dtype_name))
    return _pair(values, device_name, device_id)


def zero_tensor(
    shape: Sequence[int], dtype_name: str, device_name: str, device_id: int = 0
) -> tuple[torch.Tensor, llaisys.Tensor]:
    values = torch.zeros(tuple(shape), dtype=torch_dtype(dtype_name))
    return _pair(values, device_name, device_id)


def arrange_tensor(
    start: int, end: int, device_name: str, device_id: int = 0
) -> tuple[torch.Tensor, llaisys.Tensor]:
    return _pair(torch.arange(start, end), device_name, device_id)


# ---- comparing ----


def assert_close(
    result: torch.Tensor,
    reference: torch.Tensor,
    atol: float = 0.0,
    rtol: float = 0.0,
    what: str = "",
) -> None:
    """|result - reference| <= atol + rtol |reference|; NaN and infinities as they are."""
    assert result.shape == reference.shape, f"{what}: {result.shape}, not {reference.shape}"
    result, reference = result.detach().cpu().double(), reference.detach().cpu().double()
    is_close = torch.isclose(result, reference, atol=atol, rtol=rtol, equal_nan=True)
    if is_close.all():
        return
    error = torch.where(is_close, 0, (result - reference).abs().nan_to_num(torch.inf, torch.inf))
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    raise AssertionError(
        f"{what}: {int((~is_close).sum())} of {is_close.numel()} elements differ by more than "
        f"{atol} + {rtol} |reference|; worst at {at}: {result[at]:.9g}, not {reference[at]:.9g}"
    )


def check_equal(
    llaisys_result: llaisys.Tensor,
    torch_answer: torch.Tensor,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    strict: bool = False,
) -> bool:
    """Whether shape, dtype and values are those of torch's answer."""
    result, answer = to_torch(llaisys_result), torch_answer.cpu()
    assert result.shape == answer.shape
    assert result.dtype == answer.dtype
    if strict or not answer.dtype.is_floating_point:
        return torch.equal(result, answer)
    return torch.allclose(result, answer, atol=atol, rtol=rtol)


def expect_error(call: Callable[[], object], *words: str) -> None:
    """The call raises an LlaisysError of one line that has all the words."""
    try:
        call()
    except llaisys.LlaisysError as error:
        text = str(error)
        assert text and "\n" not in text, repr(text)
        for word in words:
            assert word in text, f"expected {word!r} in {text!r}"
        return
    raise AssertionError(f"expected an LlaisysError with {words}")


Spec = tuple[Sequence[int], str]  # shape, dtype


def check_refusals(
    device: str,
    op: Callable[..., None],
    good: dict[str, Spec],
    outputs: Sequence[str],
    bad: Sequence[tuple[dict[str, Spec], Sequence[str]]] = (),
    scalars: Sequence[float] = (),
    optional: Sequence[str] = (),
) -> None:
    """The operator takes good arguments, and refuses bad ones with outputs untouched.

    ``good`` has the tensors in the order of the call. Bad ones: every argument missing, of another
    dtype, with a dimension more, or on another device; and the changes to good ones in ``bad``,
    whose messages have the given words.
    """

    def place(spec: Spec, where: str = device) -> Placed:
        shape, dtype = spec
        values = torch.ones(tuple(shape), dtype=torch_dtype(dtype))
        return Placed(values if dtype != "i64" else values * 0, where)

    def refuse(changes: dict[str, Placed | None], *words: str) -> None:
        placed = {name: place(spec) for name, spec in good.items()} | changes
        tensors = [each.tensor if each else None for each in placed.values()]
        expect_error(lambda: op(*tensors, *scalars), *words)
        for name in outputs:
            assert placed[name] is None or placed[name].is_unchanged(), (
                f"{name} was written: {words}"
            )

    op(*(place(spec).tensor for spec in good.values()), *scalars)
    for name, (shape, dtype) in good.items():
        if name not in optional:
            refuse({name: None}, name, "NULL")
        refuse({name: place((shape, "i32"))}, "dtype", "found")
        refuse({name: place((shape, "f64"))}, "dtype", "found")
        if dtype != "i64":
            refuse({name: place((shape, "f16" if dtype == "f32" else "f32"))}, "dtype", "found")
        refuse({name: place(((*shape, 2), dtype))}, "shape", "found")
        if device != "cpu":
            refuse({name: place((shape, dtype), "cpu")}, "device", "cpu:0")
    for changes, words in bad:
        refuse({name: place(spec) for name, spec in changes.items()}, *words)


# ---- running ----


def forall(check: Callable[..., None], examples: int, **choices: Sequence[Any]) -> None:
    """Runs check on combinations of choices, found by hypothesis where it is installed."""

    def seeded(**values: Any) -> None:
        torch.manual_seed(0)
        check(**values)

    if hypothesis is None:
        draw = random.Random(0)
        for _ in range(examples):
            seeded(**{name: draw.choice(values) for name, values in choices.items()})
        return
    settings = hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=True
    )
    drawn = {name: strategies.sampled_from(values) for name, values in choices.items()}
    settings(hypothesis.given(**drawn)(seeded))()


def step_by_step(
    sequence: llaisys.models.Sequence,
    prompt: Sequence[int],
    count: int,
    *sampling: Any,
    **options: Any,
) -> list[int]:
    """The answer of up to count tokens by single steps, as an engine must give it."""
    count = min(count, sequence.meta.maxseq - len(prompt))
    sequence.reset()
    answer = [sequence.step(prompt, *sampling, **options)]
    while len(answer) < count and not sequence.is_end(answer[-1]):
        answer.append(sequence.step(answer[-1:], *sampling, **options))
    return answer


def absence(device_name: str) -> str | None:
    """Why a device cannot be tested on, or None."""
    api = llaisys.RuntimeAPI(llaisys_device(device_name))
    if api.get_device_count() > 0:
        return None
    try:
        api.set_device(0)
    except llaisys.LlaisysError as error:
        return f"{device_name}: llaisys reports 0 devices ({error})"
    return f"{device_name}: llaisys reports 0 devices"


def _gpu_ms(func: Callable[[], object]) -> float:
    """Median time of a call on the GPU, between events. Calls are queued behind a sleeping kernel,
    so that short ones are not timed at the speed at which the host launches them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(count: int) -> float:
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)  # cycles: about a millisecond
        start.record()
        for _ in range(count):
            func()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count

    count = max(3, min(40, int(10 / max(run(3), 1e-3))))
    return sorted(run(count) for _ in range(5))[2]


def _host_ms(func: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """Mean time of a call over about a second."""

    def run(count: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            func()
        synchronize()
        return time.perf_counter() - start

    once = min(run(1) for _ in range(3))
    count = max(3, min(1000, int(1 / max(once, 1e-6))))
    return run(count) / count * 1e3


def benchmark(
    torch_func: Callable[[], object], llaisys_func: Callable[[], object], device_name: str
) -> None:
    """Prints the times of a call, torch's beside the library's. On a GPU both run on the default
    stream of one device, so that torch's events time the library's kernels, too."""
    if device_name == "nvidia" and torch.cuda.is_available():
        torch_ms, llaisys_ms = _gpu_ms(torch_func), _gpu_ms(llaisys_func)
    else:
        synchronize = llaisys.RuntimeAPI(llaisys_device(device_name)).device_synchronize
        torch_ms, llaisys_ms = (_host_ms(f, synchronize) for f in (torch_func, llaisys_func))
    ratio = torch_ms / llaisys_ms
    print(f"      Torch {torch_ms:10.5f} ms | LLAISYS {llaisys_ms:10.5f} ms | {ratio:.2f}x")


@contextmanager
def captured_stdout() -> Iterator[list[str]]:
    """Collects what C and Python write to standard output, in one element of the list."""
    captured: list[str] = []
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 1)
            try:
                yield captured
            finally:
                sys.stdout.flush()
                os.dup2(saved, 1)
                file.seek(0)
                captured.append(file.read().decode())
    finally:
        os.close(saved)


def script_main(
    names: dict[str, Any], profile: Callable[[str], None] | None = None, title: str = "tests"
) -> None:
    """Runs a test file's test_* functions as a script."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--device", default="cpu", choices=sorted(_DEVICES))
    if profile:
        parser.add_argument("--profile", action="store_true", help="time torch and llaisys too")
    args = parser.parse_args()

    reason = absence(args.device)
    if reason:
        print(f"\033[93mSKIPPED: {reason}\033[0m")
        sys.exit(SKIPPED)

    print(f"Testing {title} on {args.device}")
    for name, test in list(names.items()):
        if name.startswith("test_") and inspect.isfunction(test):
            print(f"  {name}", flush=True)
            torch.manual_seed(0)
            test(args.device) if inspect.signature(test).parameters else test()
    if profile and args.profile:
        print("Profile")
        profile(args.device)
    print("\033[92mTest passed!\033[0m\n")
