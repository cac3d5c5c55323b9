"""Parts that several evaluations share: linear classifiers and their solver, neighbours, average precision, results per image.

Start with `linear_classifiers`. The subpackage works on arrays and tensors; it imports `fingerprint`, `progress` and `images`.
"""
