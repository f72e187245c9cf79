"""What came out of a run: scores, plots, report, model card."""
