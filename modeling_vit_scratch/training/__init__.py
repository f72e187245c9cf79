"""One run: its recipe, its optimizer, its checkpoints, its loop."""
