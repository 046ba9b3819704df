"""Stands for Colab's own package where a kernel only asks whether it has been imported."""
