"""Policies as pure functions: no clock, no I/O, no device."""
