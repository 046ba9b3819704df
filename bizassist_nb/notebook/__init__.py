"""Notebook front ends: they parse and delegate, and nothing else imports them."""
