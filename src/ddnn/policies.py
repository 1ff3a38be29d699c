"""Choices of the method that a recipe and the library both offer. Light: no torch."""

from typing import Literal

NormPolicy = Literal["private", "shared", "recalibrated"]
"""What normalisation layers do once two paths have diverged: one per path, one for all, or one for all with running
statistics of their own, recomputed after training."""
HeadPolicy = Literal["shared", "private"]
"""Whether the nets have one classifier, or each its own."""
AttentionMap = Literal["power", "softmax"]
"""What makes an attention map of an energy: unit length, or a softmax over places."""
Labels = Literal["all", "full-net"]
"""Which nets learn from labels; the others learn by distillation alone."""
