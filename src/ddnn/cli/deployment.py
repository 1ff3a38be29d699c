"""Verbs that bring a finished run to a device."""
