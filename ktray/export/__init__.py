"""Export of trained students: weights with a description of the model, and programs that run without ktray.

May import `training/`, and backbones through `plugins`. Start with `student_files.py`; `programs.py` makes the programs.
"""
