"""Chaos: a supervisor repeats `ktray search` until it is done while random faults hit every kind of process."""
