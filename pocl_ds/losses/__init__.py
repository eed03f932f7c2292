"""Divergences between teacher and student, and the fused head that evaluates them in chunks."""
