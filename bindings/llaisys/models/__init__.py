"""Models: one class per architecture, and one for single steps."""

from .qwen2 import Qwen2, plan
from .sequence import Sequence

__all__ = ["Qwen2", "Sequence", "plan"]
