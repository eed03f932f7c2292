"""One self-contained page and its Markdown twin from a run's artifacts; nothing is computed again."""
