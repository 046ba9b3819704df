"""Errors of Colab's package."""


class Error(Exception):
    pass
