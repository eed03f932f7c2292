"""The recipe: its sections, cross-field checks, and reading it from YAML with overrides."""

from pocl_ds.config.schema import *  # noqa: F403
