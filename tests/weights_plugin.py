"""A plugin with a rule for sample weights."""

from __future__ import annotations

from typing import Any

from pocl_ds import plugins


@plugins.sample_weights("hard_more")
def hard_more(scores: Any) -> Any:
    """From 0.5 for the easiest sample to 1.5 for the hardest."""
    return 0.5 + scores["place"]
