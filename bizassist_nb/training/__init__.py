"""Training: the worker process, what starts it, its engines, and the scoring of held-out rows."""
