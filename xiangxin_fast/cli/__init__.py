"""The modes of `python -m xiangxin_fast.generate`, a file each, and what they share."""
