"""Models: one class per architecture."""

from .qwen2 import Qwen2, plan

__all__ = ["Qwen2", "plan"]
