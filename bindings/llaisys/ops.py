"""Operators over tensors. They write to their first arguments; floating tensors of a call share one
dtype, f32, f16 or bf16, and sums are accumulated in f32. Tensors may be strided."""

from .libllaisys import LIB_LLAISYS, llaisysTensor_t
from .tensor import Tensor


def _handle(tensor: Tensor | None) -> llaisysTensor_t | None:
    return None if tensor is None else tensor.lib_tensor()  # the library refuses NULL by name


class Ops:
    """The operators. Wrong dtypes, shapes or devices raise LlaisysError, outputs untouched."""

    @staticmethod
    def add(c: Tensor, a: Tensor, b: Tensor) -> None:
        """c = a + b, all of one shape; c may be a or b."""
        LIB_LLAISYS.llaisysAdd(_handle(c), _handle(a), _handle(b))

    @staticmethod
    def argmax(max_idx: Tensor, max_val: Tensor, vals: Tensor) -> None:
        """The largest element of vals [n], to max_val [1], and its index, i64, to max_idx [1].

        The first of equals; a NaN counts as larger than any number.
        """
        LIB_LLAISYS.llaisysArgmax(_handle(max_idx), _handle(max_val), _handle(vals))

    @staticmethod
    def embedding(out: Tensor, index: Tensor, weight: Tensor) -> None:
        """out [n, d] = rows index [n], i64, of weight [voc, d]."""
        LIB_LLAISYS.llaisysEmbedding(_handle(out), _handle(index), _handle(weight))

    @staticmethod
    def linear(out: Tensor, inp: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """out [m, n] = inp [m, k] weight^T + bias, with weight [n, k] and bias [n] or None."""
        LIB_LLAISYS.llaisysLinear(_handle(out), _handle(inp), _handle(weight), _handle(bias))

    @staticmethod
    def rearrange(out: Tensor, inp: Tensor) -> None:
        """Copies inp to out, of the same shape and dtype, whatever their strides."""
        LIB_LLAISYS.llaisysRearrange(_handle(out), _handle(inp))

    @staticmethod
    def rms_norm(out: Tensor, inp: Tensor, weight: Tensor, eps: float) -> None:
        """out = inp / sqrt(mean(inp^2) + eps) * weight over the last dimension; weight [d]."""
        LIB_LLAISYS.llaisysRmsNorm(_handle(out), _handle(inp), _handle(weight), eps)

    @staticmethod
    def rope(out: Tensor, inp: Tensor, pos_ids: Tensor, theta: float) -> None:
        """Rotary embedding of inp [seq, heads, d] at positions pos_ids [seq], i64.

        With a, b the halves of the last dimension and angle = pos / theta^(2j/d):
        a' = a cos - b sin, b' = b cos + a sin.
        """
        LIB_LLAISYS.llaisysROPE(_handle(out), _handle(inp), _handle(pos_ids), theta)

    @staticmethod
    def self_attention(attn_val: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """Causal attention: attn_val [seq, nh, dv] = softmax(scale q k^T) v.

        q [seq, nh, d], k [total, nkvh, d], v [total, nkvh, dv]; the last query sees all of k, and
        query head h reads KV head h // (nh // nkvh).
        """
        LIB_LLAISYS.llaisysSelfAttention(
            _handle(attn_val), _handle(q), _handle(k), _handle(v), scale
        )

    @staticmethod
    def swiglu(out: Tensor, gate: Tensor, up: Tensor) -> None:
        """out = up * gate / (1 + e^-gate), all of one shape; out may be gate or up."""
        LIB_LLAISYS.llaisysSwiGLU(_handle(out), _handle(gate), _handle(up))
