"""From a source of rows to input ids and labels: rows, chat messages, tokens."""
