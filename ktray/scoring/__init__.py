"""Scores that a benchmark defines: average precision by the rules of PASCAL VOC and of COCO, and mean IoU of label maps.

Functions of arrays. May import only the modules at the package's root. Start with `average_precision.py`, then
`detection_scores.py`. `per_image.py` keeps what an evaluation found for each image, and says how certain a score is.
"""
