"""Section `report`: the HTML report."""

from __future__ import annotations

from pydantic import Field

from pocl_ds.config.base import NonNegative, Positive, Section


class ReportConfig(Section):
    """The size of the report."""

    num_examples: NonNegative = Field(
        8, description="Number of items in report.md that are shown with every model's answer."
    )
    max_samples: NonNegative = Field(
        10_000, description="Maximum number of training samples to browse in report.html."
    )
    max_items: NonNegative = Field(
        1_000,
        description="Maximum number of evaluated items per benchmark to browse in report.html.",
    )
    max_text_mb: Positive = Field(
        8,
        description="Maximum size of all browsable texts in report.html, in MB. Long texts reduce "
        "the number of samples and items that are included.",
    )
