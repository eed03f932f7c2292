"""The curriculum inside other people's trainers; see docs/tutorials/other-trainers.md.

    from pocl_ds.integrations import CurriculumTrainerMixin

A plain PyTorch loop needs only `pocl_ds.curriculum.CurriculumSampler`.
"""

from pocl_ds.integrations.trainer import CurriculumTrainerMixin

__all__ = ["CurriculumTrainerMixin"]
