"""Evaluation of the models of a run (answers, judge, held-out loss), and export of the student."""
