"""What came of a run, in figures, words and pictures."""
