"""Trained students as files that others can use: weights with a card, and programs that run without ktray.

May import `training/` and the backbones by `plugins`. Start with `student_files.py`.
"""
