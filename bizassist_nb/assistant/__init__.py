"""Base and tuned, answering together from one copy of the weights."""
