"""Base models and adapters: which, from where, and how they are loaded."""
