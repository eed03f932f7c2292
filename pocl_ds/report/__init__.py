"""The HTML and Markdown report, made from the files of a run; nothing is computed again."""
