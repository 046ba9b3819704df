"""The vocabulary that everything stands on."""
