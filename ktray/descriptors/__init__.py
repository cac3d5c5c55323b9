"""Handcrafted teachers: one file each, `Spec`, `REVISION`, optional `fit`, `describe`."""
